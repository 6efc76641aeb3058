package terminal

import (
	"bytes"
	"testing"
	"time"
)

func TestTextFromOutsideCannotSteerATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"a\x1b[31mb":       "a [31mb",
		"a\u009b31mb":      "a 31mb",
		"a\tb\r\nc":        "a b  c",
		"left\u202eright":  "left right",
		"zero\u200bwidth":  "zero width",
		"👩\u200d🚀 é ∀":     "👩\u200d🚀 é ∀",
		"line\u2028broken": "line broken",
	} {
		if got := Plain(in); got != want {
			t.Errorf("%q: %q instead of %q", in, got, want)
		}
	}
	if got := PlainLines("a\x1b\nb\r\nc"); got != "a \nb \nc" {
		t.Errorf("%q", got)
	}
}

// A character may come in two writes.
func TestAWriterEscapesWhatSteersATerminal(t *testing.T) {
	const in, want = "{\"é\": \"\u009b\u202e\U000e0001\"}\n", "{\"é\": \"\\u009b\\u202e\\udb40\\udc01\"}\n"
	for cut := range len(in) {
		var b bytes.Buffer
		w := NewWriter(&b)
		for _, part := range []string{in[:cut], in[cut:]} {
			if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
				t.Errorf("%q: %d %v", part, n, err)
			}
		}
		if b.String() != want {
			t.Errorf("cut at %d: %q", cut, b.String())
		}
		if w.Raw() != &b || Is(w) {
			t.Error("not the buffer")
		}
	}
}

func TestATableIsAlignedAndItsCellsArePlain(t *testing.T) {
	var b bytes.Buffer
	table := NewTable(&b, "NAME", "N", "WHY")
	table.Row("long name", 1, "x")
	table.Row("a\tb", 20, "c\x1bd")
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	if want := "NAME       N   WHY\nlong name  1   x\na b        20  c d\n"; b.String() != want {
		t.Errorf("%q", b.String())
	}
}

func TestNumbersAndTimesAreShort(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for got, want := range map[string]string{
		Count(0, "job"): "0 jobs", Count(1, "job"): "1 job",
		Short("äöü", 3): "äöü", Short("äöüß", 3): "äö…",
		OrDash("x"): "x", OrDash(""): "-",
		Size(1023): "1023 B", Size(1536): "1.5 KiB", Size(1 << 52): "4096.0 TiB",
		Roughly(-time.Hour): "0s", Roughly(119 * time.Second): "119s", Roughly(2 * time.Minute): "2m",
		Roughly(3 * time.Hour): "3h", Roughly(50 * time.Hour): "2d",
		When(now, now.Add(-time.Minute)): "2026-01-02T03:03:05Z (60s ago)",
	} {
		if got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
	if Ago(now, time.Time{}) != "-" || When(now, time.Time{}) != "" {
		t.Error("a time that is not known")
	}
	if got := Red.Mark("x"); got != "\x1b[31mx\x1b[0m" {
		t.Errorf("%q", got)
	}
}
