package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/header"
)

// step does what the record says. starts: the job is to be started, from the
// record returned (nil: a run's first delivery); else it is brought to its end.
// ErrConflict: the record has changed, look again.
func (t *task) step(look bool) (from *Record, starts bool, err error) {
	ctx, cancel := t.settling()
	defer cancel()
	var record *Record
	if look {
		if record, err = t.load(ctx); err != nil {
			return nil, false, err
		}
	}
	if err := t.refresh(ctx, record); err != nil {
		return nil, false, err
	}
	now := t.w.o.Now().UTC()
	what, wait, err := t.decide(ctx, record, now)
	if err != nil {
		return nil, false, err
	}
	switch what {
	case stepDuplicate:
		return nil, false, t.duplicate(ctx, record)
	case stepFollow:
		return nil, false, t.repeat(ctx)
	case stepWait:
		return nil, false, t.wait(ctx, record, wait)
	case stepAsk:
		crashed, theirs := t.ask(ctx, record)
		if theirs {
			return nil, false, nil
		}
		from = prior(record, t.id, crashed, now)
	default:
		if err := t.finishRunBefore(ctx, record); err != nil {
			return nil, false, err
		}
		from = prior(record, t.id, false, now)
	}
	starts, err = t.begin(ctx, from, now)
	return from, starts, err
}

// refresh writes a waiting job's record again before its bucket forgets it: a
// hold that lasts changes nothing in it, nor does a wait for a slot.
func (t *task) refresh(ctx context.Context, record *Record) error {
	switch {
	case record == nil || record.State.Final() || record.State == StateRunning: // who runs it does
		return nil
	case t.w.refresh == 0 || t.w.o.Now().Sub(record.UpdatedAt) < t.w.refresh:
		return nil
	case record.StreamSeq != t.id.StreamSeq:
		return nil
	default:
		return t.put(ctx, record.clone())
	}
}

// decide looks further where the record is another message's that has no
// outcome. That message may have been purged: then nobody will deliver it, and
// this one takes its place. One that is gone because it was acknowledged had its
// outcome written before, and then no write by this record's revision succeeds.
func (t *task) decide(ctx context.Context, record *Record, now time.Time) (step, time.Duration, error) {
	what, wait := decide(record, t.id, now)
	later := what == stepWait && t.id.Run > record.Run && record.State != StateRunning
	if what != stepContend && !later {
		return what, wait, nil
	}
	kept, err := t.w.keeps(ctx, record.StreamSeq, t.id.ID)
	switch {
	case err != nil:
		return what, wait, err
	case kept && later:
		return stepWait, wait, nil
	case kept:
		return stepDuplicate, 0, nil
	}
	t.log().Warn().Uint64("kept_seq", record.StreamSeq).Str("state", string(record.State)).
		Msg("the job has no outcome and its message is no more in the stream: this one takes its place")
	if later {
		return stepStart, 0, nil // it replaces a run that nobody can end any more
	}
	adopted := record.clone()
	adopted.StreamSeq = t.id.StreamSeq
	what, wait = decide(adopted, t.id, now)
	return what, wait, nil
}

// wait hands the job back until its time has come.
func (t *task) wait(ctx context.Context, record *Record, wait time.Duration) error {
	if record.waits() {
		if err := t.ensureFollowed(ctx); err != nil {
			return err
		}
	}
	t.handBack(wait)
	return nil
}

// ask finds out whether the worker that is said to run the job still does: then
// the job is handed back. A message can be delivered a second time although its
// lease stands. crashed: that worker is gone.
func (t *task) ask(ctx context.Context, record *Record) (crashed, theirs bool) {
	got := answerLet
	if record.WorkerID != t.w.o.ID {
		got = t.w.asks.holdsJob(ctx, record.WorkerID, t.id.ID)
	} else if t.w.hasJob(t.id.ID) {
		got = answerHas
	}
	switch got {
	case answerHas:
		t.handBack(t.w.o.AckWait / 3)
		return false, true
	case answerUnknown:
		t.handBack(handBackPause)
		return false, true
	default:
		return got == answerGone, false
	}
}

// begin checks everything that ends a job before it starts; true: it may.
func (t *task) begin(ctx context.Context, from *Record, now time.Time) (bool, error) {
	if err := t.finishedBefore(ctx, from); err != nil {
		return false, err
	}
	if from != nil && from.CancelRequested {
		return false, t.finish(ctx, t.named(from), StateCancelled)
	}
	if t.invalid != nil {
		return false, t.giveUp(ctx, from, t.invalid, ReasonInvalidJob)
	}
	draft := t.draft(from)
	if e, reason := t.hopeless(from, draft, now); e != nil {
		return false, t.giveUp(ctx, from, e, reason)
	}
	if past(t.notAfter(), now) {
		return false, t.finish(ctx, t.named(from), StateExpired)
	}
	if pass := t.w.circuits.Glance(draft.AppID, draft.Region, t.id.ID); !pass.Go {
		return false, t.hold(ctx, from, pass)
	}
	return true, nil
}

// hopeless finds what no further attempt could mend, and the reason of the dead
// letter that says so.
func (t *task) hopeless(from, draft *Record, now time.Time) (*errors.Error, string) {
	if e := t.refuse(draft); e != nil {
		return e, ReasonInvalidJob
	}
	switch {
	case from == nil:
		return nil, ""
	case from.Crashes >= draft.MaxAttempts:
		return lostError(from), ReasonWorkerLost
	case t.job.Resume() == OnRedeliveryGiveUp && from.Speaking > from.Checkpoint:
		return spokenError(from), ReasonPermanent
	case from.heldTotal(now) > t.w.o.Circuit.MaxHold:
		return heldError(from, now), ReasonHeldTooLong
	default:
		return nil, ""
	}
}

// finishedBefore repeats what an earlier delivery left to be told, in case its
// worker died before it had told it.
func (t *task) finishedBefore(ctx context.Context, from *Record) error {
	if from != nil && (from.waits() || from.State == StateReleased && from.Session > 0) {
		return t.ensureFollowed(ctx)
	}
	return nil
}

// finishRunBefore tells the outcome of the run before, in case its worker died
// between the dead letter and the event: once a later run has begun nobody else
// does. What the stream of events may have forgotten is not told again.
func (t *task) finishRunBefore(ctx context.Context, r *Record) error {
	if r == nil || r.Run >= t.id.Run || r.State != StateDeadLettered || r.LastError == nil {
		return nil
	}
	if age := t.w.o.Events.CachedInfo().Config.MaxAge; age != 0 && t.w.o.Now().Sub(r.UpdatedAt) > age/2 {
		return nil
	}
	ev := t.lastEvent(r)
	if told, err := t.w.wasTold(ctx, ev, r.toldSince()); err == nil && told {
		return nil
	}
	return t.w.publisher.Publish(ctx, ev)
}

// refuse finds what makes a valid job impossible under this configuration.
func (t *task) refuse(draft *Record) *errors.Error {
	switch {
	case draft.AppID == "":
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: the job names no app and the worker's configuration has no app.id; set one of them")
	case !t.w.o.KnownApp(draft.AppID):
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: no credentials for app %q in the worker's configuration; add it under apps, or correct the job", draft.AppID)
	default:
		return nil
	}
}

// notAfter is the job's deadline; zero: none, or a replay that ignores it.
func (t *task) notAfter() time.Time {
	ignored, _ := header.Flag(t.msg.Headers(), HeaderIgnoreDeadline) // Read has refused what is neither
	if t.job == nil || ignored {
		return time.Time{}
	}
	return t.job.NotAfter()
}

// HeaderIgnoreDeadline is set on a replay whose deadline does not count.
const HeaderIgnoreDeadline = "Avatar-Ignore-Deadline"
