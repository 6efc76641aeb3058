// Package header reads headers that publishers set on NATS messages. Header names
// are case-sensitive in NATS and clients spell them differently; they also write
// booleans in several ways. The package owns which spellings count, and must not know
// what a header means.
package header

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
)

// Value returns the first value of name, or "" if there is none. The exact name
// wins over another case. Of several other spellings the first in alphabetical
// order is taken, so that every worker takes the same one.
func Value(h nats.Header, name string) string {
	if values := h[name]; len(values) > 0 {
		return values[0]
	}
	var spelled, value string
	for other, values := range h {
		if len(values) > 0 && strings.EqualFold(other, name) && (spelled == "" || other < spelled) {
			spelled, value = other, values[0]
		}
	}
	return value
}

// Flag returns a boolean header: true, yes, on, 1, t, or false, no, off, 0, f, in
// any case. It returns false without the header. For any other value, and where the
// header is given several times with different values, the error names the header
// and what is allowed.
func Flag(h nats.Header, name string) (bool, error) {
	on, found := false, false
	for spelled, values := range h {
		if !strings.EqualFold(spelled, name) {
			continue
		}
		for _, text := range values {
			value, err := flag(name, text)
			switch {
			case err != nil:
				return false, err
			case found && value != on:
				return false, fmt.Errorf("header %s: given as true and as false; want one of them", name)
			}
			on, found = value, true
		}
	}
	return on, nil
}

func flag(name, text string) (bool, error) {
	switch word := strings.ToLower(strings.TrimSpace(text)); word {
	case "yes", "on":
		return true, nil
	case "no", "off":
		return false, nil
	default:
		on, err := strconv.ParseBool(word)
		if err != nil {
			return false, fmt.Errorf("header %s: want true or false, got %.40q", name, text)
		}
		return on, nil
	}
}
