package jobs

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/header"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
)

// claim reads the job's record and does what it says. It reports whether the job
// is this worker's now; if not it is at its end already, or handed back.
func (e *execution) claim() bool {
	e.open()
	failpoint.Here("delivered")
	if e.w.isDraining() {
		e.nak(0)
		return false
	}
	// Another worker may change the record between a look at it and the
	// compare-and-set; then the new record decides. A first delivery is taken for
	// a new job's without a look: writing its record shows, because that fails
	// where there is one.
	look := e.deliveries != 1 || e.id.Run != 1
	for range maxClaims {
		from, starts, err := e.dispatch(look)
		if starts {
			starts, err = e.admit(from)
		}
		look = true
		if err == nil {
			return starts
		}
		if !errors.Is(err, kv.ErrConflict) {
			e.nakWithBackoff(err)
			return false
		}
	}
	e.log().Warn().Int("conflicts", maxClaims).Msg("gave up after too many record conflicts; the job is handed back")
	e.nak(nakPause)
	return false
}

// dispatch does what the record says. starts: the job is to be started, from the
// record returned (nil: a run's first delivery); else it is brought to its end.
// kv.ErrConflict: the record has changed, look again.
func (e *execution) dispatch(look bool) (from *Record, starts bool, err error) {
	ctx, cancel := e.settling()
	defer cancel()
	var record *Record
	if look {
		if record, err = e.record.load(ctx); err != nil {
			return nil, false, err
		}
	}
	if err := e.refresh(ctx, record); err != nil {
		return nil, false, err
	}
	now := e.w.now()
	what, wait, err := e.decide(ctx, record, now)
	if err != nil {
		return nil, false, err
	}
	switch what {
	case claimDuplicate:
		return nil, false, e.duplicate(ctx, record)
	case claimEffects:
		return nil, false, e.repeatEffects()
	case claimWait:
		return nil, false, e.wait(ctx, record, wait)
	case claimRunning:
		crashed, free, err := e.released(ctx, record)
		if !free || err != nil {
			return nil, false, err
		}
		from = resumeFrom(record, e.id, crashed, now)
		if crashed && from.Crashes >= suspectAfter {
			return nil, false, e.putOff(ctx, from)
		}
	default:
		if err := e.finishRunBefore(ctx, record); err != nil {
			return nil, false, err
		}
		from = resumeFrom(record, e.id, false, now)
	}
	starts, err = e.begin(ctx, from, now)
	return from, starts, err
}

// refresh writes a waiting job's record again before its bucket forgets it: a
// hold that lasts changes nothing in it, nor does a wait for a session limit.
func (e *execution) refresh(ctx context.Context, record *Record) error {
	switch {
	case record == nil || record.State.Final() || record.State == StateRunning: // the worker that runs it does
		return nil
	case e.w.refresh == 0 || e.w.now().Sub(record.UpdatedAt) < e.w.refresh:
		return nil
	case record.StreamSeq != e.id.StreamSeq:
		return nil
	default:
		return e.record.put(ctx, record.clone())
	}
}

// decide looks further where the record is another message's that has no
// outcome. That message may have been purged: then it will not be delivered, and
// this one takes its place. One that is gone because it was acknowledged had its
// outcome written before, and then no write by this record's revision succeeds.
func (e *execution) decide(ctx context.Context, record *Record, now time.Time) (claimStep, time.Duration, error) {
	if before := afterSeq(e.msg.Headers()); before != 0 {
		if exists, err := e.w.messageExists(ctx, before, e.id.ID); exists || err != nil {
			return claimWait, waitForOutcome, err
		}
	}
	what, wait := decide(record, e.id, now)
	later := what == claimWait && e.id.Run > record.Run && record.State != StateRunning
	if what != claimContend && !later {
		return what, wait, nil
	}
	exists, err := e.w.messageExists(ctx, record.StreamSeq, e.id.ID)
	switch {
	case err != nil:
		return what, wait, err
	case exists && later:
		return claimWait, wait, nil
	case exists:
		return claimDuplicate, 0, nil
	}
	e.log().Warn().Uint64("kept_seq", record.StreamSeq).Str("state", string(record.State)).
		Msg("the job has no outcome and its message is gone from the stream: this one takes its place")
	if later {
		return claimStart, 0, nil // it replaces a run that nothing can end any more
	}
	adopted := record.clone()
	adopted.StreamSeq = e.id.StreamSeq
	what, wait = decide(adopted, e.id, now)
	return what, wait, nil
}

// HeaderAfterSeq is set on a replay that waits for another one of the same job:
// the sequence of that one in the jobs stream.
const HeaderAfterSeq = "Avatar-After-Seq"

// afterSeq is the message that a replay waits for; 0: none.
func afterSeq(h nats.Header) uint64 {
	seq, err := strconv.ParseUint(headerValue(h, HeaderAfterSeq), 10, 64)
	if err != nil {
		return 0
	}
	return seq
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
	body, _ := Decode(msg.Header, msg.Data) // an invalid one has no id of its own
	id := jobIDOf(msg.Header, body)
	if id == "" {
		id = streamJobID(msg.Time, msg.Sequence)
	}
	return id == jobID, nil
}

// wait hands the job back until its time has come.
func (e *execution) wait(ctx context.Context, record *Record, wait time.Duration) error {
	if record.waits() {
		if err := e.ensureEffects(ctx); err != nil {
			return err
		}
	}
	e.nak(wait)
	return nil
}

// released looks whether the worker that the record names still runs the job:
// then the message, which can be delivered a second time meanwhile, is handed
// back. free: it does not. crashed: that worker's lease is gone.
func (e *execution) released(ctx context.Context, record *Record) (crashed, free bool, err error) {
	switch {
	case e.w.execution(e.id.ID) != nil:
		e.nak(e.w.o.AckWait / 3)
		return false, false, nil
	case e.w.lease.Own(record.WorkerID):
		return false, true, nil // this process ran it, and does not any more
	}
	stands, err := e.w.lease.Stands(ctx, record.WorkerID)
	if stands && err == nil {
		e.nak(e.w.o.AckWait / 6)
	}
	return true, !stands && err == nil, err
}

// putOff counts the crash of a suspect and lets some time pass. If another job
// that ran beside it is the guilty one, that job crashes its next worker without
// this one, and is soon a suspect itself.
func (e *execution) putOff(ctx context.Context, next *Record) error {
	wait := suspectPause * e.w.o.AckWait
	at := e.w.now().Add(wait)
	next.release("crash")
	next.NextAttemptAt = &at
	if err := e.record.put(ctx, next); err != nil {
		return err
	}
	e.log().Warn().Int("crashes", next.Crashes).Str("worker_id", next.WorkerID).Stringer("wait", wait).
		Msg("the job was running each time when its worker died: it is a suspect and runs after a pause")
	e.nak(wait)
	return nil
}

// begin checks everything that ends a job before it starts, and reports whether
// it may start.
func (e *execution) begin(ctx context.Context, from *Record, now time.Time) (bool, error) {
	if err := e.finishedBefore(ctx, from); err != nil {
		return false, err
	}
	if from != nil && from.CancelRequested {
		return false, e.finish(ctx, e.settlementRecord(from), StateCancelled)
	}
	if e.invalid != nil {
		return false, e.giveUp(ctx, from, e.invalid, ReasonInvalidJob)
	}
	draft := e.draft(from, "")
	if err, reason := e.hopeless(from, draft, now); err != nil {
		return false, e.giveUp(ctx, from, err, reason)
	}
	if past(e.notAfter(), now) {
		return false, e.finish(ctx, e.settlementRecord(from), StateExpired)
	}
	if from != nil && from.Unsettled >= maxUnsettled {
		return false, e.hold(ctx, from, holdFor{reason: HeldUnsettled, wait: unsettledPause, why: fmt.Sprintf(
			"its last %d sessions settled nothing and finished no utterance, so no more of them are paid for; find out why they end (the worker's log), then cancel the job or publish it again", from.Unsettled)})
	}
	if refusal := e.w.circuits.Peek(draft.AppID, draft.Region, e.id.ID); refusal != nil {
		return false, e.hold(ctx, from, heldByCircuit(refusal))
	}
	return true, nil
}

// hopeless finds what no further attempt could change, and the reason of the
// dead letter that says so.
func (e *execution) hopeless(from, draft *Record, now time.Time) (*errors.Error, string) {
	if err := e.refuse(draft); err != nil {
		return err, ReasonInvalidJob
	}
	switch {
	case from == nil:
		return nil, ""
	case from.Crashes >= crashLimit(draft.MaxAttempts):
		return lostError(from), ReasonWorkerLost
	case e.job.Resume() == OnRedeliveryGiveUp && from.Speaking > from.Checkpoint:
		return spokenError(from), ReasonPermanent
	case from.heldTotal(now) > e.w.o.MaxHold:
		return heldError(from, now), ReasonHeldTooLong
	default:
		return nil, ""
	}
}

// finishedBefore repeats what an earlier delivery left to be told, in case its
// worker died before it had told it.
func (e *execution) finishedBefore(ctx context.Context, from *Record) error {
	if from != nil && (from.waits() || from.State == StateReleased && from.Session > 0) {
		return e.ensureEffects(ctx)
	}
	return nil
}

// finishRunBefore tells the outcome of the run before, in case its worker died
// between the dead letter and the event: once a later run has begun no other
// delivery does. What the stream of events may have forgotten is not told again.
func (e *execution) finishRunBefore(ctx context.Context, r *Record) error {
	if r == nil || r.Run >= e.id.Run || r.State != StateDeadLettered || r.LastError == nil {
		return nil
	}
	if age := e.w.o.Events.CachedInfo().Config.MaxAge; age != 0 && e.w.now().Sub(r.UpdatedAt) > age/2 {
		return nil
	}
	ev := e.lastEvent(r)
	if stored, err := e.w.eventStored(ctx, ev, r.emittedAfter()); err == nil && stored {
		return nil
	}
	return e.w.publisher.Publish(ctx, ev)
}

// refuse finds what makes a valid job impossible under this configuration.
func (e *execution) refuse(draft *Record) *errors.Error {
	switch {
	case draft.AppID == "":
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: the job names no app and the worker's configuration has no app.id; set one of them")
	case !e.w.o.KnownApp(draft.AppID):
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "app_id: no credentials for app %q in the worker's configuration; add it under apps, or correct the job", draft.AppID)
	default:
		return nil
	}
}

// notAfter is the job's deadline; zero: none, or a replay that ignores it.
func (e *execution) notAfter() time.Time {
	ignored, _ := header.Flag(e.msg.Headers(), HeaderIgnoreDeadline) // Read has refused what is neither
	if e.job == nil || ignored {
		return time.Time{}
	}
	return e.job.NotAfter()
}

// HeaderIgnoreDeadline is set on a replay whose deadline does not count.
const HeaderIgnoreDeadline = "Avatar-Ignore-Deadline"
