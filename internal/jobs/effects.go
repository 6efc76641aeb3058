package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// The effects that may fail, as /readyz names them.
const (
	effectUsage      = "usage records can't be written"
	effectRecording  = "recordings can't be written"
	effectErrorEvent = "error events can't be written"
	effectDeadLetter = "dead letters can't be written"
	effectAlert      = "alerts can't be written"
	effectEvent      = "job events can't be written"
	effectLook       = "job events can't be read"
)

// outputEffect names what completes an output of that kind. Each kind has its own name,
// because one may fail while another works.
func outputEffect(kind string) string {
	if kind == jobspec.OutputObject {
		return effectRecording
	}
	return "outputs of kind " + kind + " can't be written"
}

// finishTimeout bounds what completes an output.
const finishTimeout = 5 * time.Minute

// faultyTimeout bounds an effect that has failed before: each delivery tries again.
const faultyTimeout = 5 * time.Second

// slotTimeout bounds an effect while the job keeps its slot. An election takes less.
const slotTimeout = 10 * time.Second

// effects are what follows from the state of an execution's job.
type effects struct{ *execution }

// effects returns the effects of the execution.
func (e *execution) effects() effects { return effects{e} }

// emit does what follows from a record. The job's slot is free for another job
// meanwhile.
func (f effects) emit(r *lifecycle.Record) error {
	if err := f.leaveSlot(); err != nil {
		return err
	}
	return f.emitEffects(r)
}

// leaveSlot frees the job's slot. An error: too many jobs are at this step already, and
// something is known to fail, so the next delivery goes on.
func (f effects) leaveSlot() error {
	if !f.freeSlot() && f.w.faults.Any() && f.w.o.InHand > f.w.o.Concurrency { // a place will be free
		return errEffectsWait
	}
	return nil
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
	stored, err := f.stored(ctx, r)
	if err != nil || stored {
		return err
	}
	if f.w.faults.Any() {
		return f.emit(r)
	}
	return f.emitEffects(r) // a job that starts next keeps its slot
}

// stored reports whether the record's last event is in the stream. While that can't be
// read no job keeps its slot for it.
func (f effects) stored(ctx context.Context, r *lifecycle.Record) (stored bool, err error) {
	if f.w.faults.Has(effectLook) {
		if err := f.leaveSlot(); err != nil {
			return false, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	stored, err = f.w.kept.Has(ctx, f.events().Last(r), r.EmittedAfter())
	f.w.faults.Note(effectLook, err)
	return stored, err
}

// emitEffects does what follows from the state of a record. The job event comes
// last: if it is stored, all else is done. It may be repeated: events have ids,
// dead letters too.
func (f effects) emitEffects(r *lifecycle.Record) error {
	if err := f.storeUsage(r); err != nil {
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
		failpoint.Here("dead_letter")
	}
	if r.State == lifecycle.StateHeld && r.HeldReason == lifecycle.HeldUnsettled {
		if err := f.publish(effectAlert, f.events().Unsettled(r)); err != nil {
			return err
		}
		f.w.o.Observer.Alerted(event.AlertUnsettled, "sessions")
	}
	err := f.publish(effectEvent, f.events().Last(r))
	failpoint.Here("event")
	return err
}

// storeUsage writes the record's sessions to the ledger.
func (f effects) storeUsage(r *lifecycle.Record) error {
	return f.w.ledger.Store(r, &f.session.sent, func(write func(context.Context, time.Duration) error) error {
		return f.effect(effectUsage, f.w.o.SettleTimeout, write)
	})
}

// publishApart publishes an event for a record this delivery did not write. The job
// keeps its slot unless something is known to fail.
func (f effects) publishApart(ev event.Event) error {
	if f.w.faults.Any() {
		if err := f.leaveSlot(); err != nil {
			return err
		}
	}
	return f.publish(effectEvent, ev)
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
	switch {
	case f.w.faults.Has(what):
		return min(ordinary, faultyTimeout)
	case f.place == nil:
		return min(ordinary, slotTimeout)
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
