package jobs

import (
	"context"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// follow does what follows from the state of a record, in an order in which the
// last event's presence proves the rest. It may be repeated: events have ids,
// dead letters too.
func (t *task) follow(r *Record) error {
	if r.State.Final() && t.job != nil {
		if err := t.completeOutput(r); err != nil {
			return err
		}
	}
	ctx, cancel := t.settling()
	defer cancel()
	if t.tellsError(r) {
		ev := t.event(EventError, r, *r.LastError)
		if r.NoAttempt { // the session of this number may have told a failure of its own
			ev.ID = EventID(r.JobID, r.Run, r.Session, EventError, r.Reason)
		}
		if err := t.w.publisher.Publish(ctx, ev); err != nil {
			return err
		}
		failpoint.Here("error_event")
	}
	if r.State == StateDeadLettered {
		if err := t.w.o.DeadLetters.Write(ctx, t.deadLetter(r)); err != nil {
			return err
		}
		t.w.o.Observer.DeadLettered(r.LastError.Code)
		failpoint.Here("dead_letter")
	}
	err := t.w.publisher.Publish(ctx, t.lastEvent(r))
	failpoint.Here("event")
	return err
}

// finishTimeout bounds what completes an output; a long recording takes longer
// to assemble than an outcome to write.
const finishTimeout = 5 * time.Minute

func (t *task) completeOutput(r *Record) error {
	ctx, cancel := context.WithTimeout(t.ctx, finishTimeout)
	defer cancel()
	// When the drain time is up the next delivery does it: the outcome is there.
	stop := context.AfterFunc(t.w.drained, cancel)
	defer stop()
	return t.w.o.Runner.Finish(ctx, t.job, Finished{Outcome: r.State, Session: r.Session, Utterances: r.Checkpoint})
}

// tellsError tells whether the state came with a failed attempt of its own.
func (t *task) tellsError(r *Record) bool {
	if r.LastError == nil {
		return false
	}
	switch r.State {
	case StateDeadLettered, StateRetrying:
		return true
	case StateHeld:
		return r.LastError.Session == r.Session && r.LastError.Action == errors.ActionHold
	case StateExpired:
		return r.LastError.Session == r.Session && r.LastError.Action == errors.ActionExpire
	default:
		return false
	}
}

// lastEvent is the job event that tells of the record's state.
func (t *task) lastEvent(r *Record) Event {
	fields := t.fields(r)
	switch r.State {
	case StateRetrying:
		return t.event(EventRetrying, r, Retrying{
			JobFields: fields, MaxAttempts: r.LastError.MaxAttempts, Code: r.LastError.Code,
			Class: r.LastError.Class, Phase: r.LastError.Phase, RetryAt: *r.NextAttemptAt,
		})
	case StateHeld:
		ev := t.event(EventHeld, r, Held{JobFields: fields, Code: r.heldCode(), RetryAt: *r.NextAttemptAt, Reason: heldReason(r)})
		ev.ID = EventID(r.JobID, r.Run, r.Session, EventHeld, r.Holds)
		return ev
	case StateReleased:
		return t.event(EventReleased, r, Released{JobFields: fields, Reason: r.Reason, Checkpoint: r.Checkpoint})
	case StateDeadLettered:
		return t.event(EventDeadLettered, r, DeadLettered{
			JobFields: fields, Attempts: r.attemptsMade(), Crashes: r.Crashes, Code: r.LastError.Code, Class: r.LastError.Class,
			Phase: r.LastError.Phase, Reason: r.Reason, Message: r.LastError.Message,
			DeadLetter: t.w.o.Names.DLQ(string(r.LastError.Class), string(r.LastError.Code)),
		})
	case StateExpired:
		return t.event(EventExpired, r, Expired{
			JobFields: fields, Attempts: r.Attempt, Code: errors.CodeDeadlineExceeded, Deadline: t.deadline(), LastError: r.LastError,
		})
	case StateCancelled:
		return t.event(EventCancelled, r, Cancelled{
			JobFields: fields, Attempts: r.Attempt, UtterancesTotal: r.UtterancesDone,
			SessionMS: r.SessionTime.Milliseconds(), LastError: r.LastError,
		})
	default:
		return t.event(EventCompleted, r, NewCompleted(fields, r.Attempt, r.ConnectionIDs, r.Utterances, r.UtterancesDone, r.SessionTime, r.Recording))
	}
}

// deadline is what the job says, also where it does not count.
func (t *task) deadline() time.Time {
	if t.job == nil {
		return time.Time{}
	}
	return t.job.NotAfter()
}

// event makes an event about the job at the time of its record, so that it is
// the same whenever it is told.
func (t *task) event(kind string, r *Record, body Body) Event {
	parent, state := t.traceContext()
	return Event{
		ID: EventID(r.JobID, r.Run, r.Session, kind), Time: r.UpdatedAt, Body: body,
		TraceParent: parent, TraceState: state,
	}
}

func (t *task) fields(r *Record) JobFields {
	return JobFields{
		JobID: r.JobID, Run: r.Run, Queue: r.Queue, AppID: r.AppID, AvatarID: r.AvatarID, Region: r.Region,
		Worker: t.w.o.Name, WorkerID: t.w.o.ID, Attempt: r.Attempt, Session: r.Session, Labels: r.Labels, Time: r.UpdatedAt,
	}
}

// errorEvent tells of a failure; at is when the job is tried again, if it is.
func (t *task) errorEvent(r *Record, e *errors.Error, d errors.Decision, plan Plan, at time.Time) *ErrorEvent {
	fields := t.fields(r)
	fields.Time = t.w.o.Now().UTC()
	failure := Failure{Err: e, Class: d.Class, Action: plan.Action, MaxAttempts: max(r.BudgetFrom+r.MaxAttempts, r.Attempt)}
	if t.job != nil {
		failure.Secrets = t.job.Secrets()
	} else {
		failure.MaxAttempts = 0
	}
	if plan.Action == errors.ActionRetry || plan.Action == errors.ActionHold {
		failure.RetryAt = at
	}
	ev := NewErrorEvent(fields, failure)
	if ev.ConnectionID == "" {
		ev.ConnectionID = r.ConnectionID
	}
	return &ev
}

func (t *task) deadLetter(r *Record) DeadLetter {
	return DeadLetter{
		Job: t.id, Header: t.msg.Headers(), Data: t.msg.Data(),
		Reason: r.Reason, Error: *r.LastError, Crashes: r.Crashes, Attempts: r.attemptsMade(),
		FailedAt: r.UpdatedAt, Worker: t.w.o.Name, LettersBefore: r.LettersBefore,
	}
}

func heldReason(r *Record) string {
	if r.Refusals > 0 {
		return "the backend refuses one more session of the app while others live; set max_sessions"
	}
	if r.HeldByPolicy {
		return "policy holds jobs that fail with " + string(r.heldCode()) + "; it is tried again from time to time"
	}
	return "the circuit of the app is open: sessions of it are not started until a probe succeeds"
}

// lostError is the verdict on a job whose workers died one after the other.
func lostError(r *Record) *errors.Error {
	return errors.Newf(errors.CodeWorkerLost, errors.PhaseJob,
		"the worker died %d times while it ran this job; the last was %s. Look at that worker's last log lines, then replay the job", r.Crashes, r.WorkerID)
}

// spokenError is the verdict on a job that may not be spoken twice.
func spokenError(r *Record) *errors.Error {
	const why = "utterance %d was begun and not finished, and on_redelivery is give_up: it is not spoken a second time"
	if r.LastError == nil {
		return errors.Newf(errors.CodeWorkerLost, errors.PhaseJob, why, r.Speaking)
	}
	e := errors.Newf(r.LastError.Code, r.LastError.Phase, why+"; what ended it: %s", r.Speaking, r.LastError.Message)
	e.ConnectionID = r.LastError.ConnectionID
	return e
}

// heldError is the verdict on a job that waited too long for its circuit. What
// the backend said when it was last asked is still what is wrong.
func heldError(r *Record, now time.Time) *errors.Error {
	why := "held for " + r.heldTotal(now).Round(time.Second).String() + " in all, longer than circuit.max_hold"
	last := r.LastError
	if last == nil || last.Code != r.heldCode() {
		return errors.Newf(r.heldCode(), errors.PhaseJob, "%s", why)
	}
	return &errors.Error{
		Code: last.Code, Phase: last.Phase, Message: why + "; " + last.Message, HTTPStatus: last.HTTPStatus,
		ServerCode: last.ServerCode, ServerTitle: last.ServerTitle, ServerDetail: last.ServerDetail, Region: last.Region,
	}
}

func (t *task) logFailure(r *Record, e *errors.Error, plan Plan) {
	var secrets []string
	if t.job != nil {
		secrets = t.job.Secrets()
	}
	level := zerolog.WarnLevel
	if plan.Action == errors.ActionDeadLetter {
		level = zerolog.ErrorLevel
	}
	t.fault = e.Redact(secrets...)
	t.log().WithLevel(level).Err(t.fault).
		Str("code", string(e.Code)).Str("phase", string(e.Phase)).Str("action", string(plan.Action)).
		Int("attempt", r.Attempt).Int("session", r.Session).Str("avatar_id", r.AvatarID).Str("app_id", r.AppID).
		Str("connection_id", r.ConnectionID).Str("req_id", e.ReqID).Stringer("retry_in", plan.Delay).
		Msg("attempt failed")
}

func (t *task) logOutcome(r *Record) {
	t.log().Info().Str("outcome", string(r.Outcome)).Int("attempt", r.Attempt).Int("session", r.Session).
		Str("avatar_id", r.AvatarID).Str("app_id", r.AppID).Str("connection_id", r.ConnectionID).
		Int("utterances", r.UtterancesDone).Stringer("session_time", r.SessionTime).
		Msg("job done")
}
