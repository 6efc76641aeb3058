package jobs

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

const (
	// settleTimeout bounds writing an outcome and what follows from it. A worker
	// that can't do it in this time, long enough for an election, leaves the job
	// to the next delivery, which finds what was written.
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
	// errCancelled: the publisher wants the job to end.
	errCancelled = errors.New("the job was cancelled")
)

// task is one delivery on its way from the pull loop to its acknowledgement.
type task struct {
	w     *Worker
	msg   delivery
	id    Identity
	job   *Job // nil: the message is no valid job
	ctx   context.Context
	lease *Lease
	log   zerolog.Logger
	done  chan struct{} // closed when everything is settled

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

func newTask(w *Worker, d delivery) *task {
	id := Identify(d.Msg, w.stream)
	t := &task{w: w, msg: d, id: id, done: make(chan struct{})}
	t.log = w.log.With().Str("job_id", id.ID).Int("run", id.Run).Str("queue", id.Queue).Uint64("stream_seq", id.StreamSeq).Logger()
	return t
}

// process brings the delivery to its end. Whatever happens in it happens to
// this job alone.
func (t *task) process() {
	ctx, lease := t.w.leases.Hold(t.w.base, t.msg.Reply(), t.msg.from)
	t.lease = lease
	defer lease.Release()
	defer close(t.done)
	if meta, err := t.msg.Metadata(); err == nil {
		t.deliveries = meta.NumDelivered
	}
	ctx, span := t.w.startProcess(ctx, t.msg.Headers(), t.id, t.deliveries)
	t.ctx = ctx
	t.log = withTrace(t.log, span)
	defer func() { endSpan(span, t.fault) }()
	defer t.contain()
	failpoint.Here("delivered")
	if t.w.isDraining() {
		t.handBack(0)
		return
	}
	t.run()
}

// contain keeps a fault of the worker itself from ending the process.
func (t *task) contain() {
	if v := recover(); v != nil {
		t.fault = fmt.Errorf("fault of the worker: %v", v)
		t.log.Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("fault of the worker: the job is handed back")
		t.handBack(t.w.o.AckWait)
	}
}

func (t *task) run() {
	job, invalid := Parse(t.msg.Msg, t.id)
	t.job = job
	// Another worker may change the record between a look at it and the
	// compare-and-set; then the new record decides.
	// A first delivery is taken for a new job's without a look: writing its
	// record tells, because that fails where there is one.
	look := t.deliveries != 1 || t.id.Run != 1
	for range 10 {
		err := t.step(invalid, look)
		look = true
		if err == nil {
			return
		}
		if !errors.Is(err, ErrConflict) {
			t.unsettled(err)
			return
		}
	}
	t.log.Warn().Msg("the job's record changes too often to be decided by; the job is handed back")
	t.handBack(handBackPause)
}

// step does what the record says. ErrConflict: it has changed, look again.
func (t *task) step(invalid *errors.Error, look bool) error {
	ctx, cancel := t.settling()
	defer cancel()
	var record *Record
	if look {
		var err error
		if record, err = t.load(ctx); err != nil {
			return err
		}
	}
	now := t.w.o.Now().UTC()
	what, wait := decide(record, t.id, now)
	switch what {
	case stepDuplicate:
		return t.duplicate(ctx, record)
	case stepFollow:
		return t.repeat(ctx)
	case stepWait:
		if record.waits() {
			if err := t.ensureFollowed(ctx); err != nil {
				return err
			}
		}
		t.handBack(wait)
		return nil
	case stepAsk:
		return t.ask(ctx, record, invalid, now)
	default:
		return t.begin(ctx, prior(record, t.id, false, now), invalid, now)
	}
}

// settling is a context for writing what was decided, while the lease stands.
func (t *task) settling() (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.ctx, settleTimeout)
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

// ask finds out whether the worker that is said to run the job still does. A
// message can be delivered a second time although its lease stands.
func (t *task) ask(ctx context.Context, record *Record, invalid *errors.Error, now time.Time) error {
	got := answerLet
	if record.WorkerID != t.w.o.ID {
		got = t.w.asks.holdsJob(ctx, record.WorkerID, t.id.ID)
	} else if t.w.hasJob(t.id.ID) {
		got = answerHas
	}
	switch got {
	case answerHas:
		t.handBack(t.w.o.AckWait / 3)
		return nil
	case answerUnknown:
		t.handBack(handBackPause)
		return nil
	default:
		return t.begin(ctx, prior(record, t.id, got == answerGone, now), invalid, now)
	}
}

// begin checks everything that ends a job before it starts, then runs it. from
// is the record that it goes on from, nil for a run's first delivery.
func (t *task) begin(ctx context.Context, from *Record, invalid *errors.Error, now time.Time) error {
	if err := t.finishedBefore(ctx, from); err != nil {
		return err
	}
	if from != nil && from.CancelRequested {
		return t.finish(ctx, t.named(from), StateCancelled)
	}
	if invalid != nil {
		return t.giveUp(ctx, from, invalid, ReasonInvalidJob)
	}
	draft := takeover(from, t.job, t.w.o.ID, t.w.limits(), now)
	if err := t.refuse(draft); err != nil {
		return t.giveUp(ctx, from, err, ReasonInvalidJob)
	}
	if from != nil {
		if from.Crashes >= draft.MaxAttempts {
			return t.giveUp(ctx, from, lostError(from), ReasonWorkerLost)
		}
		if t.job.Resume() == OnRedeliveryGiveUp && from.Speaking > from.Checkpoint {
			return t.giveUp(ctx, from, spokenError(from), ReasonPermanent)
		}
		if from.heldTotal(now) > t.w.o.Circuit.MaxHold {
			return t.giveUp(ctx, from, heldError(from, now), ReasonHeldTooLong)
		}
	}
	if past(t.notAfter(), now) {
		return t.finish(ctx, t.named(from), StateExpired)
	}
	if pass := t.w.circuits.Glance(draft.AppID, draft.Region); !pass.Go {
		return t.hold(ctx, from, pass)
	}
	return t.start(from)
}

// finishedBefore repeats what an earlier delivery left to be told, in case its
// worker died before it had told it.
func (t *task) finishedBefore(ctx context.Context, from *Record) error {
	if from != nil && (from.waits() || from.State == StateReleased && from.Session > 0) {
		return t.ensureFollowed(ctx)
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

// start waits for a place and a slot, takes the job over and runs it.
func (t *task) start(from *Record) error {
	draft := takeover(from, t.job, t.w.o.ID, t.w.limits(), t.w.o.Now().UTC())
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	stop := context.AfterFunc(t.w.drained, func() { cancel(context.Cause(t.w.drained)) })
	defer stop()

	alone := draft.Crashes >= aloneAfter
	if alone {
		t.log.Warn().Int("crashes", draft.Crashes).Msg("the job has ended its worker before: it runs alone")
		t.w.pull.pause(true)
		defer t.w.pull.pause(false)
	}
	waiting, stopWaiting := t.whileFetching(ctx)
	defer stopWaiting()
	leave, err := t.w.gate.enter(waiting, alone)
	if err != nil {
		return t.notStarted(err)
	}
	defer leave()
	slotCtx, give, err := t.w.slots.Take(waiting, ctx, draft.AppID, t.id.ID)
	if err != nil {
		return t.notStarted(err)
	}
	defer give()
	if past(t.notAfter(), t.w.o.Now()) { // while it waited
		return ErrConflict // look again, and find it expired
	}
	pass, err := t.w.circuits.Allow(slotCtx, draft.AppID, draft.Region, t.id.ID)
	if err != nil {
		return err
	}
	if !pass.Go {
		settling, cancel := t.settling()
		defer cancel()
		return t.hold(settling, from, pass)
	}
	return t.takeOver(slotCtx, cancel, draft, pass)
}

// takeOver makes the job this worker's, runs it and settles it. cancel ends the
// session.
func (t *task) takeOver(ctx context.Context, cancel context.CancelCauseFunc, draft *Record, pass Pass) error {
	if !t.w.register(t) {
		t.inconclusive(draft.AppID, pass, false)
		t.handBack(t.w.o.AckWait / 3)
		return nil
	}
	defer t.w.deregister(t)
	failpoint.Here("before_takeover")
	// Not under ctx: a drain whose time is up just now would leave it unknown
	// whether the job was taken over, and the next worker would count a crash.
	writing, written := t.settling()
	err := t.put(writing, draft)
	written()
	if err != nil {
		t.inconclusive(draft.AppID, pass, false)
		return err
	}
	failpoint.Here("takeover")
	t.settle(t.attempt(ctx, cancel, draft.Session-1, pass))
	return nil
}

// whileFetching ends with ctx, or as soon as the worker drains: a job that only
// waits is better off elsewhere.
func (t *task) whileFetching(ctx context.Context) (context.Context, func()) {
	waiting, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(t.w.fetching, func() { cancel(errDrained) })
	return waiting, func() { stop(); cancel(nil) }
}

// notStarted hands a job back that got no place: that costs it nothing.
func (t *task) notStarted(err error) error {
	switch {
	case errors.Is(err, errSlotsBusy):
		t.handBack(time.Second + time.Duration(t.w.o.Random()*float64(2*time.Second)))
	case errors.Is(err, ErrLeaseLost):
		t.unsettled(err)
	default:
		t.handBack(0)
	}
	return nil
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
		t.log.Warn().Err(err).Msg("could not end the probe of a circuit; it will run out")
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
		t.log.Debug().Err(err).Msg("could not hand the job back; its lease will run out")
	}
}

// unsettled leaves the job to its next delivery, which finds what was written
// and goes on from there. What keeps failing is tried less and less often.
func (t *task) unsettled(err error) {
	t.log.Warn().Err(err).Msg("the job could not be settled here; it will be delivered again")
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
			t.log.Warn().Err(err).Msg("the acknowledgement was not confirmed; the job may be delivered again, and will find its outcome")
			return
		}
	}
}

func (t *task) doubleAck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	return t.msg.DoubleAck(ctx)
}
