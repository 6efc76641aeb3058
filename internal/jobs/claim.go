package jobs

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/header"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
)

// claim reads the record of an execution's job and does what it says.
type claim struct{ *execution }

// claim reads the job's record and does what it says. It reports whether the job
// is this worker's now; if not it is at its end already, or handed back.
func (c claim) claim() bool {
	c.open()
	failpoint.Here("delivered")
	if c.w.isDraining() {
		c.nak(0)
		return false
	}
	// Another worker may change the record between reading it and the
	// compare-and-set; then the new record decides. A first delivery is assumed to
	// be a new job's, and no record is read: if there is one, writing fails.
	read := c.deliveries != 1 || c.id.Run != 1
	for range maxClaims {
		from, starts, err := c.dispatch(read)
		if starts {
			starts, err = admission(c).admit(from)
		}
		read = true
		if err == nil {
			return starts
		}
		if !errors.Is(err, kv.ErrConflict) {
			c.nakWithBackoff(err)
			return false
		}
	}
	c.log().Warn().Int("conflicts", maxClaims).Msg("gave up after too many record conflicts; the job is handed back")
	c.nak(nakPause)
	return false
}

// dispatch does what the record says. starts: the job is to be started, from the
// record returned (nil: a run's first delivery); else it is brought to its end.
// kv.ErrConflict: the record has changed, read it again.
func (c claim) dispatch(read bool) (from *lifecycle.Record, starts bool, err error) {
	ctx, cancel := c.settling()
	defer cancel()
	var record *lifecycle.Record
	if read {
		if record, err = c.record.Load(ctx); err != nil {
			return nil, false, err
		}
	}
	if err := c.refresh(ctx, record); err != nil {
		return nil, false, err
	}
	now := c.w.now()
	what, wait, err := c.decide(ctx, record, now)
	if err != nil {
		return nil, false, err
	}
	switch what {
	case lifecycle.StepDuplicate:
		return nil, false, c.settlement().duplicate(record)
	case lifecycle.StepEffects:
		return nil, false, c.effects().repeatEffects()
	case lifecycle.StepWait:
		return nil, false, c.wait(ctx, record, wait)
	case lifecycle.StepRunning:
		crashed, free, err := c.ownerGone(ctx, record)
		if !free || err != nil {
			return nil, false, err
		}
		from = lifecycle.ContinueFrom(record, c.id, crashed, now)
		if crashed && from != nil && c.w.o.Ledger != nil {
			from.Lost(c.w.lease.Ended(ctx, record.WorkerID))
		}
	default:
		if err := c.finishRunBefore(ctx, record); err != nil {
			return nil, false, err
		}
		from = lifecycle.ContinueFrom(record, c.id, false, now)
	}
	starts, err = c.settleOrStart(ctx, from, now)
	return from, starts, err
}

// refresh writes a waiting job's record again before its bucket forgets it: a
// hold that lasts changes nothing in it, nor does a wait for a session limit.
func (c claim) refresh(ctx context.Context, record *lifecycle.Record) error {
	switch {
	case record == nil || record.State.Final() || record.State == lifecycle.StateRunning: // the worker that runs it does
		return nil
	case c.w.refresh == 0 || c.w.now().Sub(record.UpdatedAt) < c.w.refresh:
		return nil
	case record.StreamSeq != c.id.StreamSeq:
		return nil
	default:
		return c.record.Put(ctx, record.Clone())
	}
}

// decide returns what lifecycle.Decide says, and checks the stream where the record
// has no outcome and belongs to another message of the job. If that message was
// purged it will not be delivered, and this one takes its place. If it was
// acknowledged, its outcome was written before that: the record has a later
// revision, and no write by the revision that was read here succeeds.
func (c claim) decide(ctx context.Context, record *lifecycle.Record, now time.Time) (lifecycle.Step, time.Duration, error) {
	if before := jobspec.AfterSeq(c.msg.Headers()); before != 0 {
		if exists, err := c.w.messageExists(ctx, before, c.id.ID); exists || err != nil {
			return lifecycle.StepWait, lifecycle.WaitForOutcome, err
		}
	}
	what, wait := lifecycle.Decide(record, c.id, now)
	later := what == lifecycle.StepWait && c.id.Run > record.Run && record.State != lifecycle.StateRunning
	if what != lifecycle.StepContend && !later {
		return what, wait, nil
	}
	exists, err := c.w.messageExists(ctx, record.StreamSeq, c.id.ID)
	switch {
	case err != nil:
		return what, wait, err
	case exists && later:
		return lifecycle.StepWait, wait, nil
	case exists:
		return lifecycle.StepDuplicate, 0, nil
	}
	c.log().Warn().Uint64("kept_seq", record.StreamSeq).Str("state", string(record.State)).
		Msg("the job has no outcome and its message is gone from the stream: this one takes its place")
	if later {
		return lifecycle.StepProceed, 0, nil // it replaces a run that nothing can end any more
	}
	what, wait = lifecycle.Decide(record.Adopt(c.id.StreamSeq), c.id, now)
	return what, wait, nil
}

// messageExists reports whether the message of a job is in the jobs stream.
func (w *Worker) messageExists(ctx context.Context, seq uint64, jobID string) (bool, error) {
	msg, err := leader.Message(ctx, w.o.JS, w.o.Names.JobsStream(), seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("message %d of the jobs stream: %w", seq, err)
	}
	// In a stream that was made again, or restored, it may be another job's.
	body, _ := jobspec.Decode(msg.Header, msg.Data) // an invalid one has no id of its own
	id := jobspec.JobIDOf(msg.Header, body)
	if id == "" {
		id = jobspec.StreamJobID(msg.Time, msg.Sequence)
	}
	return id == jobID, nil
}

// wait hands the job back until its time has come.
func (c claim) wait(ctx context.Context, record *lifecycle.Record, wait time.Duration) error {
	if record.Waits() {
		if err := c.effects().ensureEffects(ctx); err != nil {
			return err
		}
	}
	c.nak(wait)
	return nil
}

// ownerGone checks whether the worker that the record names still runs the job:
// then the message, which can be delivered a second time meanwhile, is handed
// back. free: it does not. crashed, of a job that is free: that worker's lease is gone.
func (c claim) ownerGone(ctx context.Context, record *lifecycle.Record) (crashed, free bool, err error) {
	switch {
	case c.w.execution(c.id.ID) != nil:
		c.nak(c.w.o.AckWait / 3)
		return false, false, nil
	case c.w.lease.Own(record.WorkerID):
		return false, true, nil // this process ran it, and does not any more
	}
	valid, err := c.w.lease.Valid(ctx, record.WorkerID)
	if valid && err == nil {
		c.nak(c.w.o.AckWait / 6)
	}
	return true, !valid && err == nil, err
}

// settleOrStart settles a job that ends, or is held, before it starts, and reports
// whether it may start.
func (c claim) settleOrStart(ctx context.Context, from *lifecycle.Record, now time.Time) (bool, error) {
	if err := c.finishedBefore(ctx, from); err != nil {
		return false, err
	}
	if from != nil && from.CancelRequested {
		return false, c.settlement().finish(ctx, c.unstartedRecord(from), lifecycle.StateCancelled)
	}
	if c.invalid != nil {
		return false, c.settlement().deadLetterUnattempted(ctx, from, c.invalid, lifecycle.ReasonInvalidJob)
	}
	draft := c.draft(from, "")
	if err, reason := c.hopeless(from, draft, now); err != nil {
		return false, c.settlement().deadLetterUnattempted(ctx, from, err, reason)
	}
	if lifecycle.Past(c.notAfter(), now) {
		return false, c.settlement().finish(ctx, c.unstartedRecord(from), lifecycle.StateExpired)
	}
	if from != nil && from.Unsettled >= lifecycle.MaxUnsettled {
		return false, c.settlement().hold(ctx, from, holdFor{reason: lifecycle.HeldUnsettled, wait: unsettledPause, why: fmt.Sprintf(
			"its last %d sessions settled nothing and finished no utterance, so no further session is started; find out why they end (the worker's log), then retry the job (avatarworker retry) or cancel it", from.Unsettled)})
	}
	if refusal := c.w.circuits.Peek(draft.AppID, draft.Region, c.id.ID); refusal != nil {
		return false, c.settlement().hold(ctx, from, heldByCircuit(refusal))
	}
	if refusal := c.w.budgets.Peek(budgeted(draft)); refusal != nil {
		return false, c.settlement().hold(ctx, from, c.w.heldByBudget(refusal))
	}
	return true, nil
}

// hopeless finds what no further attempt could change, and the reason of the
// dead letter that says so.
func (c claim) hopeless(from, draft *lifecycle.Record, now time.Time) (*errors.Error, string) {
	if err := c.refuse(draft); err != nil {
		return err, lifecycle.ReasonInvalidJob
	}
	switch {
	case from == nil:
		return nil, ""
	case from.Crashes >= lifecycle.CrashLimit(draft.MaxAttempts):
		return lifecycle.LostError(from), lifecycle.ReasonWorkerLost
	case c.job.RedeliveryPolicy() == jobspec.OnRedeliveryGiveUp && from.Speaking > from.Checkpoint:
		return lifecycle.SpokenError(from), lifecycle.ReasonPermanent
	case from.HeldTotal(now) > c.w.o.MaxHold:
		return lifecycle.HeldError(from, now), lifecycle.ReasonHeldTooLong
	default:
		return nil, ""
	}
}

// finishedBefore repeats the effects of an earlier delivery, in case its worker
// died before they were done.
func (c claim) finishedBefore(ctx context.Context, from *lifecycle.Record) error {
	if from != nil && (from.Waits() || from.State == lifecycle.StateReleased && from.Session > 0) {
		return c.effects().ensureEffects(ctx)
	}
	return nil
}

// finishRunBefore stores what the run before used, and publishes its dead letter's event,
// in case its worker died before that: once a later run has begun no other delivery does.
// An event that may have aged out of its stream is not published again.
func (c claim) finishRunBefore(ctx context.Context, r *lifecycle.Record) error {
	if r == nil || r.Run >= c.id.Run || !r.State.Final() {
		return nil
	}
	if age := c.w.o.Events.CachedInfo().Config.MaxAge; age != 0 && c.w.now().Sub(r.UpdatedAt) > age/2 {
		return nil
	}
	stored, err := c.effects().stored(ctx, r)
	if err != nil || stored {
		return err
	}
	if err = c.effects().storeUsage(r); err == nil && r.State == lifecycle.StateDeadLettered {
		err = c.effects().publishApart(c.events().Last(r))
	}
	return err
}

// refuse finds what makes a valid job impossible under this configuration.
func (c claim) refuse(draft *lifecycle.Record) *errors.Error {
	switch {
	case draft.AppID == "":
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: the job names no app and the worker's configuration has no app.id; set one of them")
	case !c.w.o.KnownApp(draft.AppID):
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: no credentials for app %q in the worker's configuration; add it under apps, or correct the job", draft.AppID)
	default:
		return nil
	}
}

// notAfter is the job's deadline; zero: none, or a replay that ignores it.
func (e *execution) notAfter() time.Time {
	ignored, _ := header.Flag(e.msg.Headers(), jobspec.HeaderIgnoreDeadline) // Read has refused what is neither
	if e.job == nil || ignored {
		return time.Time{}
	}
	return e.job.NotAfter()
}
