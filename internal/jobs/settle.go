package jobs

import (
	"context"
	"math"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// settle writes how an attempt went, then what follows from it, then gives the
// message back or acknowledges it.
func (t *task) settle() {
	ctx, cancel := t.settling()
	defer cancel()
	ctx, span := t.w.o.Tracer.Start(ctx, "settle")
	next := t.next(t.current())
	next.SessionTime += t.work.report.Connected
	err := t.verdict(ctx, next)
	endSpan(span, err)
	if errors.Is(err, errSuperseded) {
		t.inconclusive(false)
		t.superseded(next)
		return
	}
	if err != nil {
		// Not a conflict to look at again: the attempt is over.
		t.unsettled(err)
	}
}

func (t *task) verdict(ctx context.Context, next *Record) error {
	switch {
	case errors.Is(t.work.err, errSuperseded) || errors.Is(t.work.cause, errSuperseded):
		return errSuperseded
	case errors.Is(context.Cause(t.ctx), ErrLeaseLost):
		t.leaseLost(next)
		return nil
	case t.work.err == nil:
		t.inconclusive(false) // a probe that needed no session
		next.Recording = t.work.report.Recording
		t.w.o.Observer.AttemptDone("", "", "")
		return t.finish(ctx, next, StateCompleted)
	case errors.Is(t.work.cause, ErrLeaseLost): // its slot's
		t.leaseLost(next)
		t.handBack(handBackPause)
		return nil
	case errors.Is(t.work.cause, errCancelled):
		next.CancelRequested = true
		t.inconclusive(false)
		return t.finish(ctx, next, StateCancelled)
	case errors.Is(t.work.cause, errDrained):
		t.inconclusive(false)
		return t.release(ctx, next, "drain")
	case errors.Is(t.work.cause, errUnrecorded):
		t.inconclusive(false)
		return t.release(ctx, next, "unrecorded")
	default:
		return t.failed(ctx, next, errors.Of(t.work.err))
	}
}

// leaseLost settles nothing: the next delivery finds the job as it was.
func (t *task) leaseLost(r *Record) {
	t.inconclusive(false)
	t.log().Warn().Str("connection_id", r.ConnectionID).Int("session", r.Session).
		Msg("the lease could not be kept: the session is closed and nothing is settled")
}

// end cancels the work under way, if there is any.
func (t *task) end(why error) {
	t.mu.Lock()
	cancel := t.cancel
	t.mu.Unlock()
	if cancel != nil {
		cancel(why)
	}
}

// finish writes an outcome and what follows from it.
func (t *task) finish(ctx context.Context, next *Record, outcome State) error {
	if err := t.conclude(ctx, next, outcome); err != nil {
		return err
	}
	return t.followOutcome(next)
}

// conclude writes an outcome.
func (t *task) conclude(ctx context.Context, next *Record, outcome State) error {
	next.endHold(t.w.o.Now().UTC())
	next.State, next.Outcome = outcome, outcome
	next.NextAttemptAt = nil
	if outcome == StateDeadLettered {
		next.LettersBefore = t.lettersBefore(ctx)
	}
	failpoint.Here("before_outcome")
	if err := t.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("outcome")
	t.mu.Lock()
	t.result = outcome
	t.mu.Unlock()
	return nil
}

// followOutcome does what follows from an outcome that this worker has written.
func (t *task) followOutcome(next *Record) error {
	t.w.o.Observer.JobDone(t.id.Queue, next.Outcome)
	t.logOutcome(next)
	if err := t.follow(next); err != nil {
		return err
	}
	t.acknowledge()
	return nil
}

// lettersBefore is the newest dead letter there is. The outcome waits but briefly
// for it: where it can't be found out every letter may be another job's, and at
// worst this one is written twice.
func (t *task) lettersBefore(ctx context.Context) uint64 {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	last, err := t.w.o.DeadLetters.Last(ctx)
	if err != nil {
		t.log().Debug().Err(err).Msg("could not look for the newest dead letter")
		return math.MaxUint64
	}
	return last
}

// commit writes a settlement: of a session by its fence, else by the revision
// that was read. Then the next job may start.
func (t *task) commit(ctx context.Context, next *Record) error {
	write := t.put
	if now := t.current(); now != nil && now.State == StateRunning && now.WorkerID == t.w.o.ID && now.Session == next.Session {
		write = t.keep
	}
	if err := write(ctx, next); err != nil {
		return err
	}
	t.vacate()
	return nil
}

// failed decides what becomes of a failed attempt.
func (t *task) failed(ctx context.Context, next *Record, e *errors.Error) error {
	now := t.w.o.Now().UTC()
	decision := t.w.o.Table.Decide(e, next.progressed())
	t.w.o.Observer.AttemptDone(decision.Code, decision.Class, e.Phase)
	setback := Setback{Decision: decision, Record: next, Now: now, Deadline: t.notAfter()}
	t.consultCircuit(ctx, &setback, next, e)
	plan := t.w.o.Retry.Plan(setback, t.w.o.Random)
	if plan.Action == errors.ActionHold {
		plan.Delay = t.untilGivenUp(next, now, plan.Delay)
	}
	at := now.Add(plan.Delay)
	next.LastError = t.errorEvent(next, e, decision, plan, at)
	t.logFailure(next, e, plan)
	if next.Failures == nil {
		next.Failures = make(map[errors.Code]int)
	}
	next.Refusals++
	if !setback.Refused {
		next.Refusals = 0
	}
	switch plan.Action {
	case errors.ActionRetry:
		next.Failures[decision.Code]++
		next.State, next.NextAttemptAt = StateRetrying, &at
		return t.postpone(ctx, next, plan.Delay)
	case errors.ActionHold:
		next.State, next.NextAttemptAt, next.HeldSince = StateHeld, &at, &now
		next.HeldByPolicy = !setback.CircuitOpen && !setback.Refused
		next.Holds++
		return t.postpone(ctx, next, plan.Delay)
	case errors.ActionExpire:
		return t.finish(ctx, next, StateExpired)
	default:
		next.Reason = plan.Reason
		return t.finish(ctx, next, StateDeadLettered)
	}
}

// consultCircuit tells the circuit of the failure and learns whether the job
// has to wait for it.
func (t *task) consultCircuit(ctx context.Context, s *Setback, r *Record, e *errors.Error) {
	app, region := r.AppID, t.circuitRegion()
	switch {
	case e.Code == errors.CodeBillingRequired && s.Decision.OpensCircuit && t.w.fleet.lives(app):
		s.Refused = true
		t.inconclusive(true)
		t.log().Warn().Str("app_id", app).
			Msg("the backend refused a session while others of the app live: one too many, not an unpaid bill; set max_sessions of the app to what its plan allows")
	case s.Decision.OpensCircuit || s.Decision.AppWide:
		wait, open, err := t.w.circuits.Failed(ctx, app, region, t.id.ID, s.Decision, t.work.pass.Probe)
		if err != nil {
			// The job has failed all the same, and that has to count.
			t.log().Error().Err(err).Str("app_id", app).Msg("could not tell the circuit of a failure: going on as if it were closed")
		}
		s.Wait, s.CircuitOpen = wait, open
	default:
		t.inconclusive(true)
	}
}

// postpone writes that the job waits, tells it, and hands it back for so long.
func (t *task) postpone(ctx context.Context, next *Record, delay time.Duration) error {
	failpoint.Here("before_failure")
	if err := t.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("failure")
	if err := t.follow(next); err != nil {
		return err
	}
	failpoint.Here("before_nak")
	if next.CancelRequested { // noticed while it was written: nothing to wait for
		delay = 0
	}
	t.w.o.Observer.Postponed(t.id.ID, next.State, delay)
	t.handBack(delay)
	return nil
}

// hold makes a job wait that may not start. A hold that lasts is not told again.
func (t *task) hold(ctx context.Context, from *Record, pass Pass) error {
	now, wait := t.w.o.Now().UTC(), pass.Wait
	wait = t.untilGivenUp(from, now, t.inTime(wait))
	if from != nil && from.State == StateHeld {
		t.w.o.Observer.Postponed(t.id.ID, StateHeld, wait)
		t.handBack(wait)
		return nil
	}
	at := now.Add(wait)
	next := t.named(from)
	if next.State == StateRetrying {
		next.Attempt++ // the attempt that waits now; the last one is over
	}
	next.State, next.NextAttemptAt, next.HeldSince = StateHeld, &at, &now
	next.HeldCode, next.HeldByPolicy, next.Refusals = pass.Code, false, 0
	next.Holds++
	return t.postpone(ctx, next, wait)
}

// untilGivenUp bounds the wait of a held job by what is left of circuit.max_hold.
func (t *task) untilGivenUp(r *Record, now time.Time, wait time.Duration) time.Duration {
	left := t.w.o.Circuit.MaxHold
	if r != nil {
		left -= r.heldTotal(now)
	}
	return min(wait, max(left, 0)+time.Millisecond)
}

// release hands back a job whose session was closed unfinished.
func (t *task) release(ctx context.Context, next *Record, reason string) error {
	next.State = StateReleased
	next.Reason = reason
	if err := t.commit(ctx, next); err != nil {
		return err
	}
	failpoint.Here("released")
	if err := t.follow(next); err != nil {
		return err
	}
	t.log().Info().Str("reason", reason).Int("checkpoint", next.Checkpoint).Msg("job handed back unfinished")
	t.handBack(0)
	return nil
}

// superseded drops the result of a session that another worker has replaced.
func (t *task) superseded(r *Record) {
	t.log().Warn().Int("session", r.Session).Str("connection_id", r.ConnectionID).
		Msg("another worker has taken the job over: the session is closed and its result dropped")
	ctx, cancel := context.WithTimeout(t.w.base, storeTimeout)
	defer cancel()
	t.lease.Release()
	body := Released{JobFields: t.fields(r), Reason: "superseded", Checkpoint: r.Checkpoint}
	if err := t.w.publisher.Publish(ctx, t.event(EventReleased, r, body)); err != nil {
		t.log().Debug().Err(err).Msg("could not tell that the job was released")
	}
}

// giveUp dead-letters a job without an attempt. It counts and says so only when
// that is written: a message that is looked at for the first time may be a
// duplicate, which the write finds out.
func (t *task) giveUp(ctx context.Context, from *Record, e *errors.Error, reason string) error {
	next := t.named(from)
	decision := t.w.o.Table.Decide(e, false)
	next.Reason, next.NoAttempt = reason, true
	plan := Plan{Action: errors.ActionDeadLetter, Reason: reason}
	next.LastError = t.errorEvent(next, e, decision, plan, time.Time{})
	if err := t.conclude(ctx, next, StateDeadLettered); err != nil {
		return err
	}
	t.w.o.Observer.AttemptDone(decision.Code, decision.Class, e.Phase)
	t.logFailure(next, e, plan)
	return t.followOutcome(next)
}

// duplicate acknowledges and drops a message whose job is another's.
func (t *task) duplicate(ctx context.Context, r *Record) error {
	body := Duplicate{JobFields: t.fields(r), StreamSeq: t.id.StreamSeq, KeptSeq: r.StreamSeq, CurrentRun: r.Run}
	body.Run = t.id.Run
	ev := t.event(EventDuplicate, r, body)
	ev.ID = EventID(t.id.ID, t.id.Run, 0, EventDuplicate, t.id.StreamSeq)
	if err := t.w.publisher.Publish(ctx, ev); err != nil {
		return err
	}
	t.log().Info().Uint64("kept_seq", r.StreamSeq).Int("current_run", r.Run).Msg("duplicate dropped")
	t.acknowledge()
	return nil
}

// repeat does again what follows from an outcome that is there already.
func (t *task) repeat(ctx context.Context) error {
	if err := t.ensureFollowed(ctx); err != nil {
		return err
	}
	t.acknowledge()
	return nil
}

// ensureFollowed repeats what follows from the record as it stands, unless the
// last event of it is there: then all the rest is too.
func (t *task) ensureFollowed(ctx context.Context) error {
	r := t.current()
	told, err := t.w.wasTold(ctx, t.lastEvent(r), r.toldSince())
	if err != nil || told {
		return err
	}
	return t.follow(r)
}
