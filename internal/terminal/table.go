package terminal

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Table writes rows in columns.
type Table struct{ w *tabwriter.Writer }

// NewTable returns a table with a head, or without one.
func NewTable(w io.Writer, head ...string) *Table {
	t := &Table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(head)
	}
	return t
}

// Row adds a row. Its cells may come from outside.
func (t *Table) Row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = Plain(fmt.Sprint(cell))
	}
	t.row(texts)
}

func (t *Table) row(texts []string) {
	// The writer keeps everything until Flush, which has the error.
	_, _ = fmt.Fprintln(t.w, strings.TrimRight(strings.Join(texts, "\t"), "\t"))
}

// Flush writes the rows.
func (t *Table) Flush() error { return t.w.Flush() }
