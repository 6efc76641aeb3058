package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// printJSON writes one value as indented JSON.
func (c *cli) printJSON(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printLine writes one value as JSON on a line.
func (c *cli) printLine(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// array writes a JSON array value by value, so that a long one needs no memory.
type array struct {
	w     io.Writer
	given int
}

func (a *array) add(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	before := ",\n  "
	if a.given == 0 {
		before = "[\n  "
	}
	a.given++
	_, err = fmt.Fprintf(a.w, "%s%s", before, data)
	return err
}

// end closes the array, also after an error in the midst: what was written
// stays valid JSON.
func (a *array) end() error {
	text := "\n]\n"
	if a.given == 0 {
		text = "[]\n"
	}
	_, err := io.WriteString(a.w, text)
	return err
}

// table writes rows in columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, head ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(toAny(head)...)
	}
	return t
}

func toAny(texts []string) []any {
	out := make([]any, len(texts))
	for i, t := range texts {
		out[i] = t
	}
	return out
}

func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = plain(fmt.Sprint(cell))
	}
	// The writer keeps everything until end, which has the error.
	_, _ = fmt.Fprintln(t.w, strings.TrimRight(strings.Join(texts, "\t"), "\t"))
}

func (t *table) end() error { return t.w.Flush() }

// count is a number of things: "1 job", "2 jobs".
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// short cuts a text to n characters, not bytes: it is for columns of a screen.
// errors.Cut is for bytes.
func short(text string, n int) string {
	runes := []rune(text)
	if len(runes) <= n {
		return text
	}
	return string(runes[:n-1]) + "…"
}

// orDash returns text, or "-" if it is empty.
func orDash(text string) string { return cmp.Or(text, "-") }

// ago is how long before now a time is, for people: "12s", "3m", "5h", "4d".
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return roughly(now.Sub(t))
}

func roughly(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Second:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// Colours, used on a terminal only.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
)

// colour marks text where a person looks at w and wants colours.
func (c *cli) colour(w io.Writer, code, text string) string {
	if !c.coloured(w) {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// coloured reports whether what is written to w has colours.
func (c *cli) coloured(w io.Writer) bool {
	return c.colours || isTerminal(w) && c.env("NO_COLOR") == "" && c.env("TERM") != "dumb"
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

// encode is JSON with <, > and & as they are. v is something that can be encoded.
func encode(v any) json.RawMessage {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return json.RawMessage(`null`)
	}
	return bytes.TrimSpace(b.Bytes())
}
