package jobspec

import (
	"bytes"
	"encoding/json"
	"regexp"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// rfc3339 is stricter than time.Parse, which accepts an hour of one digit, a
// comma for the dot, and the offsets +24:00 and +01:60. Its group is the fraction
// of the second, including the dot.
var rfc3339 = regexp.MustCompile(`^` + rfc3339Text + `$`)

const rfc3339Text = `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])`

func (p *problems) timestamp(raw json.RawMessage, path string) {
	const want = `want an RFC 3339 time such as "2026-01-31T12:00:00Z"`
	text, ok := jsonString(raw)
	if !ok {
		p.add(path, want+", got %s", jsonKind(raw))
		return
	}
	parts := rfc3339.FindStringSubmatch(text)
	at, err := time.Parse(time.RFC3339Nano, text)
	switch {
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
