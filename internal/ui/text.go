package ui

import (
	"cmp"
	"fmt"
	"html/template"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
	"avatarworker/internal/status"
)

func (p *pages) funcs() template.FuncMap {
	return template.FuncMap{
		"static":   func(name string) string { return "/static/" + name + "?v=" + p.static[name].hash },
		"say":      say,
		"sentence": sentence,
		"ago":      ago,
		"until":    until,
		"millis":   func(ms int64) string { return precise(time.Duration(ms) * time.Millisecond) },
		"span":     precise,
		"clock":    func(t time.Time) string { return t.UTC().Format("15:04:05") },
		"when":     func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
		"rfc3339":  func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"paused":   paused,
		"size":     sizeText,
		"count":    count,
		"percent":  func(f float64) string { return fmt.Sprintf("%.0f %%", 100*f) },
		"state":    stateName,
		"labels":   labelList,
		"link":     link,
		"list":     func(values ...any) []any { return values },
		"add":      func(a, b int) int { return a + b },
		"region":   func(text string) string { return cmp.Or(text, "all regions") },
		"explain":  errors.Explain,
		"join":     strings.Join,
		"words":    func(text any) string { return strings.ReplaceAll(fmt.Sprint(text), "_", " ") },
		"validjob": validJob,
		"topRows":  topRows,
		"workers":  newWorkerTable,
		"cause":    func(e dlq.Entry) string { return status.Cause(e.Message, e.ServerTitle, e.ServerDetail) },
	}
}

// workerTable is a table of workers.
type workerTable struct {
	View  view
	At    time.Time
	Label string
	List  []status.Worker
}

func newWorkerTable(v view, at time.Time, label string, list []status.Worker) workerTable {
	return workerTable{v, at, label, list}
}

// topRows are the rows of a sum that the overview has room for.
func topRows(rows []cost.Row) []cost.Row { return rows[:min(len(rows), 10)] }

// say is a text from outside without secrets in it.
func say(text any) string { return errors.RedactText(fmt.Sprint(text)) }

// link is a path with a query of names and values; empty values are left out, and
// secrets in them are hidden.
func link(path string, pairs ...any) string {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if value := say(pairs[i+1]); value != "" {
			q.Add(fmt.Sprint(pairs[i]), value)
		}
	}
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

// ago is how long before now a time is, for people; "–": it is not known.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return roughly(now.Sub(t))
}

// until is how long after now a time is.
func until(now, t time.Time) string {
	if !t.After(now) {
		return "now"
	}
	return roughly(t.Sub(now))
}

// precise is a length of time that may be short.
func precise(d time.Duration) string {
	if d > 0 && d < 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return roughly(d)
}

func roughly(d time.Duration) string {
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

// paused says until when a queue is paused.
func paused(now, t time.Time) string {
	if t.Sub(now) > operate.Forever/2 {
		return "until it is resumed"
	}
	return "for " + until(now, t) + ", until " + t.UTC().Format("15:04:05")
}

// sizeText is a number of bytes for people.
func sizeText(size any) string {
	n := 0.0
	switch v := size.(type) {
	case int64:
		n = float64(v)
	case uint64:
		n = float64(v)
	case int:
		n = float64(v)
	}
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	unit := 0
	for n >= 1024 && unit < len(units)-1 {
		n, unit = n/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%.0f B", n)
	}
	return fmt.Sprintf("%.1f %s", n, units[unit])
}

// count is a number of things: "1 job", "2 jobs", "12,345 jobs"; of nothing named,
// the number.
func count(n any, thing string) string {
	text := grouped(fmt.Sprint(n))
	switch {
	case thing == "":
		return text
	case text == "1":
		return "1 " + thing
	case strings.HasSuffix(thing, "sh"):
		return text + " " + thing + "es"
	}
	return text + " " + thing + "s"
}

// grouped is a number with a comma after each three digits.
func grouped(digits string) string {
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// stateName is a state as people read it.
func stateName(s lifecycle.State) string { return strings.ReplaceAll(string(s), "_", " ") }

// labelList are labels as KEY=VALUE, in order.
func labelList(labels map[string]string) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		list = append(list, name+"="+labels[name])
	}
	return list
}
