package errors

import "strings"

// Explanation says in words what a code is.
type Explanation struct {
	Meaning string `json:"meaning"`
	Owner   string `json:"owner"` // who can correct it: backend, network, account, configuration, publisher, worker
	Remedy  string `json:"remedy"`
}

// Explain says what a code means, who can correct it and how. A code that is
// not known has an empty explanation.
func Explain(code Code) Explanation {
	if e, ok := explainSession(code); ok {
		return e
	}
	if e, ok := explainSetup(code); ok {
		return e
	}
	return explainOwn(code)
}

const (
	theyWait      = "The jobs wait, and go on by themselves."
	stopsByItself = "Nothing, if it stops by itself"
)

// ExplainGivenUp is Explain for a job that was given up: nothing happens to it by itself
// any more.
func ExplainGivenUp(code Code) Explanation {
	e := Explain(code)
	e.Remedy = strings.Replace(e.Remedy, theyWait, "This job was given up: then replay its dead letter.", 1)
	e.Remedy = strings.Replace(e.Remedy, stopsByItself, "If it has stopped by itself, replay the dead letter", 1)
	return e
}

// explainSession has what goes wrong between the worker and the backend.
func explainSession(code Code) (Explanation, bool) {
	switch code {
	case CodeConnectionFailed:
		return Explanation{"The backend could not be reached, or never confirmed the session.", "network",
			stopsByItself + ". If it stays: check DNS, TLS, proxy and firewall from the worker to the backend's URLs, and backend.region."}, true
	case CodeConnectionClosed:
		return Explanation{"The session's connection ended while speech was still owed.", "backend",
			stopsByItself + "; close_code and close_reason say more. If it stays: check idle limits of proxies on the way, and backend.stall_timeout."}, true
	case CodeIdleTimeout:
		return Explanation{"The backend closed a session that got no audio for too long.", "publisher",
			"Send live speech without long pauses, or set max_silence below the backend's limit."}, true
	case CodeEgressUnavailable:
		return Explanation{"The backend could not publish into the LiveKit or Agora room.", "backend",
			stopsByItself + ". Where the text says \"not configured\", the backend does not offer this egress: choose another output or ask the backend's support."}, true
	case CodeUpstreamError:
		return Explanation{"The backend's own animation server failed.", "backend",
			stopsByItself + ". If the alert recurs, report it to the backend's support with the connection_id."}, true
	case CodeServerError:
		return Explanation{"The backend failed in a way that it does not name further.", "backend",
			"Look at server_code and server_detail. If the alert recurs, report it to the backend's support with the connection_id."}, true
	case CodeProtocolError:
		return Explanation{"The backend's answer could not be understood.", "backend",
			"Check that backend.console_url and backend.ingress_url are the backend's, and that the worker is up to date; then report it."}, true
	case CodeUnknown:
		return Explanation{"The backend refused in a way that no rule knows.", "backend",
			"Look at http_status and the server's fields; a proxy or a redirect on the way may have answered."}, true
	}
	return Explanation{}, false
}

// explainSetup has the faults that stay until a setting or an account is changed.
func explainSetup(code Code) (Explanation, bool) {
	switch code {
	case CodeSessionTokenExpired:
		return Explanation{"The credentials were refused. In phase session_token, the API key was refused (HTTP 401). At the WebSocket, a newly issued session token was refused as well.", "configuration",
			"Check app.api_key and the worker's clock; then replay the dead letters."}, true
	case CodeSessionTokenInvalid:
		return Explanation{"The backend rejected the session token, and then a newly issued one.", "configuration",
			"Check that API key, app id and region belong together; then replay the dead letters."}, true
	case CodeAppIDMismatch:
		return Explanation{"The session token was issued for another app id.", "configuration",
			"Give the app id the API key of the same app; then replay the dead letters."}, true
	case CodeAppIDUnrecognized:
		return Explanation{"The backend does not know the app id, or the URL's path is wrong (any bare HTTP 404).", "configuration",
			"Check app.id, backend.region and the backend's URLs; then replay the dead letters."}, true
	case CodeAvatarNotFound:
		return Explanation{"There is no avatar with the job's avatar_id in this app and region.", "publisher",
			"Correct avatar_id in what publishes the jobs, or create the avatar; then replay the dead letters."}, true
	case CodeUnsupportedSampleRate:
		return Explanation{"The backend does not accept the speech's sample rate.", "publisher",
			"Send PCM at 8000, 16000, 22050, 24000, 32000, 44100 or 48000 Hz, or Ogg Opus at 8000, 12000, 16000, 24000 or 48000 Hz."}, true
	case CodeInvalidEgressConfig:
		return Explanation{"The LiveKit or Agora settings of the job were refused; any text with \"unauthorized\" ends here too.", "publisher",
			"Check url, room or channel and that the token has not expired and may publish; in phase session_token check app.api_key."}, true
	case CodeInvalidRequest:
		return Explanation{"The backend rejected the request as invalid.", "publisher",
			"Look at server_detail; correct the job or the configuration; then replay the dead letters."}, true
	case CodeBillingRequired:
		return Explanation{"The account may not start a session: it is unpaid, or the plan's limit of simultaneous sessions is reached.", "account",
			"Pay, or set app.max_sessions to the plan's limit. " + theyWait}, true
	case CodeCreditsExhausted:
		return Explanation{"The account's credits are used up.", "account",
			"Buy credits. " + theyWait}, true
	case CodeSessionDurationExceeded:
		return Explanation{"The session reached the plan's longest duration.", "publisher",
			"Split the speech into utterances: a job that gets further each time goes on where it stopped. Or take a larger plan."}, true
	}
	return Explanation{}, false
}

// explainOwn has what the worker finds by itself.
func explainOwn(code Code) Explanation {
	switch code {
	case CodeInvalidJob:
		return Explanation{"The message is not a valid job; the error text names the field. Its id comes from its headers (`Avatar-Job-Id`, `Nats-Msg-Id`), or is made by the worker. The id in the body is not used, so that the corrected job can use it.", "publisher",
			"Correct what publishes the jobs and publish again: a replay of the same bytes fails the same way."}
	case CodeAudioUnavailable:
		return Explanation{"The speech could not be fetched.", "publisher",
			"Check that the object or URL is there, public enough and within the size limit; then replay the dead letters."}
	case CodeDeadlineExceeded:
		return Explanation{"The job's deadline passed before it could be done.", "publisher",
			"Give later deadlines, or run more workers. Nothing is kept to be replayed."}
	case CodeWorkerLost:
		return Explanation{"The workers that ran the job died while running it; or the session of a job that may not be spoken again (`give_up`) was cut off amid an utterance.", "worker",
			"Look at the workers' logs and memory limits at the times of the crashes; report a crash that the job causes."}
	case CodeInternal:
		return Explanation{"The worker itself failed.", "worker",
			"Look at the worker's log at that time and report it; the usual cause is that NATS is unavailable or full."}
	}
	return Explanation{}
}
