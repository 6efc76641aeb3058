package terminal

import (
	"cmp"
	"fmt"
	"time"
)

// Count is a number of things: "1 job", "2 jobs".
func Count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// Short cuts a text to n characters, not bytes: it is for columns of a screen.
// errors.Cut is for bytes.
func Short(text string, n int) string {
	runes := []rune(text)
	if len(runes) <= n {
		return text
	}
	return string(runes[:n-1]) + "…"
}

// OrDash returns text, or "-" if it is empty.
func OrDash(text string) string { return cmp.Or(text, "-") }

// Ago is how long before now a time is: "12s", "3m", "5h", "4d"; "-" if the time
// is not known.
func Ago(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return Roughly(now.Sub(t))
}

// When is a time and how long ago that is, "" if the time is not known.
func When(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s (%s ago)", t.UTC().Format(time.RFC3339), Ago(now, t))
}

// Roughly is a duration in its largest unit.
func Roughly(d time.Duration) string {
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

// Size is a number of bytes: "512 B", "1.5 MiB".
func Size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	size, unit := float64(n), 0
	for size >= 1024 && unit < len(units)-1 {
		size, unit = size/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", size, units[unit])
}
