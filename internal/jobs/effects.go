package jobs

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// What follows from the state of a record, by the names that readiness and logs
// use.
const (
	effectUsage      = "usage records"
	effectRecording  = "recordings"
	effectErrorEvent = "error events"
	effectDeadLetter = "dead letters"
	effectEvent      = "job events"
)

// outputEffect names what completes an output of that kind. Each kind has a name of
// its own: one that works says nothing of another that does not.
func outputEffect(kind string) string {
	if kind == jobspec.OutputObject {
		return effectRecording
	}
	return "outputs of kind " + kind
}

// finishTimeout bounds what completes an output.
const finishTimeout = 5 * time.Minute

// faultyTimeout bounds an effect that has failed before: it is tried again with
// each delivery.
const faultyTimeout = 5 * time.Second

// effects are what follows from the state of an execution's job.
type effects struct{ *execution }

// effects returns the effects of the execution.
func (e *execution) effects() effects { return effects{e} }

// emit does what follows from a record that this worker has just written. The
// job's slot is free for another job meanwhile. If too many jobs are at this step
// already, and one of the effects is known to fail, the next delivery does it.
func (f effects) emit(r *lifecycle.Record) error {
	if !f.freeSlot() && f.w.faults.Any() {
		return errEffectsWait
	}
	return f.emitEffects(r)
}

// errEffectsWait: effects fail, and enough jobs retry them already.
var errEffectsWait = errors.New("the effects of the job's state can't be done at the moment, and are tried again later")

// repeatEffects does again what follows from an outcome that is there already.
func (f effects) repeatEffects() error {
	if !f.freeSlot() && f.w.o.InHand > f.w.o.Concurrency { // a place will be free
		f.backToQueue("effects")
		return nil
	}
	ctx, cancel := f.settling()
	defer cancel()
	if err := f.ensureEffects(ctx); err != nil {
		return err
	}
	f.acknowledge()
	return nil
}

// ensureEffects repeats what follows from the record as it is, unless its
// last event is stored: then all the rest is too.
func (f effects) ensureEffects(ctx context.Context) error {
	r := f.record.Current()
	stored, err := f.w.eventStored(ctx, f.events().Last(r), r.EmittedAfter())
	if err != nil || stored {
		return err
	}
	return f.emitEffects(r)
}

// eventStored reports whether the event is the last of its subject in the stream. One
// with this id that is older than since is of an earlier job whose id was used
// again, and proves nothing.
func (w *Worker) eventStored(ctx context.Context, ev event.Event, since time.Time) (bool, error) {
	msg, err := w.o.Events.GetLastMsgForSubject(ctx, ev.Subject(w.o.Names))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	at, err := time.Parse(time.RFC3339Nano, msg.Header.Get("ce-time"))
	return err == nil && msg.Header.Get("ce-id") == ev.ID && !at.Before(since), nil
}

// emitEffects does what follows from the state of a record. The job event comes
// last: if it is stored, all else is done. It may be repeated: events have ids,
// dead letters too.
func (f effects) emitEffects(r *lifecycle.Record) error {
	if err := f.w.ledger.Store(r, &f.session.sent, func(write func(context.Context, time.Duration) error) error {
		return f.effect(effectUsage, f.w.o.SettleTimeout, write)
	}); err != nil {
		return err
	}
	if r.State.Final() && f.job != nil {
		if err := f.completeOutput(r); err != nil {
			return err
		}
	}
	if r.HasOwnError() {
		ev := f.events().Event(event.TypeError, r, *r.LastError)
		if r.NoAttempt { // the session of this number may have published a failure of its own
			ev.ID = event.ID(r.JobID, r.Run, r.Session, event.TypeError, r.Reason)
		}
		if err := f.publish(effectErrorEvent, ev); err != nil {
			return err
		}
		failpoint.Here("error_event")
	}
	if r.State == lifecycle.StateDeadLettered {
		if err := f.effect(effectDeadLetter, f.w.o.SettleTimeout, func(ctx context.Context, limit time.Duration) error {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			return f.w.o.DeadLetters.Write(ctx, f.deadLetter(r))
		}); err != nil {
			return err
		}
		f.w.o.Observer.DeadLettered(r.LastError.Code)
		failpoint.Here("dead_letter")
	}
	err := f.publish(effectEvent, f.events().Last(r))
	failpoint.Here("event")
	return err
}

// publish publishes an event, and notes whether it can be published.
func (f effects) publish(what string, ev event.Event) error {
	err := f.w.publisher.PublishWithin(f.ctx, f.limit(what, f.w.o.SettleTimeout), ev)
	f.w.faults.Note(what, err)
	return err
}

// effect does one thing that follows, and notes whether it can be done: a worker
// for which it can't is not ready.
func (f effects) effect(what string, limit time.Duration, do func(context.Context, time.Duration) error) error {
	err := do(f.ctx, f.limit(what, limit))
	f.w.faults.Note(what, err)
	return err
}

// limit bounds an effect; ordinary is the bound of one that has not failed before.
func (f effects) limit(what string, ordinary time.Duration) time.Duration {
	if f.w.faults.Has(what) {
		return min(ordinary, faultyTimeout)
	}
	return ordinary
}

func (f effects) completeOutput(r *lifecycle.Record) error {
	what := outputEffect(f.job.OutputKind())
	ctx, cancel := context.WithTimeout(f.ctx, f.limit(what, finishTimeout))
	defer cancel()
	// When the drain time is up the next delivery does it: the outcome is there.
	stop := context.AfterFunc(f.w.drained, cancel)
	defer stop()
	err := f.w.o.Runner.Finish(ctx, f.job, Finished{Outcome: r.State, Session: r.Session, Utterances: r.Checkpoint, Recorded: r.Recorded})
	f.w.faults.Note(what, err)
	return err
}

// events makes the events about the job.
func (e *execution) events() lifecycle.Events {
	parent, state := e.traceContext()
	return lifecycle.Events{
		Names: e.w.o.Names, Worker: e.w.o.Name, WorkerID: e.w.lastWorkerID(), Job: e.job,
		TraceParent: parent, TraceState: state,
	}
}

func (f effects) deadLetter(r *lifecycle.Record) lifecycle.DeadLetter {
	return lifecycle.DeadLetter{
		Job: f.id, Header: f.msg.Headers(), Data: f.msg.Data(),
		Reason: r.Reason, Error: *r.LastError, Crashes: r.Crashes, Attempts: r.AttemptsMade(),
		FailedAt: r.UpdatedAt, Worker: f.w.o.Name, LettersBefore: r.LettersBefore,
	}
}
