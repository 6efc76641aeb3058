package errors

import "time"

// Code names a failure. The first nineteen are the backend's server SDKs' own;
// the rest are the worker's.
type Code string

const (
	CodeConnectionFailed        Code = "connectionFailed"
	CodeConnectionClosed        Code = "connectionClosed"
	CodeIdleTimeout             Code = "idleTimeout"
	CodeEgressUnavailable       Code = "egressUnavailable"
	CodeUpstreamError           Code = "upstreamError"
	CodeServerError             Code = "serverError"
	CodeProtocolError           Code = "protocolError"
	CodeUnknown                 Code = "unknown"
	CodeSessionTokenExpired     Code = "sessionTokenExpired"
	CodeSessionTokenInvalid     Code = "sessionTokenInvalid"
	CodeAppIDMismatch           Code = "appIDMismatch"
	CodeAppIDUnrecognized       Code = "appIDUnrecognized"
	CodeAvatarNotFound          Code = "avatarNotFound"
	CodeUnsupportedSampleRate   Code = "unsupportedSampleRate"
	CodeInvalidEgressConfig     Code = "invalidEgressConfig"
	CodeInvalidRequest          Code = "invalidRequest"
	CodeBillingRequired         Code = "billingRequired"
	CodeCreditsExhausted        Code = "creditsExhausted"
	CodeSessionDurationExceeded Code = "sessionDurationExceeded"

	CodeInvalidJob       Code = "invalidJob"
	CodeAudioUnavailable Code = "audioUnavailable"
	CodeDeadlineExceeded Code = "deadlineExceeded"
	CodeWorkerLost       Code = "workerLost"
	CodeInternal         Code = "internal"
)

// Class groups codes by the cause of the failure.
type Class string

const (
	ClassTransient Class = "transient"
	ClassServer    Class = "server"
	ClassProtocol  Class = "protocol"
	ClassUnknown   Class = "unknown"
	ClassAuth      Class = "auth"
	ClassConfig    Class = "config"
	ClassBilling   Class = "billing"
	ClassJob       Class = "job"
	ClassInternal  Class = "internal"
)

// Phase says how far an attempt had come.
type Phase string

const (
	PhaseJob       Phase = "job"
	PhaseAudio     Phase = "audio"
	PhaseToken     Phase = "session_token"
	PhaseConnect   Phase = "websocket_connect"
	PhaseHandshake Phase = "websocket_handshake"
	PhaseRuntime   Phase = "websocket_runtime"
	PhaseSend      Phase = "websocket_send"
)

// Action is what the worker does about a failure.
type Action string

const (
	ActionRetry      Action = "retry"
	ActionDeadLetter Action = "dead_letter"
	ActionHold       Action = "hold"
	ActionExpire     Action = "expire"
)

// Actions lists every action. What becomes of a failure is tested against it.
func Actions() []Action {
	return []Action{ActionRetry, ActionDeadLetter, ActionHold, ActionExpire}
}

// PolicyActions lists the actions that a policy may name. A job expires by its
// deadline alone.
func PolicyActions() []Action { return []Action{ActionRetry, ActionDeadLetter, ActionHold} }

// Error is a failure with everything that is known of it. A zero field is one
// that is not known.
type Error struct {
	Code    Code
	Phase   Phase
	Message string // for people: what went wrong and, where it helps, what to do

	HTTPStatus   int    // the effective one: errors[0].status under HTTP 200
	ServerCode   string // as the backend gave it: "0", "4001", "INVALID_ARGUMENT"
	ServerTitle  string
	ServerDetail string
	ConnectionID string
	ReqID        string
	RequestID    string // the backend's own name of an HTTP request; Message has it too
	CloseCode    int    // WebSocket close code
	CloseReason  string
	Region       string // the region that served or refused

	RetryAfter time.Duration // the answer's Retry-After; 0: none
	Network    bool          // audioUnavailable only: a network fault, which may go away
	Proxy      bool          // connectionFailed only: the way to the backend leads through a proxy that let nothing through

	Err error // the cause, if there is one
}
