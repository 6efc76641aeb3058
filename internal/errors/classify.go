package errors

import (
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// FromHTTP says what an answer is that refuses a session: of the console to a
// token request (PhaseToken) or of the ingress to an upgrade (PhaseConnect). A
// 200 in PhaseToken is judged as by ParseTokenAnswer. RetryAfter is taken from
// the header, which may be nil; RequestID from the body, else from the header
// X-Request-Id. The rules are docs/protocol.md, section 9.
func FromHTTP(phase Phase, status int, header http.Header, body []byte) *Error {
	if status == http.StatusProxyAuthRequired {
		return FromProxy(phase, "on the way", status, header)
	}
	text := strings.ToValidUTF8(string(body), "\uFFFD")
	payload, ok := parseJSON(text)
	var f serverFields
	if phase == PhaseToken {
		if status == http.StatusOK && !payload.reportsErrors() {
			return unusableToken(header)
		}
		if ok {
			f = payload.serverFields()
		}
		if status == http.StatusOK {
			status = payload.effectiveStatus(status)
		}
	} else {
		f = payload.fieldsOr(text, ok)
	}
	e := f.error(phase, status)
	e.HTTPStatus = status
	e.RetryAfter = retryAfter(header)
	e.RequestID = requestID(payload, header)
	e.Message = fmt.Sprintf("the backend answered %s with HTTP %d", asked(phase), status)
	if e.RequestID != "" {
		e.Message += " (request_id " + e.RequestID + ")"
	}
	if refusesKey(e) && phase == PhaseToken {
		e.Message += ": it refuses the worker's API key; check app.api_key, or api_key of the app under apps"
	}
	return e
}

// maxRequestID bounds a request's id, in bytes; it is repeated in every text.
const maxRequestID = 128

// requestID is the body's, else the header's, on one line.
func requestID(body payload, header http.Header) string {
	id := body.requestID()
	if id == "" {
		id = header.Get("X-Request-Id")
	}
	id = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(id, ""), func(r rune) bool {
		return !unicode.IsPrint(r)
	}), " ")
	if len(id) > maxRequestID {
		id = strings.ToValidUTF8(id[:maxRequestID], "")
	}
	return id
}

// FromProxy says that an HTTP proxy on the way answered in the backend's place:
// 407, or a refused CONNECT. It is connectionFailed. proxy is the proxy's URL;
// its user and password are not shown. HTTPStatus stays 0, for it is the
// backend's. RetryAfter is taken from the header, which may be nil.
func FromProxy(phase Phase, proxy string, status int, header http.Header) *Error {
	e := Newf(CodeConnectionFailed, phase, "can't reach the backend: the proxy %s answered %s with HTTP %d%s",
		RedactText(proxy), asked(phase), status, proxyRemedy(status))
	e.Proxy, e.RetryAfter = true, retryAfter(header)
	return e
}

func proxyRemedy(status int) string {
	switch status {
	case http.StatusProxyAuthRequired:
		return ": it wants a login: put user and password into the proxy's URL (HTTPS_PROXY, HTTP_PROXY), or correct them"
	case http.StatusForbidden, http.StatusMethodNotAllowed:
		return ": it does not allow the backend's address; allow it there, or add it to NO_PROXY"
	}
	return ""
}

// ParseTokenAnswer reads the console's answer to a token request. It gives the
// token, or what refused it: any status but 200, errors under HTTP 200
// (whose own status is then the effective one), or a 200 without a usable
// token (protocolError, no HTTP status). See docs/protocol.md, section 2.
func ParseTokenAnswer(status int, header http.Header, body []byte) (token string, err *Error) {
	if status == http.StatusOK {
		payload, _ := parseJSON(strings.ToValidUTF8(string(body), "\uFFFD"))
		if token := payload.sessionToken(); token != "" && !payload.reportsErrors() {
			return token, nil
		}
	}
	return "", FromHTTP(PhaseToken, status, header, body)
}

// FromServerError says what a ServerError message of the backend is. The caller
// adds its connection and request ids.
func FromServerError(phase Phase, code int32, message string) *Error {
	f := serverFields{code: strconv.Itoa(int(code)), detail: message}
	e := f.error(phase, 0)
	e.Message = "the backend reported error " + f.code
	return e
}

// FromClose says what a close frame is: connectionClosed, whatever its code;
// the reason is kept, and not judged.
func FromClose(phase Phase, code int, reason string) *Error {
	return &Error{
		Code: CodeConnectionClosed, Phase: phase, CloseCode: code, CloseReason: reason,
		Message: fmt.Sprintf("the backend closed the connection with code %d", code),
	}
}

// fromCutClose says that the connection ended and no close code is known:
// connectionClosed. A reason, if there is one, is kept.
func fromCutClose(phase Phase, reason string) *Error {
	e := Newf(CodeConnectionClosed, phase, "the connection ended without a close code")
	e.CloseReason = reason
	return e
}

// FromTransport says that the network failed before an answer: connectionFailed.
// A connection that was open and broke is FromCut's. FromTransport(nil) is nil.
func FromTransport(phase Phase, err error) *Error {
	if err == nil {
		return nil
	}
	return Wrap(CodeConnectionFailed, phase, err, "can't reach the backend")
}

// FromCut says that an open connection ended without a close frame, or answered
// no ping: connectionClosed. FromCut(nil) is nil.
func FromCut(phase Phase, err error) *Error {
	if err == nil {
		return nil
	}
	return Wrap(CodeConnectionClosed, phase, err, "the connection broke without a close frame")
}

// FromFrame says that a binary message is not an envelope, or not the one that is
// due. err says why, and may be nil.
func FromFrame(phase Phase, err error) *Error {
	return Wrap(CodeProtocolError, phase, err, "the backend sent a message that can't be understood")
}

// FromTextFrame says that a text message came where a binary one was due.
func FromTextFrame(phase Phase) *Error {
	return Newf(CodeProtocolError, phase, "the backend sent a text message where a binary one was due")
}

func unusableToken(header http.Header) *Error {
	e := Newf(CodeProtocolError, PhaseToken, "the console answered HTTP 200 without a usable sessionToken")
	e.RetryAfter = retryAfter(header)
	return e
}

func asked(phase Phase) string {
	switch phase {
	case PhaseToken:
		return "the request for a session token"
	case PhaseConnect:
		return "the WebSocket upgrade"
	}
	return "the request"
}

// error decides the code and carries the fields over.
func (f serverFields) error(phase Phase, status int) *Error {
	return &Error{
		Code: f.classify(phase, status), Phase: phase,
		ServerCode: f.code, ServerTitle: f.title, ServerDetail: f.detail,
	}
}

// classify is the order of docs/protocol.md, section 9: server code, text, HTTP
// status, phase.
func (f serverFields) classify(phase Phase, status int) Code {
	text := lower(strings.Join([]string{strip(f.code), strip(f.title), strip(f.detail)}, " | "))
	if code := byServerCode(f.code, text); code != "" {
		return code
	}
	if code := byText(text, status); code != "" {
		return code
	}
	if code := byStatus(phase, status); code != "" {
		return code
	}
	if phase == PhaseHandshake || phase == PhaseRuntime {
		return CodeServerError
	}
	return CodeUnknown
}

func byServerCode(code, text string) Code {
	switch code {
	case "3", "INVALID_ARGUMENT":
		if containsAny(text, "livekit", "agora", "egress") {
			return CodeInvalidEgressConfig
		}
		return CodeInvalidRequest
	case "16", "UNAUTHENTICATED":
		return CodeInvalidEgressConfig
	case "14", "UNAVAILABLE":
		return CodeEgressUnavailable
	case "4001":
		return CodeCreditsExhausted
	case "4002":
		return CodeSessionDurationExceeded
	}
	return ""
}

// byText looks for the phrases that the backend uses. Their order decides if
// a text has several; HTTP 402 counts like "session denied".
func byText(text string, status int) Code {
	has := func(phrases ...string) bool { return containsAny(text, phrases...) }
	switch {
	case has("credits exhausted"):
		return CodeCreditsExhausted
	case has("session time limit reached", "maximum session duration"):
		return CodeSessionDurationExceeded
	case has("session denied") || status == http.StatusPaymentRequired:
		return CodeBillingRequired
	case has("invalid session token", "empty token"):
		return CodeSessionTokenInvalid
	case has("token is expired", "session token expired"):
		return CodeSessionTokenExpired
	case has("app id mismatch"):
		return CodeAppIDMismatch
	case has("appidunrecognized", "app id unrecognized"):
		return CodeAppIDUnrecognized
	case has("avatar not found"):
		return CodeAvatarNotFound
	case has("unsupported sample rate"):
		return CodeUnsupportedSampleRate
	case has("livekit silence timeout", "no audio input for"):
		return CodeIdleTimeout
	case has("livekit_egress", "agora_egress", "missing livekit credentials",
		"provide api_token or both api_key and api_secret", "unauthorized"):
		return CodeInvalidEgressConfig
	case has("egress client is not configured on server", "failed to create egress connection"):
		return CodeEgressUnavailable
	case has("driven server returned non-200 status code", "driven server request failed"):
		return CodeUpstreamError
	case has("expected clientconfiguresession message", "clientconfiguresession message is nil",
		"unexpected message type", "failed to unmarshal initial message",
		"failed during websocket handshake: invalid protobuf payload",
		"failed during websocket handshake: expected binary protobuf message"):
		return CodeProtocolError
	}
	return ""
}

func byStatus(phase Phase, status int) Code {
	switch {
	case status == http.StatusUnauthorized:
		return CodeSessionTokenExpired
	case status == http.StatusNotFound:
		return CodeAppIDUnrecognized
	case status == http.StatusBadRequest && phase == PhaseConnect:
		return CodeSessionTokenInvalid
	case status >= 400 && status < 500:
		return CodeInvalidRequest
	case status >= 500:
		return CodeServerError
	}
	return ""
}

// lower is Python's str.lower as far as it matters for the phrases:
// the dotted capital I becomes two characters there, and one in Go.
func lower(text string) string {
	return strings.ToLower(strings.ReplaceAll(text, "\u0130", "i\u0307"))
}

func containsAny(text string, phrases ...string) bool {
	return slices.ContainsFunc(phrases, func(phrase string) bool { return strings.Contains(text, phrase) })
}

// maxRetryAfter keeps an absurd header from overflowing a Duration. The table
// decides how much of it counts.
const maxRetryAfter = 365 * 24 * time.Hour

// retryAfter reads Retry-After, in seconds or as an HTTP date. A date is
// measured from the answer's own Date, so that clocks that differ do no harm.
func retryAfter(header http.Header) time.Duration {
	value := strings.TrimSpace(header.Get("Retry-After"))
	if value == "" {
		return 0
	}
	if seconds, err := strconv.ParseFloat(value, 64); err == nil && !math.IsNaN(seconds) {
		return time.Duration(min(max(seconds, 0), maxRetryAfter.Seconds()) * float64(time.Second))
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}
