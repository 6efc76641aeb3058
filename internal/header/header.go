// Package header reads headers that publishers set on NATS messages. Header names
// are case-sensitive in NATS and clients spell them differently; they also write
// booleans in several ways. The package must not know what a header means.
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
	value, _ := lookup(h, name)
	return value
}

func lookup(h nats.Header, name string) (value string, found bool) {
	if values := h[name]; len(values) > 0 {
		return values[0], true
	}
	var spelled string
	for other, values := range h {
		if len(values) > 0 && strings.EqualFold(other, name) && (!found || other < spelled) {
			spelled, value, found = other, values[0], true
		}
	}
	return value, found
}

// Flag returns a boolean header: true, yes, on, 1, t, or false, no, off, 0, f, in
// any case. It returns false without the header. For any other value the error
// names the header and the values that are allowed.
func Flag(h nats.Header, name string) (bool, error) {
	text, found := lookup(h, name)
	if !found {
		return false, nil
	}
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
