package lifecycle

import (
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/topology"
)

// Events makes the events about a job from its record. They have the time of the
// record, so that they are the same whenever they are published.
type Events struct {
	Names                   topology.Names
	Worker, WorkerID        string       // the one that publishes them
	Job                     *jobspec.Job // nil: the message is not a valid job
	TraceParent, TraceState string
}

// Fields returns what all events about the job say.
func (e Events) Fields(r *Record) event.JobFields {
	return event.JobFields{
		JobID: r.JobID, Run: r.Run, Queue: r.Queue, AppID: r.AppID, AvatarID: r.AvatarID, Region: r.Region,
		Worker: e.Worker, WorkerID: e.WorkerID, Attempt: r.Attempt, Session: r.Session, Labels: r.Labels, Time: r.UpdatedAt,
	}
}

// Event returns an event with that body.
func (e Events) Event(kind string, r *Record, body event.Body) event.Event {
	return event.Event{
		ID: event.ID(r.JobID, r.Run, r.Session, kind), Time: r.UpdatedAt, Body: body,
		TraceParent: e.TraceParent, TraceState: e.TraceState,
	}
}

// Last returns the job event of the record's state.
func (e Events) Last(r *Record) event.Event {
	fields := e.Fields(r)
	switch r.State {
	case StateRetrying:
		return e.Event(event.TypeRetrying, r, event.Retrying{
			JobFields: fields, MaxAttempts: r.LastError.MaxAttempts, Code: r.LastError.Code,
			Class: r.LastError.Class, Phase: r.LastError.Phase, RetryAt: *r.NextAttemptAt,
		})
	case StateHeld:
		ev := e.Event(event.TypeHeld, r, event.Held{JobFields: fields, Code: r.HeldCode, RetryAt: *r.NextAttemptAt, Reason: r.HeldReason, Message: r.HeldText()})
		ev.ID = event.ID(r.JobID, r.Run, r.Session, event.TypeHeld, r.Holds)
		return ev
	case StateReleased:
		return e.Event(event.TypeReleased, r, event.Released{JobFields: fields, Reason: r.Reason, Checkpoint: r.Checkpoint})
	case StateDeadLettered:
		return e.Event(event.TypeDeadLettered, r, event.DeadLettered{
			JobFields: fields, Attempts: r.AttemptsMade(), Crashes: r.Crashes, Code: r.LastError.Code, Class: r.LastError.Class,
			Phase: r.LastError.Phase, Reason: r.Reason, Message: r.LastError.Message,
			ServerTitle: r.LastError.ServerTitle, ServerDetail: r.LastError.ServerDetail,
			DeadLetter: e.Names.DLQ(string(r.LastError.Class), string(r.LastError.Code)),
		})
	case StateExpired:
		return e.Event(event.TypeExpired, r, event.Expired{
			JobFields: fields, Attempts: r.Attempt, Code: errors.CodeDeadlineExceeded, Deadline: e.deadline(), LastError: r.LastError,
		})
	case StateCancelled:
		return e.Event(event.TypeCancelled, r, event.Cancelled{
			JobFields: fields, Attempts: r.Attempt, UtterancesTotal: r.UtterancesDone,
			SessionMS: r.SessionTime.Milliseconds(), LastError: r.LastError,
		})
	default:
		return e.Event(event.TypeCompleted, r, event.NewCompleted(fields, r.Attempt, r.ConnectionIDs, r.Utterances, r.UtterancesDone, r.SessionTime, r.Recording))
	}
}

// Unsettled returns the alert about a job that is held because its sessions settle
// nothing: one for each such hold.
func (e Events) Unsettled(r *Record) event.Event {
	return event.Event{ID: event.AlertID(event.AlertUnsettled, *r.HeldSince, r.JobID), Time: r.UpdatedAt, Body: event.WorkerAlert{
		Kind: event.AlertUnsettled, What: "sessions", AppID: r.AppID, JobID: r.JobID, Message: "the job is held: " + r.HeldWhy,
		Worker: e.Worker, WorkerID: e.WorkerID, Time: r.UpdatedAt,
	}}
}

// deadline is what the job says, also where it does not count.
func (e Events) deadline() time.Time {
	if e.Job == nil {
		return time.Time{}
	}
	return e.Job.NotAfter()
}

// tooLate says why a job expires before its deadline.
func tooLate(notBefore time.Duration, deadline time.Time) string {
	why := "; the next attempt would come after the deadline"
	if notBefore > 0 {
		why = "; the backend asks to wait " + notBefore.Round(time.Second).String() + ", until after the deadline"
	}
	return why + " " + deadline.UTC().Format(time.RFC3339)
}

// Error returns the error event of a failure that happened now; at is when the job is
// tried again, if it is.
func (e Events) Error(r *Record, fault *errors.Error, d errors.Decision, plan Plan, now, at time.Time) *event.Error {
	fields := e.Fields(r)
	fields.Time = now
	failure := event.Failure{Err: fault, Class: d.Class, Action: plan.Action, MaxAttempts: max(r.BudgetFrom+r.MaxAttempts, r.Attempt)}
	if e.Job != nil {
		failure.Secrets = e.Job.Secrets()
	} else {
		failure.MaxAttempts = 0
	}
	if plan.Action == errors.ActionRetry || plan.Action == errors.ActionHold {
		failure.RetryAt = at
	}
	ev := event.NewError(fields, failure)
	if deadline := e.deadline(); plan.Action == errors.ActionExpire && now.Before(deadline) {
		ev.Message += tooLate(d.NotBefore, deadline)
	}
	if ev.ConnectionID == "" {
		ev.ConnectionID = r.ConnectionID
	}
	return &ev
}
