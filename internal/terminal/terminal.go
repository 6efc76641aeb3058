// Package terminal writes for people: text without the characters that steer a
// terminal, tables, and times and sizes in short. It owns how these look, and must not
// know jobs or commands. JSON is not its concern.
package terminal

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
)

// Is reports whether a person reads or types at the stream.
func Is(stream any) bool {
	if w, ok := stream.(*Writer); ok {
		stream = w.to
	}
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// steers reports whether a terminal obeys the character, shows what follows it in
// another order, or shows nothing, so that two names look alike: C1 controls, which
// are CSI and OSC in one character, Unicode's line and direction controls, and its
// other invisible ones. The two joiners belong to ordinary words and emoji.
func steers(r rune) bool {
	if r == '\u200c' || r == '\u200d' {
		return false
	}
	return r >= 0x80 && r <= 0x9f || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Cf, r)
}

// Plain is text from outside for a line that people read: without control
// characters.
func Plain(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || steers(r) {
			return ' '
		}
		return r
	}, text)
}

// PlainLines is Plain for text of several lines.
func PlainLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = Plain(lines[i])
	}
	return strings.Join(lines, "\n")
}

// Writer is the program's stdout or stderr. Whatever a command writes there,
// characters that steer a terminal come out as \u009b, which means the same in
// JSON. Control characters of ASCII pass: JSON escapes them, and Plain removes
// them from text of others.
type Writer struct {
	to io.Writer

	mu      sync.Mutex
	partial []byte // the beginning of a character whose rest is in the next write
}

// NewWriter returns a Writer to a stream.
func NewWriter(to io.Writer) *Writer { return &Writer{to: to} }

// Raw is the stream itself, for bytes that must not change.
func (w *Writer) Raw() io.Writer { return w.to }

func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.partial) == 0 && isASCII(p) {
		return w.to.Write(p)
	}
	text := append(w.partial, p...)
	w.partial = nil
	var out bytes.Buffer
	for len(text) > 0 {
		if !utf8.FullRune(text) {
			w.partial = bytes.Clone(text)
			break
		}
		r, size := utf8.DecodeRune(text)
		if steers(r) {
			for _, unit := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(&out, `\u%04x`, unit)
			}
		} else {
			out.WriteRune(r) // a byte that is not UTF-8 becomes U+FFFD: alone it may be a C1 control
		}
		text = text[size:]
	}
	if _, err := w.to.Write(out.Bytes()); err != nil {
		return 0, err
	}
	return len(p), nil
}

func isASCII(p []byte) bool {
	for _, b := range p {
		if b >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// Colour is how a text is marked on a terminal.
type Colour string

// The colours, as codes of the escape sequence.
const (
	Default Colour = "0"
	Bold    Colour = "1"
	Red     Colour = "31"
	Green   Colour = "32"
	Yellow  Colour = "33"
)

// Mark returns text in the colour.
func (c Colour) Mark(text string) string { return "\x1b[" + string(c) + "m" + text + "\x1b[0m" }
