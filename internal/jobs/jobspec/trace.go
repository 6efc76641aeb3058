package jobspec

import (
	"strings"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/header"
)

// Names of the W3C trace context headers. They are lower case in NATS, where
// header names are case-sensitive.
const (
	HeaderTraceParent = "traceparent"
	HeaderTraceState  = "tracestate"
)

// TraceCarrier lets an OpenTelemetry propagator read and write NATS headers.
// propagation.HeaderCarrier would write "Traceparent", which other clients would
// not find.
type TraceCarrier nats.Header

// Get returns the first value of key, whatever its case.
func (c TraceCarrier) Get(key string) string { return HeaderValue(nats.Header(c), key) }

// Set replaces the value of key, kept in lower case.
func (c TraceCarrier) Set(key, value string) { c[strings.ToLower(key)] = []string{value} }

// Keys lists the header names.
func (c TraceCarrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for key := range c {
		keys = append(keys, key)
	}
	return keys
}

// HeaderValue returns the first value of key, whatever the case of its name.
func HeaderValue(h nats.Header, key string) string { return header.Value(h, key) }

// TraceContext returns the message's trace context, or nothing if traceparent is
// malformed: W3C says to ignore such a header.
func TraceContext(h nats.Header) (parent, state string) {
	parent = strings.TrimSpace(HeaderValue(h, HeaderTraceParent))
	if !validTraceParent(parent) {
		return "", ""
	}
	state = strings.TrimSpace(HeaderValue(h, HeaderTraceState))
	if len(state) > 512 || strings.ContainsFunc(state, func(r rune) bool { return r < ' ' || r > '~' }) {
		state = ""
	}
	return parent, state
}

// validTraceParent checks version-traceid-parentid-flags, in lower-case hex.
func validTraceParent(s string) bool {
	parts := strings.Split(s, "-")
	if len(parts) < 4 || parts[0] == "ff" || (parts[0] == "00" && len(parts) != 4) {
		return false
	}
	for i, length := range []int{2, 32, 16, 2} {
		if len(parts[i]) != length || strings.Trim(parts[i], "0123456789abcdef") != "" {
			return false
		}
	}
	return len(s) <= 128 && strings.Trim(parts[1], "0") != "" && strings.Trim(parts[2], "0") != ""
}
