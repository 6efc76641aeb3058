package main

import (
	"bufio"
	"bytes"
	"context"
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

// plain is text from outside as it may stand in a line for people: without
// control characters.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || steers(r) {
			return ' '
		}
		return r
	}, text)
}

// plainLines is plain for text of several lines.
func plainLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = plain(lines[i])
	}
	return strings.Join(lines, "\n")
}

// screenWriter is the program's stdout or stderr. Whatever a command writes
// there, characters that steer a terminal come out as \u009b, which means the
// same in JSON. Control characters of ASCII pass: JSON escapes them, and plain
// removes them from what others wrote.
type screenWriter struct {
	to io.Writer

	mu      sync.Mutex
	partial []byte // the beginning of a character whose rest is in the next write
}

func (s *screenWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.partial) == 0 && isASCII(p) {
		return s.to.Write(p)
	}
	text := append(s.partial, p...)
	s.partial = nil
	var out bytes.Buffer
	for len(text) > 0 {
		if !utf8.FullRune(text) {
			s.partial = bytes.Clone(text)
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
	if _, err := s.to.Write(out.Bytes()); err != nil {
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

// raw is where the bytes of a job go unchanged, unless stdout is a terminal.
func (c *cli) raw() io.Writer {
	if s, ok := c.stdout.(*screenWriter); ok && !isTerminal(s) {
		return s.to
	}
	return c.stdout
}

// isTerminal reports whether a person reads or types there.
func isTerminal(stream any) bool {
	if s, ok := stream.(*screenWriter); ok {
		stream = s.to
	}
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// interactive reports whether a person can be asked.
func (c *cli) interactive() bool { return isTerminal(c.stdin) && isTerminal(c.stderr) }

// ask puts a question to the person at the terminal; without an answer it returns
// false.
func (c *cli) ask(ctx context.Context, question string) (yes bool, err error) {
	if _, err := fmt.Fprintf(c.stderr, "%s [y/N] ", question); err != nil {
		return false, err
	}
	type line struct {
		text string
		err  error
	}
	typed := make(chan line, 1)
	go func() {
		text, err := bufio.NewReader(c.stdin).ReadString('\n')
		typed <- line{text, err}
	}()
	select {
	case l := <-typed:
		if l.err != nil && l.err != io.EOF {
			return false, l.err
		}
		answer := strings.ToLower(strings.TrimSpace(l.text))
		return answer == "y" || answer == "yes", nil
	case <-ctx.Done(): // the read ends with the process
		return false, ctx.Err()
	}
}
