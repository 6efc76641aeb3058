package jobs

import (
	"context"
	"math"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lease"
)

// settle writes how an attempt went and emits what follows from it, then gives
// the message back or acknowledges it. What the session has reached is written as
// long as the record is as this worker left it, even if the lease was lost since:
// compare-and-set decides.
func (e *execution) settle() {
	ctx, cancel := e.w.resultContext(e.ctx)
	defer cancel()
	ctx, span := e.w.o.Tracer.Start(ctx, "settle")
	next := e.next(e.record.current())
	next.SessionTime += e.session.report.Connected
	err := e.verdict(ctx, next)
	endSpan(span, err)
	switch {
	case errors.Is(err, errSuperseded):
		e.abortProbe(false)
		e.superseded(next)
	case err != nil:
		// Not a conflict to look at again: the attempt is over.
		e.giveUpSession("unrecorded")
		e.nakWithBackoff(err)
	}
}

func (e *execution) verdict(ctx context.Context, next *Record) error {
	cause := e.session.cause
	switch {
	case errors.Is(e.session.err, errSuperseded) || errors.Is(cause, errSuperseded):
		return errSuperseded
	case e.session.err == nil:
		e.abortProbe(false) // a probe that needed no session
		next.Recording = e.session.report.Recording
		e.w.o.Observer.AttemptDone("", "", "")
		return e.finish(ctx, next, StateCompleted)
	case errors.Is(cause, lease.ErrLost):
		e.leaseLost(next)
		return nil
	case errors.Is(cause, errCancelled):
		next.CancelRequested = true
		e.abortProbe(false)
		return e.finish(ctx, next, StateCancelled)
	case errors.Is(cause, errDrained):
		e.abortProbe(false)
		return e.release(ctx, next, "drain", 0)
	case errors.Is(cause, errUnrecorded):
		e.abortProbe(false)
		return e.release(ctx, next, "unrecorded", 0)
	case errors.Is(e.session.err, ErrStorage):
		e.abortProbe(true)
		e.begun = time.Now() // the look at the job ends here; what follows is another
		return e.holdForStorage(ctx, next, e.session.err)
	default:
		return e.failed(ctx, next, errors.Of(e.session.err))
	}
}

// leaseLost settles nothing. That the session is closed is written once that is
// possible, unless another worker has taken the job over.
func (e *execution) leaseLost(r *Record) {
	e.abortProbe(false)
	e.log().Warn().Str("connection_id", r.ConnectionID).Int("session", r.Session).
		Msg("the worker's lease was lost: the session is closed and nothing is settled")
	e.giveUpSession("lease_lost")
	e.nak(nakPause)
}

// finish writes an outcome and what follows from it.
func (e *execution) finish(ctx context.Context, next *Record, outcome State) error {
	if err := e.conclude(ctx, next, outcome); err != nil {
		return err
	}
	return e.afterOutcome(next)
}

// conclude writes an outcome.
func (e *execution) conclude(ctx context.Context, next *Record, outcome State) error {
	next.endHold(e.w.now())
	next.State, next.Outcome = outcome, outcome
	next.NextAttemptAt, next.Unsettled = nil, 0
	if outcome == StateDeadLettered {
		next.LettersBefore = e.lettersBefore(ctx)
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
func (e *execution) afterOutcome(next *Record) error {
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
func (e *execution) commit(ctx context.Context, next *Record) error {
	write := e.record.put
	if now := e.record.current(); now != nil && now.State == StateRunning && e.w.lease.Own(now.WorkerID) && now.Session == next.Session {
		write = e.record.putFenced
	}
	if err := write(ctx, next); err != nil {
		return err
	}
	e.freeSlot()
	return nil
}

// failed decides what becomes of a failed attempt.
func (e *execution) failed(ctx context.Context, next *Record, fault *errors.Error) error {
	if e.w.keys.blames(ctx, next.AppID, fault) {
		e.abortProbe(false)
		return e.release(ctx, next, "worker_key", e.w.pace.next("key "+next.AppID, time.Now(), keyPause))
	}
	now := e.w.now()
	decision := e.w.o.Table.Decide(fault, next.progressed())
	e.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	failure := Failure{Decision: decision, Record: next, Now: now, Deadline: e.notAfter()}
	e.consultCircuit(ctx, &failure, next, fault)
	plan := e.w.o.Retry.Plan(failure, e.w.o.Random)
	if plan.Action == errors.ActionHold {
		plan.Delay = e.untilGivenUp(next, now, plan.Delay)
	}
	at := now.Add(plan.Delay)
	next.LastError = e.errorEvent(next, fault, decision, plan, at)
	e.logFailure(next, fault, plan)
	next.Unsettled = 0
	next.Refusals++
	if !failure.Refused {
		next.Refusals = 0
	}
	switch plan.Action {
	case errors.ActionRetry:
		next.retry(decision.Code, at)
		return e.postpone(ctx, next, plan.Delay)
	case errors.ActionHold:
		next.hold(now, at, failure.heldReason(), "", decision.Code)
		return e.postpone(ctx, next, plan.Delay)
	case errors.ActionExpire:
		return e.finish(ctx, next, StateExpired)
	default:
		next.Reason = plan.Reason
		return e.finish(ctx, next, StateDeadLettered)
	}
}

// consultCircuit tells the circuit of the failure and learns whether the job
// has to wait for it.
func (e *execution) consultCircuit(ctx context.Context, f *Failure, r *Record, fault *errors.Error) {
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
func (e *execution) postpone(ctx context.Context, next *Record, delay time.Duration) error {
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
	return holdFor{reason: HeldCircuit, code: r.Code, wait: r.Wait}
}

// hold makes a job wait that may not start. A hold that lasts is not told again.
func (e *execution) hold(ctx context.Context, from *Record, h holdFor) error {
	now := e.w.now()
	next := e.settlementRecord(from)
	crowd := h.reason + " " + next.AppID + " " + next.Region
	wait := e.w.pace.next(crowd, e.begun, h.wait)
	if h.reason != HeldStorage {
		wait = e.untilGivenUp(from, now, wait)
	}
	wait = e.inTime(wait)
	if from != nil && from.State == StateHeld && from.HeldReason == h.reason {
		e.w.o.Observer.Postponed(e.id.ID, StateHeld, wait)
		e.nak(wait)
		return nil
	}
	if next.State == StateRetrying {
		next.Attempt++ // the attempt that waits now; the last one is over
	}
	next.Refusals = 0
	next.hold(now, now.Add(wait), h.reason, h.why, h.code)
	if h.reason == HeldUnsettled {
		e.w.alarmUnsettled(next)
	}
	return e.postpone(ctx, next, wait)
}

// holdForStorage makes a job wait for our own storage, and alerts.
func (e *execution) holdForStorage(ctx context.Context, from *Record, fault error) error {
	e.w.alarmStorage(e.job.OutputKind(), fault)
	return e.hold(ctx, from, holdFor{reason: HeldStorage, wait: e.w.pace.spread(storagePause), why: fault.Error()})
}

// storagePause is about how long a job waits for storage before it is looked at
// again.
const storagePause = 5 * time.Second

// unsettledPause is how long a job whose sessions end without a result is left
// before it is looked at again: it does not change by itself.
const unsettledPause = time.Minute

// untilGivenUp bounds the wait of a held job by what is left of circuit.max_hold.
func (e *execution) untilGivenUp(r *Record, now time.Time, wait time.Duration) time.Duration {
	left := e.w.o.MaxHold
	if r != nil {
		left -= r.heldTotal(now)
	}
	return min(wait, max(left, 0)+time.Millisecond)
}

// release hands back a job whose session was closed unfinished.
func (e *execution) release(ctx context.Context, next *Record, reason string, delay time.Duration) error {
	if next.ConnectionID == "" { // no session was opened
		next.Unsettled = max(next.Unsettled-1, 0)
	}
	next.release(reason)
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
func (e *execution) superseded(r *Record) {
	e.log().Warn().Int("session", r.Session).Str("connection_id", r.ConnectionID).
		Msg("another worker has taken the job over: the session is closed and its result dropped")
	ctx, cancel := context.WithTimeout(e.w.base, storeTimeout)
	defer cancel()
	e.ackWait.Release()
	body := Released{JobFields: e.fields(r), Reason: "superseded", Checkpoint: r.Checkpoint}
	if err := e.w.publisher.Publish(ctx, e.event(EventReleased, r, body)); err != nil {
		e.log().Debug().Err(err).Msg("could not tell that the job was released")
	}
}

// giveUp dead-letters a job without an attempt. It counts and logs only when
// that is written: a message that is looked at for the first time may be a
// duplicate, which the write finds out.
func (e *execution) giveUp(ctx context.Context, from *Record, fault *errors.Error, reason string) error {
	next := e.settlementRecord(from)
	decision := e.w.o.Table.Decide(fault, false)
	next.Reason, next.NoAttempt = reason, true
	plan := Plan{Action: errors.ActionDeadLetter, Reason: reason}
	next.LastError = e.errorEvent(next, fault, decision, plan, time.Time{})
	if err := e.conclude(ctx, next, StateDeadLettered); err != nil {
		return err
	}
	e.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	e.logFailure(next, fault, plan)
	return e.afterOutcome(next)
}

// duplicate acknowledges and drops a message whose job is another's.
func (e *execution) duplicate(ctx context.Context, r *Record) error {
	fields := e.fields(r)
	fields.Run, fields.Time = e.id.Run, e.w.now()
	ev := e.event(EventDuplicate, r, Duplicate{JobFields: fields, StreamSeq: e.id.StreamSeq, KeptSeq: r.StreamSeq, CurrentRun: r.Run})
	ev.ID = EventID(e.id.ID, e.id.Run, 0, EventDuplicate, e.id.StreamSeq)
	ev.Time = fields.Time
	if err := e.tell(ctx, effectEvent, ev); err != nil {
		return err
	}
	e.log().Info().Uint64("kept_seq", r.StreamSeq).Int("current_run", r.Run).Msg("duplicate dropped")
	e.acknowledge()
	return nil
}
