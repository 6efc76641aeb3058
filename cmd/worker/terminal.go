package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"avatarworker/internal/terminal"
)

// raw is where the bytes of a job go unchanged, unless stdout is a terminal.
func (c *cli) raw() io.Writer {
	if w, ok := c.stdout.(*terminal.Writer); ok && !terminal.Is(w) {
		return w.Raw()
	}
	return c.stdout
}

// colour marks text where a person looks at w and wants colours.
func (c *cli) colour(w io.Writer, colour terminal.Colour, text string) string {
	if !c.coloured(w) {
		return text
	}
	return colour.Mark(text)
}

// coloured reports whether what is written to w has colours.
func (c *cli) coloured(w io.Writer) bool {
	return c.colours || terminal.Is(w) && c.env("NO_COLOR") == "" && c.env("TERM") != "dumb"
}

// env is the value of an environment variable.
func (c *cli) env(name string) string {
	for _, pair := range c.environ {
		if value, ok := strings.CutPrefix(pair, name+"="); ok {
			return value
		}
	}
	return ""
}

// interactive reports whether a person can be asked.
func (c *cli) interactive() bool { return terminal.Is(c.stdin) && terminal.Is(c.stderr) }

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
