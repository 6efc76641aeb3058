package jobs

import (
	"context"
	"math"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
)

// ErrStorage is in the chain of a Runner's error if a store of our own, and not
// the backend, kept the session from going on. That is no failure of the job.
var ErrStorage = errors.New("the worker's own storage failed")

// settle writes how an attempt went and emits what follows from it, then gives
// the message back or acknowledges it. What the session has reached is written as
// long as the record is as this worker left it, even if the lease was lost since:
// compare-and-set decides.
func (e *execution) settle() {
	ctx, cancel := e.w.resultContext(e.ctx)
	defer cancel()
	ctx, span := e.w.o.Tracer.Start(ctx, "settle")
	next := e.record.Current().Clone()
	next.Closed(e.session.report.Connected)
	err := e.verdict(ctx, next)
	endSpan(span, err)
	switch {
	case errors.Is(err, lifecycle.ErrSuperseded):
		e.abortProbe(false)
		e.superseded(next)
	case err != nil:
		// Not a conflict to look at again: the attempt is over.
		e.giveUpSession("unrecorded")
		e.nakWithBackoff(err)
	}
}

func (e *execution) verdict(ctx context.Context, next *lifecycle.Record) error {
	cause := e.session.cause
	switch {
	case errors.Is(e.session.err, lifecycle.ErrSuperseded) || errors.Is(cause, lifecycle.ErrSuperseded):
		return lifecycle.ErrSuperseded
	case e.session.err == nil:
		e.abortProbe(false) // a probe that needed no session
		next.Record(e.session.report.Recording)
		e.w.o.Observer.AttemptDone("", "", "")
		return e.finish(ctx, next, lifecycle.StateCompleted)
	case errors.Is(cause, lease.ErrLost):
		e.leaseLost(next)
		return nil
	case errors.Is(cause, errCancelled):
		next.RequestCancel(e.w.now())
		e.abortProbe(false)
		return e.finish(ctx, next, lifecycle.StateCancelled)
	case errors.Is(cause, errDrained):
		e.abortProbe(false)
		return e.release(ctx, next, "drain", 0)
	case errors.Is(cause, errUnrecorded):
		e.abortProbe(false)
		return e.release(ctx, next, "unrecorded", 0)
	case errors.Is(e.session.err, ErrStorage):
		e.abortProbe(true)
		return e.holdForStorage(ctx, next, e.session.err)
	default:
		return e.failed(ctx, next, errors.Of(e.session.err))
	}
}

// leaseLost settles nothing. That the session is closed is written once that is
// possible, unless another worker has taken the job over.
func (e *execution) leaseLost(r *lifecycle.Record) {
	e.abortProbe(false)
	e.log().Warn().Str("connection_id", r.ConnectionID).Int("session", r.Session).
		Msg("the worker's lease was lost: the session is closed and nothing is settled")
	e.giveUpSession("lease_lost")
	e.nak(nakPause)
}

// finish writes an outcome and what follows from it.
func (e *execution) finish(ctx context.Context, next *lifecycle.Record, outcome lifecycle.State) error {
	if err := e.conclude(ctx, next, outcome); err != nil {
		return err
	}
	return e.afterOutcome(next)
}

// conclude writes an outcome.
func (e *execution) conclude(ctx context.Context, next *lifecycle.Record, outcome lifecycle.State) error {
	next.Conclude(e.w.now(), outcome)
	if outcome == lifecycle.StateDeadLettered {
		next.AfterLetters(e.lettersBefore(ctx))
	}
	failpoint.Here("before_outcome")
	if err := e.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("outcome")
	e.mu.Lock()
	e.result = outcome
	e.mu.Unlock()
	return nil
}

// afterOutcome does what follows from an outcome that this worker has written.
func (e *execution) afterOutcome(next *lifecycle.Record) error {
	e.w.o.Observer.JobDone(e.id.Queue, next.Outcome)
	e.logOutcome(next)
	if err := e.emit(next); err != nil {
		return err
	}
	e.acknowledge()
	return nil
}

// lettersBefore is the newest dead letter there is. The outcome waits but briefly
// for it: where it can't be read every letter may be another job's, and at worst
// this one is written twice.
func (e *execution) lettersBefore(ctx context.Context) uint64 {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	last, err := e.w.o.DeadLetters.Last(ctx)
	if err != nil {
		e.log().Debug().Err(err).Msg("could not look for the newest dead letter")
		return math.MaxUint64
	}
	return last
}

// commit writes a settlement: of a session by its fence, else by the revision
// that was read. Then the next job may start.
func (e *execution) commit(ctx context.Context, next *lifecycle.Record) error {
	write := e.record.Put
	if now := e.record.Current(); now != nil && now.State == lifecycle.StateRunning && e.w.lease.Own(now.WorkerID) && now.Session == next.Session {
		write = e.record.PutFenced
	}
	if err := write(ctx, next); err != nil {
		return err
	}
	e.freeSlot()
	return nil
}

// failed decides what becomes of a failed attempt.
func (e *execution) failed(ctx context.Context, next *lifecycle.Record, fault *errors.Error) error {
	if e.w.keys.Blames(next.AppID, fault) {
		e.abortProbe(false)
		return e.release(ctx, next, "worker_key", e.w.pace.Next("key "+next.AppID, time.Now(), keyPause))
	}
	now := e.w.now()
	decision := e.w.o.Table.Decide(fault, next.Progressed())
	e.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	failure := lifecycle.Failure{Decision: decision, Record: next, Now: now, Deadline: e.notAfter()}
	e.consultCircuit(ctx, &failure, next, fault)
	plan := e.w.o.Retry.Plan(failure, e.w.o.Random)
	if plan.Action == errors.ActionHold {
		plan.Delay = e.untilGivenUp(next, now, plan.Delay)
	}
	at := now.Add(plan.Delay)
	next.Fail(e.errorEvent(next, fault, decision, plan, at), failure.Refused)
	e.logFailure(next, fault, plan)
	switch plan.Action {
	case errors.ActionRetry:
		next.Retry(decision.Code, at)
		return e.postpone(ctx, next, plan.Delay)
	case errors.ActionHold:
		next.Hold(now, at, failure.HeldReason(), "", decision.Code)
		return e.postpone(ctx, next, plan.Delay)
	case errors.ActionExpire:
		return e.finish(ctx, next, lifecycle.StateExpired)
	default:
		next.DeadLetter(plan.Reason)
		return e.finish(ctx, next, lifecycle.StateDeadLettered)
	}
}

// consultCircuit tells the circuit of the failure and learns whether the job
// has to wait for it.
func (e *execution) consultCircuit(ctx context.Context, f *lifecycle.Failure, r *lifecycle.Record, fault *errors.Error) {
	switch app := r.AppID; {
	case fault.Code == errors.CodeBillingRequired && f.Decision.OpensCircuit && e.w.fleet.Lives(app):
		f.Refused = true
		e.abortProbe(true)
		e.log().Warn().Str("app_id", app).
			Msg("the backend refused a session while others of the app live: one too many, not an unpaid bill; set max_sessions of the app to what its plan allows")
	case f.Decision.OpensCircuit || f.Decision.AppWide:
		wait, open, err := e.session.permit.Fail(ctx, f.Decision)
		if err != nil {
			// The job has failed all the same, and that has to count.
			e.log().Error().Err(err).Str("app_id", app).Msg("could not write a failure to the circuit")
		}
		f.Wait, f.CircuitOpen = wait, open
	default:
		e.abortProbe(true)
	}
}

// postpone writes that the job waits, tells it, and hands it back for so long.
func (e *execution) postpone(ctx context.Context, next *lifecycle.Record, delay time.Duration) error {
	failpoint.Here("before_failure")
	if err := e.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("failure")
	if err := e.emit(next); err != nil {
		return err
	}
	failpoint.Here("before_nak")
	if next.CancelRequested { // noticed while it was written: nothing to wait for
		delay = 0
	}
	e.w.o.Observer.Postponed(e.id.ID, next.State, delay)
	e.nak(delay)
	return nil
}

// holdFor says why a job has to wait that may not start, and how long at least
// before it is looked at again.
type holdFor struct {
	reason string
	code   errors.Code // of what opened the circuit; "": it is not for a circuit
	wait   time.Duration
	why    string // in words, for people; "": as the reason says
}

func heldByCircuit(r *circuit.Refusal) holdFor {
	return holdFor{reason: lifecycle.HeldCircuit, code: r.Code, wait: r.Wait}
}

// hold makes a job wait that may not start. A hold that lasts is not told again.
func (e *execution) hold(ctx context.Context, from *lifecycle.Record, h holdFor) error {
	now := e.w.now()
	next := e.settlement(from)
	crowd := h.reason + " " + next.AppID + " " + next.Region
	wait := e.w.pace.Next(crowd, e.begun, h.wait)
	if h.reason != lifecycle.HeldStorage {
		wait = e.untilGivenUp(from, now, wait)
	}
	wait = e.inTime(wait)
	if from != nil && from.State == lifecycle.StateHeld && from.HeldReason == h.reason {
		e.w.o.Observer.Postponed(e.id.ID, lifecycle.StateHeld, wait)
		e.nak(wait)
		return nil
	}
	next.HoldBack(now, now.Add(wait), h.reason, h.why, h.code)
	if h.reason == lifecycle.HeldUnsettled {
		e.w.alarmUnsettled(next)
	}
	return e.postpone(ctx, next, wait)
}

// holdForStorage makes a job wait for our own storage, and alerts.
func (e *execution) holdForStorage(ctx context.Context, from *lifecycle.Record, fault error) error {
	e.w.alarmStorage(e.job.OutputKind(), fault)
	return e.hold(ctx, from, holdFor{reason: lifecycle.HeldStorage, wait: e.w.pace.Spread(storagePause), why: fault.Error()})
}

// storagePause is about how long a job waits for storage before it is looked at
// again.
const storagePause = 10 * time.Second

// unsettledPause is how long a job whose sessions end without a result is left
// before it is looked at again: it does not change by itself.
const unsettledPause = time.Minute

// untilGivenUp bounds the wait of a held job by what is left of circuit.max_hold.
func (e *execution) untilGivenUp(r *lifecycle.Record, now time.Time, wait time.Duration) time.Duration {
	left := e.w.o.MaxHold
	if r != nil {
		left -= r.HeldTotal(now)
	}
	return min(wait, max(left, 0)+time.Millisecond)
}

// release hands back a job whose session was closed unfinished.
func (e *execution) release(ctx context.Context, next *lifecycle.Record, reason string, delay time.Duration) error {
	if next.ConnectionID == "" {
		next.ReleaseUnopened(reason)
	} else {
		next.Release(reason)
	}
	if err := e.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("released")
	if err := e.emit(next); err != nil {
		return err
	}
	e.log().Info().Str("reason", reason).Int("checkpoint", next.Checkpoint).Msg("job handed back unfinished")
	e.nak(delay)
	return nil
}

// superseded drops the result of a session that another worker has replaced.
func (e *execution) superseded(r *lifecycle.Record) {
	e.log().Warn().Int("session", r.Session).Str("connection_id", r.ConnectionID).
		Msg("another worker has taken the job over: the session is closed and its result dropped")
	ctx, cancel := context.WithTimeout(e.w.base, storeTimeout)
	defer cancel()
	e.ackWait.Release()
	body := event.Released{JobFields: e.fields(r), Reason: "superseded", Checkpoint: r.Checkpoint}
	if err := e.w.publisher.Publish(ctx, e.event(event.TypeReleased, r, body)); err != nil {
		e.log().Debug().Err(err).Msg("could not tell that the job was released")
	}
}

// giveUp dead-letters a job without an attempt. It counts and logs only when
// that is written: a message that is looked at for the first time may be a
// duplicate, which the write finds out.
func (e *execution) giveUp(ctx context.Context, from *lifecycle.Record, fault *errors.Error, reason string) error {
	next := e.settlement(from)
	decision := e.w.o.Table.Decide(fault, false)
	plan := lifecycle.Plan{Action: errors.ActionDeadLetter, Reason: reason}
	next.GiveUp(reason, e.errorEvent(next, fault, decision, plan, time.Time{}))
	if err := e.conclude(ctx, next, lifecycle.StateDeadLettered); err != nil {
		return err
	}
	e.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	e.logFailure(next, fault, plan)
	return e.afterOutcome(next)
}

// duplicate acknowledges and drops a message whose job is another's.
func (e *execution) duplicate(ctx context.Context, r *lifecycle.Record) error {
	fields := e.fields(r)
	fields.Run, fields.Time = e.id.Run, e.w.now()
	ev := e.event(event.TypeDuplicate, r, event.Duplicate{JobFields: fields, StreamSeq: e.id.StreamSeq, KeptSeq: r.StreamSeq, CurrentRun: r.Run})
	ev.ID = event.ID(e.id.ID, e.id.Run, 0, event.TypeDuplicate, e.id.StreamSeq)
	ev.Time = fields.Time
	if err := e.tell(ctx, effectEvent, ev); err != nil {
		return err
	}
	e.log().Info().Uint64("kept_seq", r.StreamSeq).Int("current_run", r.Run).Msg("duplicate dropped")
	e.acknowledge()
	return nil
}
