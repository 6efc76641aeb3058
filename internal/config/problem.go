package config

import (
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing wrong with the configuration. Message never quotes a
// secret.
type Problem struct {
	Source  string // file name, environment variable or "flag"; "" where nothing set the key
	Line    int    // in a file, from 1; 0 elsewhere
	Key     string // key path; "" where the problem is not with one key
	Message string
}

// String is source:line: key: message, leaving out what is not known.
func (p Problem) String() string {
	var parts []string
	switch {
	case p.Source != "" && p.Line > 0:
		parts = append(parts, fmt.Sprintf("%s:%d", p.Source, p.Line))
	case p.Source != "":
		parts = append(parts, p.Source)
	}
	if p.Key != "" {
		parts = append(parts, p.Key)
	}
	return strings.Join(append(parts, p.Message), ": ")
}

// Error is a configuration that can't be used, with everything that is wrong
// with it.
type Error struct{ Problems []Problem }

// Error lists the problems, one a line.
func (e *Error) Error() string {
	if len(e.Problems) == 1 {
		return "configuration: " + e.Problems[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "configuration: %d problems", len(e.Problems))
	for _, p := range e.Problems {
		b.WriteString("\n  " + p.String())
	}
	return b.String()
}

// asError sorts problems in the order in which a reader corrects them: lines of
// the file first.
func asError(problems []Problem) error {
	if len(problems) == 0 {
		return nil
	}
	slices.SortStableFunc(problems, func(a, b Problem) int {
		switch {
		case (a.Line > 0) != (b.Line > 0):
			return b.Line - a.Line
		case a.Line != b.Line:
			return a.Line - b.Line
		default:
			return strings.Compare(a.Key, b.Key)
		}
	})
	return &Error{Problems: problems}
}

// Warning is a probable mistake that does not stop the worker.
type Warning struct {
	Name    string // the environment variable, or the key
	Message string
}

func (w Warning) String() string { return w.Name + ": " + w.Message }

// origin is where a key was set.
type origin struct {
	source string
	line   int
}

// Source says what set a key: "config.yaml:12", an environment variable's
// name, "flag", or "" where the key is at its default.
func (c *Config) Source(key string) string {
	o := c.origins[key]
	if o.line > 0 {
		return fmt.Sprintf("%s:%d", o.source, o.line)
	}
	return o.source
}
