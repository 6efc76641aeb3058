package simulator

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Phases of a session, with the names in the worker's error events.
const (
	phaseToken     = "session_token"
	phaseConnect   = "websocket_connect"
	phaseHandshake = "websocket_handshake"
	phaseRuntime   = "websocket_runtime"
)

// kind is how a fault shows.
type kind int

const (
	kindAnswer  kind = iota // an HTTP answer, or a ServerError once the socket is open
	kindDrop                // the TCP connection is dropped before an answer
	kindClose               // the socket is closed with closeCode
	kindGarbage             // bytes that can't be decoded
)

// fault is one failure as the backend reports it. How clients classify it depends
// on its texts and numbers: docs/protocol.md, section 9.
type fault struct {
	name  string
	phase string // where the backend gives it, unless a test asks for another
	also  []string
	kind  kind

	status     int // HTTP status before the socket is open
	retryAfter time.Duration
	title      string // token calls only
	text       string
	tokenText  string // instead of text in token calls
	jsonCode   string // token calls only
	serverCode int32  // of a ServerError
	closeCode  int    // after a ServerError; 0 is 1011
}

var everyPhase = []string{phaseToken, phaseConnect, phaseHandshake, phaseRuntime}

// faults lists the backend's nineteen codes, each with a reply that clients can
// classify only as that code.
//
// Neither "UNAUTHENTICATED" nor "unauthorized" may appear in the text for a bad
// API key: clients classify both as a bad egress token.
func faults() []fault {
	return []fault{
		{name: "connectionFailed", phase: phaseConnect, also: []string{phaseToken}, kind: kindDrop},
		{name: "connectionClosed", phase: phaseRuntime, also: []string{phaseHandshake}, kind: kindClose,
			closeCode: 1011, text: "internal error"},
		{name: "idleTimeout", phase: phaseRuntime, also: everyPhase, status: 400, title: "Idle",
			text: "no audio input for 60s"},
		{name: "egressUnavailable", phase: phaseHandshake, also: everyPhase, status: 500, title: "Egress",
			text: "failed to create egress connection: room service timed out", serverCode: 14},
		{name: "upstreamError", phase: phaseRuntime, also: everyPhase, status: 502, title: "Upstream",
			text: "driven server returned non-200 status code: 503", serverCode: 13},
		{name: "serverError", phase: phaseRuntime, also: everyPhase, status: 500, title: "Internal",
			text: "internal error", serverCode: 13},
		{name: "protocolError", phase: phaseRuntime, also: []string{phaseToken, phaseHandshake}, kind: kindGarbage},
		{name: "unknown", phase: phaseConnect, also: []string{phaseToken}, status: 302, title: "Moved",
			text: "request could not be processed"},
		{name: "sessionTokenExpired", phase: phaseConnect, also: everyPhase, status: 401, //nolint:gosec // sentences about keys, not keys
			title: "Invalid API key", jsonCode: "INVALID_API_KEY", tokenText: "the API key is not known or was revoked",
			text: "Session token expired"},
		{name: "sessionTokenInvalid", phase: phaseConnect, also: everyPhase, status: 400, title: "Token",
			text: "Invalid session token"},
		{name: "appIDMismatch", phase: phaseConnect, also: everyPhase, status: 403, title: "App",
			text: "app id mismatch: the token was made for another app"},
		{name: "appIDUnrecognized", phase: phaseConnect, also: everyPhase, status: 404, title: "App",
			text: "app id unrecognized"},
		{name: "avatarNotFound", phase: phaseConnect, also: everyPhase, status: 404, title: "Avatar",
			text: "Avatar not found"},
		{name: "unsupportedSampleRate", phase: phaseHandshake, also: everyPhase, status: 400, title: "Audio",
			text: "unsupported sample rate"},
		{name: "invalidEgressConfig", phase: phaseHandshake, also: everyPhase, status: 400, title: "Egress",
			text: "could not connect to the room: unauthorized: invalid token", serverCode: 16},
		{name: "invalidRequest", phase: phaseHandshake, also: everyPhase, status: 422, title: "Invalid",
			jsonCode: "INVALID_ARGUMENT", text: "extra_params: value not allowed", serverCode: 3},
		{name: "billingRequired", phase: phaseConnect, also: everyPhase, status: 402, title: "Billing",
			text: "session denied: billing required"},
		{name: "creditsExhausted", phase: phaseConnect, also: everyPhase, status: 402, title: "Billing",
			text: "session denied: credits exhausted", serverCode: 4001, closeCode: 4001},
		{name: "sessionDurationExceeded", phase: phaseRuntime, also: everyPhase, status: 403, title: "Session",
			text: "session time limit reached", serverCode: 4002, closeCode: 4002},
	}
}

// parseFault parses the name of a fault at the start of words: a code, or
// "status" with a number and optionally the seconds of a Retry-After. It returns
// the unused words.
func parseFault(words []string) (fault, []string, error) {
	if len(words) == 0 || words[0] == "" {
		return fault{}, nil, fmt.Errorf("no fault named")
	}
	if words[0] == "status" {
		return parseStatus(words[1:])
	}
	for _, f := range faults() {
		if f.name == words[0] {
			return f, words[1:], nil
		}
	}
	return fault{}, nil, fmt.Errorf("%q is not a code of the backend (one of %s) or status-<n>",
		words[0], strings.Join(Codes(), ", "))
}

func parseStatus(words []string) (fault, []string, error) {
	if len(words) == 0 {
		return fault{}, nil, fmt.Errorf("status without a number: status-<n> or status-<n>-<seconds>")
	}
	n, err := strconv.Atoi(words[0])
	if err != nil || n < 300 || n > 599 {
		return fault{}, nil, fmt.Errorf("status-%s: want a number from 300 to 599", words[0])
	}
	f := fault{
		name: "status-" + words[0], phase: phaseConnect, also: []string{phaseToken}, status: n,
		title: "Simulated", text: fmt.Sprintf("simulated answer %d", n),
	}
	words = words[1:]
	if len(words) > 0 {
		if s, err := strconv.Atoi(words[0]); err == nil && s >= 0 && s <= 86400 {
			f.name += "-" + words[0]
			f.retryAfter = time.Duration(s) * time.Second
			words = words[1:]
		}
	}
	return f, words, nil
}

// Codes lists the backend's codes, in the order of the table.
func Codes() []string {
	var names []string
	for _, f := range faults() {
		names = append(names, f.name)
	}
	return names
}

// in returns the fault as it shows in another phase.
func (f fault) in(phase string) (fault, error) {
	if phase != f.phase && !slices.Contains(f.also, phase) {
		return f, fmt.Errorf("%s cannot be given in phase %q (its phase is %s; also possible: %s)",
			f.name, phase, f.phase, strings.Join(f.also, ", "))
	}
	f.phase = phase
	return f, nil
}

// writeToken writes the fault as the reply to a token call.
func (f fault) writeToken(w http.ResponseWriter) {
	switch f.kind {
	case kindDrop:
		dropConnection()
	case kindGarbage:
		writeJSON(w, http.StatusOK, map[string]any{"ok": true})
	default:
		text := f.text
		if f.tokenText != "" {
			text = f.tokenText
		}
		f.setRetryAfter(w)
		writeTokenError(w, f.status, f.jsonCode, f.title, text)
	}
}

// writeUpgrade writes the fault as the reply to an upgrade.
func (f fault) writeUpgrade(w http.ResponseWriter) {
	if f.kind == kindDrop {
		dropConnection()
		return
	}
	f.setRetryAfter(w)
	writeUpgradeError(w, f.status, f.text)
}

func (f fault) setRetryAfter(w http.ResponseWriter) {
	if f.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.retryAfter/time.Second)))
	}
}

// dropConnection ends the TCP connection of a request without a reply.
func dropConnection() {
	// This is how a net/http handler cuts its connection; it logs nothing.
	panic(http.ErrAbortHandler)
}
