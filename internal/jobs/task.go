package jobs

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

const (
	// settleTimeout bounds writing an outcome and what follows from it. A worker
	// that can't do it in this time, long enough for an election, leaves the job
	// to the next delivery, which finds what was written.
	// It is also how long a session waits for what it has reached to be written.
	settleTimeout = 30 * time.Second
	// handBackPause is the delay of a hand-back after a fault of the worker or
	// of the queue, so that nothing spins.
	handBackPause = 2 * time.Second
	// aloneAfter is the number of crashes after which a job runs alone.
	aloneAfter = 2
)

var (
	// errSuperseded: another worker has taken the job over.
	errSuperseded = errors.New("another worker has taken the job over")
	// errUnrecorded: what the session has reached could not be written down.
	errUnrecorded = errors.New("the job's record could not be written: the session is closed, the job handed back")
	// errCancelled: the publisher wants the job to end.
	errCancelled = errors.New("the job was cancelled")
)

// task is one delivery on its way from the pull loop to its acknowledgement.
type task struct {
	w       *Worker
	msg     delivery
	id      Identity
	job     *Job          // nil: the message is no valid job
	invalid *errors.Error // why
	ctx     context.Context
	span    trace.Span
	lease   *Lease
	seat    seat          // while the session may live
	vacated bool          // its place was given to another job already
	done    chan struct{} // closed when everything is settled

	deliveries uint64 // of the message, as the server counts them: a hint

	writing sync.Mutex // held from reading the record to having written it

	mu       sync.Mutex // guards what follows, never held while waiting
	record   *Record    // as last read or written
	revision uint64
	cancel   context.CancelCauseFunc // of the work; nil: none under way
	control  Control
	ending   bool  // the publisher wants the job to end
	result   State // the outcome that this task wrote
	fault    error // the failure that was told, without secrets
}

// log is for lines about this job. It is made when there is something to say: a
// session that lives for hours says little.
func (t *task) log() *zerolog.Logger {
	with := t.w.log.With().Str("job_id", t.id.ID).Int("run", t.id.Run).Str("queue", t.id.Queue).Uint64("stream_seq", t.id.StreamSeq)
	// By these ids traces and log lines find each other.
	if span := trace.SpanContextFromContext(t.ctx); span.IsValid() {
		with = with.Stringer("trace_id", span.TraceID()).Stringer("span_id", span.SpanID())
	}
	log := with.Logger()
	return &log
}

// process brings the delivery to its end. Whatever happens in it happens to
// this job alone.
func (t *task) process() {
	t.ctx, t.lease = t.w.leases.Hold(t.w.base, t.msg.Reply(), t.msg.from)
	defer t.close()
	defer t.contain()
	if err := t.open(); err != nil {
		t.unsettled(err)
		return
	}
	failpoint.Here("delivered")
	if t.w.isDraining() {
		t.handBack(0)
		return
	}
	t.run()
}

// open reads the message and begins its span.
func (t *task) open() (err error) {
	t.id, t.job, t.invalid = Read(t.msg.Msg)
	if t.id.ID == "" {
		t.id.ID, err = t.w.nameByStream(t.ctx, t.id.StreamSeq)
	}
	if t.job != nil {
		t.job.ID = t.id.ID
	}
	if meta, err := t.msg.Metadata(); err == nil {
		t.deliveries = meta.NumDelivered
	}
	t.ctx, t.span = t.w.startProcess(t.ctx, t.msg.Headers(), t.id, t.deliveries)
	return err
}

func (t *task) close() {
	if t.span != nil {
		endSpan(t.span, t.fault)
	}
	close(t.done)
	t.lease.Release()
}

// contain keeps a fault of the worker itself from ending the process.
func (t *task) contain() {
	if v := recover(); v != nil {
		t.fault = fmt.Errorf("fault of the worker: %v", v)
		t.log().Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("fault of the worker: the job is handed back")
		t.handBack(t.w.o.AckWait)
	}
}

func (t *task) run() {
	// Another worker may change the record between a look at it and the
	// compare-and-set; then the new record decides.
	// A first delivery is taken for a new job's without a look: writing its
	// record tells, because that fails where there is one.
	look := t.deliveries != 1 || t.id.Run != 1
	for range 10 {
		from, starts, err := t.step(look)
		if starts {
			err = t.start(from)
		}
		look = true
		if err == nil {
			return
		}
		if !errors.Is(err, ErrConflict) {
			t.unsettled(err)
			return
		}
	}
	t.log().Warn().Msg("the job's record changes too often to be decided by; the job is handed back")
	t.handBack(handBackPause)
}

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
	if what != stepContend {
		return what, wait, nil
	}
	kept, err := t.w.keeps(ctx, record.StreamSeq, t.id.ID)
	if err != nil || kept {
		return stepDuplicate, 0, err
	}
	t.log().Warn().Uint64("kept_seq", record.StreamSeq).Str("state", string(record.State)).
		Msg("the job has no outcome and its message is no more in the stream: this one takes its place")
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

// settling is a context for writing what was decided, while the lease stands.
func (t *task) settling() (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.ctx, t.w.o.SettleTimeout)
}

// load reads the job's record; nil: there is none.
func (t *task) load(ctx context.Context) (*Record, error) {
	record := new(Record)
	revision, err := t.w.store.Get(ctx, t.id.ID, record)
	if err != nil {
		return nil, err
	}
	if revision == 0 {
		record = nil
	}
	t.mu.Lock()
	t.record, t.revision = record, revision
	t.mu.Unlock()
	return record, nil
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
	if ev := t.lastEvent(r); !t.w.isLastEvent(ctx, ev) {
		return t.w.publisher.Publish(ctx, ev)
	}
	return nil
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
	if t.job == nil || headerValue(t.msg.Headers(), HeaderIgnoreDeadline) == "true" {
		return time.Time{}
	}
	return t.job.NotAfter()
}

// HeaderIgnoreDeadline is set on a replay whose deadline does not count.
const HeaderIgnoreDeadline = "Avatar-Ignore-Deadline"

func (w *Worker) limits() limits {
	return limits{appID: w.o.DefaultApp, region: w.o.DefaultRegion, maxAttempts: w.o.Retry.MaxAttempts}
}

// named is the record to settle a job by that was not started here.
func (t *task) named(from *Record) *Record {
	next := t.next(from)
	if t.job != nil {
		next.identify(t.job, t.w.limits())
	}
	next.StreamSeq, next.Queue = t.id.StreamSeq, t.id.Queue
	return next
}

// inconclusive ends a probe that told nothing of the app; reached says whether
// it got as far as the backend.
func (t *task) inconclusive(app string, pass Pass, reached bool) {
	if !pass.Probe {
		return
	}
	ctx, cancel := context.WithTimeout(t.w.base, storeTimeout)
	defer cancel()
	if err := t.w.circuits.Inconclusive(ctx, app, t.circuitRegion(), t.id.ID, reached); err != nil {
		t.log().Warn().Err(err).Msg("could not end the probe of a circuit; it will run out")
	}
}

// handBack gives the message back to the queue; it comes again after delay. One
// whose lease is lost is not this worker's to give: somebody else may have it.
func (t *task) handBack(delay time.Duration) {
	if errors.Is(context.Cause(t.ctx), ErrLeaseLost) {
		return
	}
	t.lease.Release()
	if err := t.msg.NakWithDelay(delay); err != nil {
		t.log().Debug().Err(err).Msg("could not hand the job back; its lease will run out")
	}
}

// unsettled leaves the job to its next delivery, which finds what was written
// and goes on from there. What keeps failing is tried less and less often.
func (t *task) unsettled(err error) {
	t.log().Warn().Err(err).Msg("the job could not be settled here; it will be delivered again")
	t.handBack(handBackPause << min(max(t.deliveries, 1)-1, 4))
}

// acknowledge takes the message off the queue.
func (t *task) acknowledge() {
	ctx, cancel := t.settling()
	defer cancel()
	failpoint.Here("before_ack")
	for {
		err := t.doubleAck(ctx)
		if err == nil || errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
			t.lease.Release()
			return
		}
		if err := pause(ctx, storePause, err); err != nil {
			t.log().Warn().Err(err).Msg("the acknowledgement was not confirmed; the job may be delivered again, and will find its outcome")
			return
		}
	}
}

func (t *task) doubleAck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	return t.msg.DoubleAck(ctx)
}
