// Package sniff finds out what a file is that was sent as speech: a recording in a
// format that is not taken, an archive, text, or perhaps raw PCM. It owns the signatures
// and what a user can do about each kind of file. It must not know where the bytes come
// from.
package sniff

import (
	"bytes"
	"fmt"
	"strings"
)

// Size is how many bytes at the beginning of a file are looked at to find out
// what it is: many frames of MPEG audio, and a tenth of a second of speech.
const Size = 8 << 10

// remedy is what a user can do about a file that is not taken.
type remedy int

const (
	remedyConvert remedy = iota // ffmpeg reads it
	remedyUnpack                // an archive or a compressed file
	remedyText                  // likely the error message of another service
	remedyDecode                // speech, but encoded as text
	remedyBody                  // what was sent over HTTP, and not only the file
	remedyNone                  // no speech is in it
)

// Kind is what a file's first bytes say that it is.
type Kind struct {
	Name   string // with its article
	remedy remedy
}

// Hint is a line that says what to do, for speech of that rate in Hz (0: not
// known).
func (k Kind) Hint(rate int) string {
	switch k.remedy {
	case remedyConvert:
		if rate == 0 {
			rate = 24000
		}
		return fmt.Sprintf("send a WAV, raw PCM or Ogg Opus; to convert it: ffmpeg -i FILE -ac 1 -ar %d -c:a pcm_s16le speech.wav", rate)
	case remedyUnpack:
		return "unpack it and send the WAV, raw PCM or Ogg Opus that is in it"
	case remedyText:
		return "send a WAV, raw PCM or Ogg Opus; it may be the error message of the service that should have made the speech"
	case remedyDecode:
		return "decode the base64 and send the bytes: a WAV, raw PCM or Ogg Opus"
	case remedyBody:
		return "send only the WAV, raw PCM or Ogg Opus that is in it"
	default:
		return "send a WAV, raw PCM or Ogg Opus"
	}
}

// LiveHint is Hint for live speech that is not PCM.
func (k Kind) LiveHint(rate int) string {
	if k.remedy == remedyConvert {
		return fmt.Sprintf("publish the samples alone; to convert it: ffmpeg -i FILE -ac 1 -ar %d -f s16le -", rate)
	}
	return "publish 16-bit samples alone"
}

// Detect finds out what a file is that begins with head, or is head. It is false
// for what may be raw PCM: a file is only called something else where far more
// than its first few bytes say so, for samples may have any value.
func Detect(head []byte) (Kind, bool) {
	if kind, found := signed(afterLines(head)); found {
		return kind, true
	}
	if name := boxes(head); name != "" {
		return Kind{name, remedyConvert}, true
	}
	if name := frames(head); name != "" {
		return Kind{name, remedyConvert}, true
	}
	if len(head) >= tarMagic+5 && string(head[tarMagic:tarMagic+5]) == "ustar" && head[0] != 0 {
		return Kind{"a tar archive", remedyUnpack}, true
	}
	if kind, found := text(head); found {
		return kind, true
	}
	if kind, found := wideText(head); found {
		return kind, true
	}
	return legacyText(head)
}

// signed finds the signature that head begins with.
func signed(head []byte) (Kind, bool) {
	if len(head) > 0 && strings.IndexByte(signatureStarts, head[0]) >= 0 {
		for _, s := range signatures() {
			if s.is(head) {
				return s.Kind, true
			}
		}
	}
	return Kind{}, false
}

// afterLines returns what follows a byte order mark and line breaks.
func afterLines(head []byte) []byte {
	return bytes.TrimLeft(bytes.TrimPrefix(head, []byte(utf8Mark)), "\r\n")
}

// tarMagic is where a tar archive says that it is one.
const tarMagic = 257

// Guess finds out what a file is by its first four bytes alone. A job that names
// its format is believed against them.
func Guess(head []byte) (Kind, bool) {
	for _, s := range []signature{
		{Kind{"a FLAC file", remedyConvert}, "fLaC", nil},
		{Kind{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x02", nil},
		{Kind{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x03", nil},
		{Kind{"an MP3 file (with an ID3 tag)", remedyConvert}, "ID3\x04", nil},
	} {
		if s.is(head) {
			return s.Kind, true
		}
	}
	return Kind{}, false
}
