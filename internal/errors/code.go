package errors

import "slices"

// codes in the order in which they are shown: the backend's, then the worker's.
func codes() []Code {
	return []Code{
		CodeConnectionFailed, CodeConnectionClosed, CodeIdleTimeout,
		CodeEgressUnavailable, CodeUpstreamError, CodeServerError,
		CodeProtocolError, CodeUnknown,
		CodeSessionTokenExpired, CodeSessionTokenInvalid, CodeAppIDMismatch,
		CodeAppIDUnrecognized, CodeAvatarNotFound, CodeUnsupportedSampleRate,
		CodeInvalidEgressConfig, CodeInvalidRequest,
		CodeBillingRequired, CodeCreditsExhausted, CodeSessionDurationExceeded,
		CodeInvalidJob, CodeAudioUnavailable, CodeDeadlineExceeded,
		CodeWorkerLost, CodeInternal,
	}
}

// Codes lists every code, always in the same order: by class, the backend's
// nineteen first.
func Codes() []Code { return codes() }

// Known reports whether c is one of Codes.
func (c Code) Known() bool { return slices.Contains(codes(), c) }

// Class is the code's class where neither the HTTP status nor the text changes
// it (see Table.Decide). A code that is not known has class internal.
func (c Code) Class() Class {
	switch c {
	case CodeConnectionFailed, CodeConnectionClosed, CodeIdleTimeout, CodeEgressUnavailable:
		return ClassTransient
	case CodeUpstreamError, CodeServerError:
		return ClassServer
	case CodeProtocolError:
		return ClassProtocol
	case CodeUnknown:
		return ClassUnknown
	case CodeSessionTokenExpired, CodeSessionTokenInvalid, CodeAppIDMismatch:
		return ClassAuth
	case CodeAppIDUnrecognized, CodeAvatarNotFound, CodeUnsupportedSampleRate,
		CodeInvalidEgressConfig, CodeInvalidRequest:
		return ClassConfig
	case CodeBillingRequired, CodeCreditsExhausted, CodeSessionDurationExceeded:
		return ClassBilling
	case CodeInvalidJob, CodeAudioUnavailable, CodeDeadlineExceeded, CodeWorkerLost:
		return ClassJob
	default:
		return ClassInternal
	}
}

// Classes lists the class of every code, in the order of Codes.
func Classes() []Class {
	var all []Class
	for _, code := range codes() {
		if class := code.Class(); !slices.Contains(all, class) {
			all = append(all, class)
		}
	}
	return all
}

// Phases lists every phase in the order in which an attempt passes them.
func Phases() []Phase {
	return []Phase{PhaseJob, PhaseAudio, PhaseToken, PhaseConnect, PhaseHandshake, PhaseRuntime, PhaseSend}
}
