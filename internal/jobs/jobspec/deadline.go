package jobspec

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// rfc3339 is stricter than time.Parse, which accepts an hour of one digit, a
// comma for the dot, and the offsets +24:00 and +01:60. Its group is the fraction
// of the second, including the dot.
var rfc3339 = regexp.MustCompile(`^` + rfc3339Text + `$`)

const rfc3339Text = `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])`

// rfc3339Shape matches also times that no clock shows. Its groups are the second and
// the offset.
var rfc3339Shape = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:([0-9]{2})(?:\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})$`)

// upperTime returns an RFC 3339 time with the capital T and Z that time.Parse and
// protojson want. Both may be small letters (section 5.6).
func upperTime(text string) string { return strings.ToUpper(text) }

func (p *problems) timestamp(raw json.RawMessage, path string) {
	const want = `want an RFC 3339 time such as "2026-01-31T12:00:00Z"`
	text, ok := jsonString(raw)
	if !ok {
		p.add(path, want+", got %s", jsonKind(raw))
		return
	}
	upper := upperTime(text)
	parts := rfc3339.FindStringSubmatch(upper)
	at, err := time.Parse(time.RFC3339Nano, upper)
	shape := rfc3339Shape.FindStringSubmatch(upper)
	switch {
	case shape != nil && shape[1] == "60":
		p.add(path, "a leap second (:60) is not taken: give the second before or after it, got %s", quote(text))
	case shape != nil && parts == nil:
		p.add(path, "the offset %s is none: want -23:59 to +23:59, with minutes up to 59, got %s", shape[2], quote(text))
	case err != nil || parts == nil:
		p.add(path, want+", got %s", quote(text))
	case len(parts[1]) > len(".999999999"):
		p.add(path, "want at most nine digits after the dot, got %s", quote(text))
	case !timestamppb.New(at).IsValid():
		p.add(path, "%s, got %s", wantYears, quote(text))
	}
}

// deadlineMember matches the usual form of a deadline in a job.
var deadlineMember = regexp.MustCompile(`^"deadline"[ \t\r\n]*:[ \t\r\n]*"` + rfc3339Text + `"`)

// plainDeadline reports whether each "deadline" in data, which protojson has
// accepted, is followed by an RFC 3339 time. It saves most jobs a second reading;
// if it returns false, the deadline may still be right.
func plainDeadline(data []byte) bool {
	plain := false
	for {
		at := bytes.Index(data, []byte(`"deadline"`))
		if at < 0 {
			return plain
		}
		if plain = deadlineMember.Match(data[at:]); !plain {
			return false
		}
		data = data[at+1:]
	}
}
