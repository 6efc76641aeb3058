package status

import (
	"cmp"
	"fmt"
	"strings"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

// HeldBecause says why a job is held, and what a person can do about it; "": it is
// not held.
func HeldBecause(r *lifecycle.Record) (why, remedy string) {
	if r.State != lifecycle.StateHeld {
		return "", ""
	}
	switch r.HeldReason {
	case lifecycle.HeldRefused:
		return "the backend refuses one more session of app " + r.AppID + " while other sessions of the app are open",
			"Set max_sessions of the app to what its plan allows. The job is tried again by itself."
	case lifecycle.HeldProxy:
		return "a proxy on the way to the backend lets nothing through",
			"Correct the proxy, or HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the worker; the last error names the proxy and its answer. The job is tried again by itself."
	case lifecycle.HeldPolicy:
		return fmt.Sprintf("the configuration's policy holds jobs that fail with %s", r.HeldCode),
			errors.Explain(r.HeldCode).Remedy
	case lifecycle.HeldStorage:
		return "the worker's own storage can't take what the job makes: " + r.HeldWhy,
			"Make room in the stream or bucket; if it is gone, 'avatarworker setup' recreates it. The job goes on by itself, however long this lasts."
	case lifecycle.HeldBudget:
		return r.HeldText(),
			"Wait until the period ends, or raise the budget (avatarworker cost budget). The job goes on by itself, however long this lasts."
	case lifecycle.HeldUnsettled:
		return r.HeldWhy,
			"Find out why its sessions end (its history below, and the workers' logs). Then retry it (avatarworker retry), which allows five more, or cancel it."
	case lifecycle.HeldCircuit, "":
	default: // written by a later version
		return r.HeldText(), ""
	}
	why = fmt.Sprintf("no sessions of app %s are started in %s: the circuit is open", r.AppID, cmp.Or(r.Region, "-"))
	if r.HeldCode == "" {
		return why, ""
	}
	return why + ", because of " + string(r.HeldCode), errors.Explain(r.HeldCode).Remedy
}

// ReleasedBecause is the reason of a record with what it means where that is not
// plain.
func ReleasedBecause(r *lifecycle.Record) string {
	meaning := map[string]string{
		"drain":      "its worker stopped; another takes it over",
		"unrecorded": "its record could not be written, so its session was closed",
		"lease_lost": "its worker could not renew its lease in time, so its session was closed",
		"worker_key": "the backend refuses that worker's API key; another worker takes it over",
		"fault":      "a fault of the worker, not of the job; see that worker's log",
	}[r.Reason]
	if r.State != lifecycle.StateReleased || meaning == "" {
		return r.Reason
	}
	return r.Reason + ": " + meaning
}

// Cause is an error's text and, where the backend said more, that: it often names
// the reason that a code only hints at. Secrets are hidden.
func Cause(message, title, detail string) string {
	for _, said := range []string{title, detail} {
		if said != "" && !strings.Contains(message, said) {
			message = strings.TrimSuffix(message, ".") + ": " + said
		}
	}
	return errors.RedactText(message)
}
