package simulator

import (
	"strconv"
	"strings"
	"time"
)

// behaviour is what an avatar ID selects. The zero value is a session that works.
type behaviour struct {
	fault *fault // nil: none
	times int    // sessions that the fault hits; 0: each

	// after is the number of frames of a session before a runtime fault; 0 means
	// at the first speech. withhold keeps an utterance from ending before the
	// fault.
	after    int
	withhold bool
	cut      bool // the fault is a TCP connection that ends

	hang      bool // confirms, then sends nothing
	mute      bool // never confirms
	deaf      bool // as hang, and leaves pings unanswered
	egressEnd bool // sends envelopes without data in egress
	slow      time.Duration
}

// parseAvatar parses an avatar ID. It returns false if the backend has no such
// avatar. Anything after a further dash only makes IDs differ.
func parseAvatar(id string) (behaviour, bool) {
	words := strings.Split(id, "-")
	switch words[0] {
	case "hang":
		return behaviour{hang: true}, true
	case "mute":
		return behaviour{mute: true}, true
	case "deaf":
		return behaviour{hang: true, deaf: true}, true
	case "fail":
		return parseFail(words[1:])
	case "flaky":
		return parseFlaky(words[1:])
	case "slow":
		n, ok := number(words, 1)
		return behaviour{slow: time.Duration(n) * time.Millisecond}, ok
	case "drop":
		return parseDrop(words[1:])
	case "limit":
		n, ok := number(words, 1)
		f, _, err := parseFault([]string{"sessionDurationExceeded"})
		return behaviour{fault: &f, after: n}, ok && err == nil
	case "egress":
		return behaviour{egressEnd: true}, len(words) > 1 && strings.HasPrefix(words[1], "end")
	}
	return behaviour{}, strings.HasPrefix(id, "ok")
}

func parseFail(words []string) (behaviour, bool) {
	f, _, err := parseFault(words)
	if err != nil {
		return behaviour{}, false
	}
	return failing(f), true
}

func parseFlaky(words []string) (behaviour, bool) {
	f, rest, err := parseFault(words)
	if err != nil {
		return behaviour{}, false
	}
	n, ok := number(rest, 0)
	b := failing(f)
	b.times = n
	return b, ok && n > 0
}

func parseDrop(words []string) (behaviour, bool) {
	b := behaviour{fault: &fault{name: "drop", phase: phaseRuntime}, cut: true}
	if len(words) > 0 && words[0] == "once" {
		b.times = 1
		words = words[1:]
	}
	n, ok := number(words, 0)
	b.after = n
	return b, ok
}

// failing returns the behaviour of a session that f ends; a runtime fault comes
// in the middle of the first utterance.
func failing(f fault) behaviour {
	return behaviour{fault: &f, after: 1, withhold: true}
}

// number parses words[i], at most six digits.
func number(words []string, i int) (int, bool) {
	if i >= len(words) || len(words[i]) > 6 {
		return 0, false
	}
	n, err := strconv.Atoi(words[i])
	return n, err == nil && n >= 0
}
