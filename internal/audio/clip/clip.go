// Package clip holds a few seconds of real speech for the demo and for tests. It is
// data only.
package clip

import _ "embed"

// WAV is the clip as a 16-bit mono WAV at 16 kHz, 3.35 s.
//
//go:embed hello.wav
var WAV []byte

// Opus is the same clip as Ogg Opus: mono, 24 kHz, 20 ms packets, 100 ms pages.
//
//go:embed hello.opus
var Opus []byte
