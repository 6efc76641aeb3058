package lifecycle

import (
	"time"

	"avatarworker/internal/errors"
)

// LostError is the verdict on a job whose workers died one after the other.
func LostError(r *Record) *errors.Error {
	return errors.Newf(errors.CodeWorkerLost, errors.PhaseJob,
		"the worker died %d times while it ran this job; the last was %s. Look at that worker's last log lines, then replay the job", r.Crashes, r.WorkerID)
}

// SpokenError is the verdict on a job that may not be spoken twice.
func SpokenError(r *Record) *errors.Error {
	const why = "utterance %d was begun and not finished, and on_redelivery is give_up: it is not spoken a second time"
	if r.LastError == nil {
		return errors.Newf(errors.CodeWorkerLost, errors.PhaseJob, why, r.Speaking)
	}
	e := errors.Newf(r.LastError.Code, r.LastError.Phase, why+"; what ended it: %s", r.Speaking, r.LastError.Message)
	e.ConnectionID = r.LastError.ConnectionID
	return e
}

// HeldError is the verdict on a job that was held longer than circuit.max_hold in all.
// It has the details of the last failure if that is what holds the job.
func HeldError(r *Record, now time.Time) *errors.Error {
	why := "held for " + r.HeldTotal(now).Round(time.Second).String() + " in all, longer than circuit.max_hold"
	last := r.LastError
	if last == nil || last.Code != r.holdCode() {
		return errors.Newf(r.holdCode(), errors.PhaseJob, "%s", why)
	}
	return &errors.Error{
		Code: last.Code, Phase: last.Phase, Message: why + "; " + last.Message, HTTPStatus: last.HTTPStatus,
		ServerCode: last.ServerCode, ServerTitle: last.ServerTitle, ServerDetail: last.ServerDetail, Region: last.Region,
	}
}

// HasOwnError reports whether the state came with a failed attempt, which has an error
// event. A hold came with it if it began then: what holds the job may change later.
func (r *Record) HasOwnError() bool {
	if r.LastError == nil {
		return false
	}
	switch r.State {
	case StateDeadLettered, StateRetrying:
		return true
	case StateHeld:
		later := r.HeldSince != nil && r.LastError.Time.Before(*r.HeldSince)
		return !later && r.LastError.Session == r.Session && r.LastError.Action == errors.ActionHold
	case StateExpired:
		return r.LastError.Session == r.Session && r.LastError.Action == errors.ActionExpire
	default:
		return false
	}
}
