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
	// alonePatience is how long it waits for that the first time.
	alonePatience    = 30 * time.Second
	maxAlonePatience = 10 * time.Minute
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
	work    work          // while the job is this worker's
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
// this job alone. What is on the stack from here to the wait for frames stays
// there as long as the session lives, so each step has returned before the next.
func (t *task) process() {
	t.ctx, t.lease = t.w.leases.Hold(t.w.base, t.msg.Reply(), t.msg.from)
	defer t.close()
	defer t.contain()
	defer t.leave()
	if t.take() {
		t.attempt()
		t.settle()
	}
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
		t.inconclusive(false)
		t.handBack(t.w.o.AckWait)
	}
}

// take makes the job this worker's; false: it is brought to its end already, or
// handed back.
func (t *task) take() bool {
	if err := t.open(); err != nil {
		t.unsettled(err)
		return false
	}
	failpoint.Here("delivered")
	if t.w.isDraining() {
		t.handBack(0)
		return false
	}
	// Another worker may change the record between a look at it and the
	// compare-and-set; then the new record decides.
	// A first delivery is taken for a new job's without a look: writing its
	// record tells, because that fails where there is one.
	look := t.deliveries != 1 || t.id.Run != 1
	for range 10 {
		from, starts, err := t.step(look)
		if starts {
			starts, err = t.start(from)
		}
		look = true
		if err == nil {
			return starts
		}
		if !errors.Is(err, ErrConflict) {
			t.unsettled(err)
			return false
		}
	}
	t.log().Warn().Msg("the job's record changes too often to be decided by; the job is handed back")
	t.handBack(handBackPause)
	return false
}

// settling is a context for writing what was decided, while the lease stands.
func (t *task) settling() (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.ctx, t.w.o.SettleTimeout)
}

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
func (t *task) inconclusive(reached bool) {
	if !t.work.pass.Probe {
		return
	}
	ctx, cancel := context.WithTimeout(t.w.base, storeTimeout)
	defer cancel()
	if err := t.w.circuits.Inconclusive(ctx, t.work.app, t.circuitRegion(), t.id.ID, reached); err != nil {
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
