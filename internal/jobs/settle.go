package jobs

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
)

// settlement writes what became of an execution's job.
type settlement struct{ *execution }

// settlement returns the execution as what writes its result.
func (e *execution) settlement() settlement { return settlement{e} }

// settle writes how an attempt went and emits what follows from it, then gives
// the message back or acknowledges it. What the session has reached is written as
// long as the record is as this worker left it, even if the lease was lost since:
// compare-and-set decides.
func (s settlement) settle() {
	ctx, cancel := context.WithTimeout(s.ctx, resultTimeout)
	defer cancel()
	ctx, span := s.w.o.Tracer.Start(ctx, "settle")
	next := s.record.Current().Clone()
	s.recordClosed(next)
	s.session.sent = s.w.ledger.Send(next, s.session.cause)
	err := s.verdict(ctx, next)
	endSpan(span, err)
	switch {
	case errors.Is(err, lifecycle.ErrSuperseded):
		s.abortProbe(false)
		s.superseded(next)
	case err != nil:
		// The record could not be written: the attempt is over. Or it was written and
		// an effect failed: then there is no session to release.
		s.releaseSession("unrecorded")
		s.nakWithBackoff(err)
	}
}

func (s settlement) verdict(ctx context.Context, next *lifecycle.Record) error {
	cause := s.session.cause
	switch {
	case errors.Is(s.session.err, lifecycle.ErrSuperseded) || errors.Is(cause, lifecycle.ErrSuperseded):
		return lifecycle.ErrSuperseded
	case s.session.err == nil:
		s.abortProbe(false) // a probe that needed no session
		next.SetRecording(s.session.report.Recording)
		s.w.o.Observer.AttemptDone("", "", "")
		return s.finish(ctx, next, lifecycle.StateCompleted)
	case errors.Is(cause, lease.ErrLost):
		s.leaseLost(next)
		return nil
	case errors.Is(cause, errCancelled):
		next.RequestCancel(s.w.now())
		s.abortProbe(false)
		return s.finish(ctx, next, lifecycle.StateCancelled)
	case errors.Is(cause, errDrained):
		s.abortProbe(false)
		return s.release(ctx, next, "drain", 0)
	case errors.Is(cause, errUnrecorded):
		s.abortProbe(false)
		return s.release(ctx, next, "unrecorded", 0)
	case errors.Is(s.session.err, ErrStorage):
		s.abortProbe(true)
		s.begun = time.Now() // restart the clock that measures how long a check takes
		return s.holdForStorage(ctx, next, s.session.err)
	default:
		return s.failed(ctx, next, errors.Of(s.session.err))
	}
}

// leaseLost writes no outcome. That the session is closed is written once that is
// possible, unless another worker has taken the job over.
func (s settlement) leaseLost(r *lifecycle.Record) {
	s.abortProbe(false)
	s.log().Warn().Str("connection_id", r.ConnectionID).Int("session", r.Session).
		Msg("the worker's lease was lost: the session is closed and nothing is settled")
	s.releaseSession("lease_lost")
	s.nak(nakPause)
}

// finish writes an outcome and what follows from it.
func (s settlement) finish(ctx context.Context, next *lifecycle.Record, outcome lifecycle.State) error {
	if err := s.conclude(ctx, next, outcome); err != nil {
		return err
	}
	return s.afterOutcome(next)
}

// conclude writes an outcome.
func (s settlement) conclude(ctx context.Context, next *lifecycle.Record, outcome lifecycle.State) error {
	next.Conclude(s.w.now(), outcome)
	if outcome == lifecycle.StateDeadLettered {
		next.AfterLetters(s.lettersBefore(ctx))
	}
	failpoint.Here("before_outcome")
	if err := s.commitAndFreeSlot(ctx, next); err != nil {
		return err
	}
	failpoint.Here("outcome")
	s.mu.Lock()
	s.result = outcome
	s.mu.Unlock()
	return nil
}

// afterOutcome does what follows from an outcome that this worker has written.
func (s settlement) afterOutcome(next *lifecycle.Record) error {
	s.w.o.Observer.JobDone(s.id.Queue, next.Outcome)
	if next.Outcome == lifecycle.StateDeadLettered {
		s.w.o.Observer.DeadLettered(next.LastError.Code)
	}
	s.logOutcome(next)
	if err := s.effects().emit(next); err != nil {
		return err
	}
	s.acknowledge()
	return nil
}

// lettersBefore returns the sequence of the newest dead letter. It waits only briefly;
// if that can't be read, the letter may be written twice.
func (s settlement) lettersBefore(ctx context.Context) uint64 {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	last, err := s.w.o.DeadLetters.Last(ctx)
	if err != nil {
		s.log().Debug().Err(err).Msg("could not look for the newest dead letter")
		return math.MaxUint64
	}
	return last
}

// commitAndFreeSlot writes a settlement: of a session by its fence, else by the
// revision that was read. Then it frees the slot for the next job.
func (s settlement) commitAndFreeSlot(ctx context.Context, next *lifecycle.Record) error {
	write := s.record.Put
	if now := s.record.Current(); now != nil && now.State == lifecycle.StateRunning && s.w.lease.Own(now.WorkerID) && now.Session == next.Session {
		write = s.record.PutFenced
	}
	if err := write(ctx, next); err != nil {
		return err
	}
	s.freeSlot()
	return nil
}

// failed decides what becomes of a failed attempt.
func (s settlement) failed(ctx context.Context, next *lifecycle.Record, fault *errors.Error) error {
	if s.w.keys.Blames(next.AppID, fault) {
		s.abortProbe(false)
		return s.release(ctx, next, "worker_key", s.w.pace.Next("key "+next.AppID, time.Now(), keyPause))
	}
	now := s.w.now()
	decision := s.w.o.Table.Decide(fault, next.Progressed())
	s.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	failure := lifecycle.Failure{Decision: decision, Record: next, Now: now, Deadline: s.notAfter()}
	s.consultCircuit(ctx, &failure, next, fault)
	plan, err := s.w.o.Retry.Plan(failure, s.w.o.Random)
	if err != nil {
		return err
	}
	if plan.Action == errors.ActionHold {
		plan.Delay = s.untilGivenUp(next, now, plan.Delay)
	}
	at := now.Add(plan.Delay)
	next.Fail(s.events().Error(next, fault, decision, plan, now, at), failure.Refused)
	s.logFailure(next, fault, plan)
	switch plan.Action {
	case errors.ActionRetry:
		next.Retry(decision.Code, at)
		return s.postpone(ctx, next, plan.Delay)
	case errors.ActionHold:
		next.Hold(now, at, failure.HeldReason(), "", decision.Code)
		return s.postpone(ctx, next, plan.Delay)
	case errors.ActionExpire:
		return s.finish(ctx, next, lifecycle.StateExpired)
	case errors.ActionDeadLetter:
		next.DeadLetter(plan.Reason)
		return s.finish(ctx, next, lifecycle.StateDeadLettered)
	default: // never an outcome by mistake: the job stays in the queue
		return fmt.Errorf("the plan of a failure with code %s has the action %q, which settles nothing; this is a fault of the worker: report it", decision.Code, plan.Action)
	}
}

func (s settlement) logFailure(r *lifecycle.Record, fault *errors.Error, plan lifecycle.Plan) {
	var secrets []string
	if s.job != nil {
		secrets = s.job.Secrets()
	}
	level := zerolog.WarnLevel
	if plan.Action == errors.ActionDeadLetter {
		level = zerolog.ErrorLevel
	}
	s.fault = fault.Redact(secrets...)
	s.log().WithLevel(level).Err(s.fault).
		Str("code", string(fault.Code)).Str("phase", string(fault.Phase)).Str("action", string(plan.Action)).
		Int("attempt", r.Attempt).Int("session", r.Session).Str("avatar_id", r.AvatarID).Str("app_id", r.AppID).
		Str("connection_id", r.ConnectionID).Str("req_id", fault.ReqID).Stringer("retry_in", plan.Delay).
		Msg("attempt failed")
}

func (s settlement) logOutcome(r *lifecycle.Record) {
	s.log().Info().Str("outcome", string(r.Outcome)).Int("attempt", r.Attempt).Int("session", r.Session).
		Str("avatar_id", r.AvatarID).Str("app_id", r.AppID).Str("connection_id", r.ConnectionID).
		Int("utterances", r.UtterancesDone).Stringer("session_time", r.SessionTime).
		Msg("job done")
}

// consultCircuit reports the failure to the circuit, which decides whether the job
// has to wait for it.
func (s settlement) consultCircuit(ctx context.Context, f *lifecycle.Failure, r *lifecycle.Record, fault *errors.Error) {
	switch app := r.AppID; {
	case fault.Code == errors.CodeBillingRequired && f.Decision.OpensCircuit && s.w.fleet.HasOpenSession(app):
		f.Refused = true
		s.abortProbe(true)
		level := zerolog.DebugLevel
		if s.w.tooMany.First(app, s.w.now()) {
			level = zerolog.WarnLevel
		}
		s.log().WithLevel(level).Str("app_id", app).
			Msg("the backend refused a session while others of the app live: one too many, not an unpaid bill; set max_sessions of the app to what its plan allows")
	case f.Decision.OpensCircuit || f.Decision.AppWide:
		wait, open, err := s.session.permit.Fail(ctx, f.Decision)
		if err != nil {
			// The job has failed nevertheless, and that has to count.
			s.log().Error().Err(err).Str("app_id", app).Msg("could not write a failure to the circuit")
		}
		f.Wait, f.CircuitOpen = wait, open
	default:
		s.abortProbe(true)
	}
}

// postpone writes and publishes that the job waits, and hands it back for delay.
func (s settlement) postpone(ctx context.Context, next *lifecycle.Record, delay time.Duration) error {
	failpoint.Here("before_failure")
	if err := s.commitAndFreeSlot(ctx, next); err != nil {
		return err
	}
	failpoint.Here("failure")
	if err := s.effects().emit(next); err != nil {
		return err
	}
	failpoint.Here("before_nak")
	if next.CancelRequested { // noticed while it was written: nothing to wait for
		delay = 0
	}
	s.w.o.Observer.Postponed(s.id.ID, next.State, delay)
	s.nak(delay)
	if delay > 0 {
		s.nakIfDueNow(ctx, next)
	}
	return nil
}

// nakIfDueNow ends the delay of a nak that has just been sent, if an operator made the
// job due or cancelled it after the record was written. A retry has sent its own nak
// before ours, and a cancel sends none. If that can't be read, the next delivery reads
// it, soon.
func (s settlement) nakIfDueNow(ctx context.Context, written *lifecycle.Record) {
	switch r, err := s.record.Load(ctx); {
	case err != nil:
		s.nak(nakPause)
	case r != nil && r.Waits() && (r.CancelRequested || r.NextAttemptAt.Before(*written.NextAttemptAt)):
		s.nak(0)
	}
}

// holdFor says why a job that may not start has to wait, and how long at least before
// it is checked again.
type holdFor struct {
	reason   string
	code     errors.Code // of what opened the circuit; "": it is not for a circuit
	wait     time.Duration
	why      string // in words, for people; "": as the reason says
	waitsFor string // those that wait for the same; "": by reason, app and region
}

func heldByCircuit(r *circuit.Refusal) holdFor {
	return holdFor{reason: lifecycle.HeldCircuit, code: r.Code, wait: r.Wait}
}

func (w *Worker) heldByBudget(r *budget.Refusal) holdFor {
	return holdFor{reason: lifecycle.HeldBudget, wait: w.pace.Spread(r.Pause()), why: r.String(), waitsFor: "budget " + r.Key + " " + r.Value}
}

// hold makes a job wait that may not start. A hold that lasts is not published again.
func (s settlement) hold(ctx context.Context, from *lifecycle.Record, h holdFor) error {
	now := s.w.now()
	next := s.unstartedRecord(from)
	wait := s.w.pace.Next(cmp.Or(h.waitsFor, h.reason+" "+next.AppID+" "+next.Region), s.begun, h.wait)
	if lifecycle.HoldCounts(h.reason) {
		wait = s.untilGivenUp(from, now, wait)
	}
	wait = s.inTime(wait)
	if from != nil && from.StaysHeld(h.reason, h.why) {
		if err := s.record.UpdateHeldText(ctx, from, h.why); err != nil {
			return err
		}
		s.w.o.Observer.Postponed(s.id.ID, lifecycle.StateHeld, wait)
		s.nak(wait)
		return nil
	}
	next.HoldBack(now, now.Add(wait), h.reason, h.why, h.code)
	return s.postpone(ctx, next, wait)
}

// holdForStorage makes a job wait for our own storage, and alerts.
func (s settlement) holdForStorage(ctx context.Context, from *lifecycle.Record, fault error) error {
	s.w.alertStorage(s.job.OutputKind(), fault)
	return s.hold(ctx, from, holdFor{reason: lifecycle.HeldStorage, wait: s.w.pace.Spread(storagePause), why: fault.Error()})
}

// storagePause is about how long a job waits before storage is checked again.
const storagePause = 5 * time.Second

// unsettledPause is how long a job whose sessions end without a result is left
// before it is checked again: it does not change by itself.
const unsettledPause = time.Minute

// untilGivenUp bounds the wait of a held job by what is left of circuit.max_hold.
func (s settlement) untilGivenUp(r *lifecycle.Record, now time.Time, wait time.Duration) time.Duration {
	left := s.w.o.MaxHold
	if r != nil {
		left -= r.HeldTotal(now)
	}
	return min(wait, max(left, 0)+time.Millisecond)
}

// release hands back a job whose session was closed unfinished.
func (s settlement) release(ctx context.Context, next *lifecycle.Record, reason string, delay time.Duration) error {
	next.Release(reason)
	if err := s.commitAndFreeSlot(ctx, next); err != nil {
		return err
	}
	failpoint.Here("released")
	if err := s.effects().emit(next); err != nil {
		return err
	}
	s.log().Info().Str("reason", reason).Int("checkpoint", next.Checkpoint).Msg("job handed back unfinished")
	s.nak(delay)
	return nil
}

// superseded drops the result of a session that another worker has replaced. The slot
// becomes free without waiting for what is left to write.
func (s settlement) superseded(r *lifecycle.Record) {
	s.log().Warn().Int("session", r.Session).Str("connection_id", r.ConnectionID).
		Msg("another worker has taken the job over: the session is closed and its result dropped")
	s.ackWait.Release()
	s.w.background.Go(func() {
		s.publishReplaced(r)
		s.storeUsage(r)
	})
}

// publishReplaced publishes that the job was released to the worker that took it over.
func (s settlement) publishReplaced(r *lifecycle.Record) {
	ctx, cancel := context.WithTimeout(s.w.base, s.w.o.SettleTimeout)
	defer cancel()
	events := s.events()
	body := event.Released{JobFields: events.Fields(r), Reason: "superseded", Checkpoint: r.Checkpoint}
	if err := s.w.publisher.Publish(ctx, events.Event(event.TypeReleased, r, body)); err != nil {
		s.log().Debug().Err(err).Msg("could not publish that the job was released")
	}
}

// storeUsage writes to the ledger what a session used that this worker did not settle:
// in place of the estimate, where another worker has taken the job over.
func (s settlement) storeUsage(r *lifecycle.Record) {
	ctx, cancel := context.WithTimeout(s.w.base, resultTimeout)
	defer cancel()
	if err := s.w.ledger.Correct(ctx, r, &s.session.sent); err != nil {
		s.log().Warn().Err(err).Int("session", r.Session).Str("connection_id", r.ConnectionID).
			Msg("could not write to the ledger what a session used: it keeps the estimate, if there is one")
	}
}

// deadLetterUnattempted dead-letters a job without an attempt. It counts and logs only
// after the write: a first delivery may be a duplicate, and then the write fails.
func (s settlement) deadLetterUnattempted(ctx context.Context, from *lifecycle.Record, fault *errors.Error, reason string) error {
	next := s.unstartedRecord(from)
	decision := s.w.o.Table.Decide(fault, false)
	plan := lifecycle.Plan{Action: errors.ActionDeadLetter, Reason: reason}
	next.DeadLetterUnattempted(reason, s.events().Error(next, fault, decision, plan, s.w.now(), time.Time{}))
	if err := s.conclude(ctx, next, lifecycle.StateDeadLettered); err != nil {
		return err
	}
	s.w.o.Observer.AttemptDone(decision.Code, decision.Class, fault.Phase)
	s.logFailure(next, fault, plan)
	return s.afterOutcome(next)
}

// duplicate acknowledges and drops a message that has another job's ID.
func (s settlement) duplicate(r *lifecycle.Record) error {
	events := s.events()
	fields := events.Fields(r)
	fields.Run, fields.Time = s.id.Run, s.w.now()
	ev := events.Event(event.TypeDuplicate, r, event.Duplicate{JobFields: fields, StreamSeq: s.id.StreamSeq, KeptSeq: r.StreamSeq, CurrentRun: r.Run})
	ev.ID = event.ID(s.id.ID, s.id.Run, 0, event.TypeDuplicate, s.id.StreamSeq)
	ev.Time = fields.Time
	if err := s.effects().publishApart(ev); err != nil {
		return err
	}
	s.log().Info().Uint64("kept_seq", r.StreamSeq).Int("current_run", r.Run).Msg("duplicate dropped")
	s.acknowledge()
	return nil
}
