package sniff

import (
	"bytes"
	"slices"
)

// WAVHeaders looks for the header of a WAV file in samples that come piece by
// piece: files that were joined without taking their headers off.
type WAVHeaders struct {
	tail []byte // of the piece before: one byte less than a header's beginning
	read int64
}

// WAVHeaderSize is how many bytes of a header are looked for: RIFF, a size, WAVE and
// the name of a chunk.
const WAVHeaderSize = 16

// Find returns the position of the first header that begins or ends in the next
// piece; -1: there is none.
func (w *WAVHeaders) Find(piece []byte) int64 {
	before := len(w.tail)
	w.tail = append(w.tail, piece[:min(len(piece), WAVHeaderSize-1)]...)
	at := WAVHeader(w.tail)
	start := w.read - int64(before)
	if at < 0 {
		at, start = WAVHeader(piece), w.read
	}
	w.read += int64(len(piece))
	if len(piece) >= WAVHeaderSize-1 {
		w.tail = append(w.tail[:0], piece[len(piece)-WAVHeaderSize+1:]...)
	} else if over := len(w.tail) - (WAVHeaderSize - 1); over > 0 {
		w.tail = append(w.tail[:0], w.tail[over:]...)
	}
	if at < 0 {
		return -1
	}
	return start + int64(at)
}

// WAVHeader returns where in b the header of a WAV file begins; -1: nowhere.
func WAVHeader(b []byte) int {
	for from := 0; ; {
		i := bytes.Index(b[from:], []byte("WAVE"))
		if i < 0 {
			return -1
		}
		i += from
		if riff := i - 8; riff >= 0 && i+8 <= len(b) && Printable(b[i+4:i+8]) &&
			slices.Contains([]string{"RIFF", "RF64"}, string(b[riff:riff+4])) {
			return riff
		}
		from = i + 1
	}
}

// Before returns how many bytes come before the header of a WAV or Ogg file, and how
// that begins, if there are only a few of them; 0: no file begins there.
func Before(head []byte) (n int, magic string) {
	const most = 64
	b := head[:min(len(head), most+WAVHeaderSize)]
	if at := WAVHeader(b); at > 0 {
		return at, string(b[at : at+4])
	}
	if at := bytes.Index(b, []byte("OggS\x00\x02")); at > 0 {
		return at, "OggS"
	}
	return 0, ""
}
