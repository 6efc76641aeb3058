package jobs

import (
	"cmp"
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

const (
	// settleTimeout bounds a step that decides or publishes something: long enough
	// for an election. A step that does not come through in this time is left to
	// the next delivery, which finds what was written. It is also how long a
	// session waits for its checkpoint to be written.
	settleTimeout = 30 * time.Second
	// resultTimeout bounds writing what a session has reached: it was paid for,
	// and the node that keeps the record may be away for minutes.
	resultTimeout = 10 * time.Minute
	// handBackTimeout bounds all work once the drain time is up: a supervisor kills
	// the process 30 s after that.
	handBackTimeout = 12 * time.Second
	// nakPause is how far apart naks are at first, after a fault of worker or queue.
	nakPause = 2 * time.Second
	// maxClaims bounds how often one delivery is decided again because the
	// record changed meanwhile.
	maxClaims = 10
)

var (
	// errUnrecorded: what the session has reached could not be written.
	errUnrecorded = errors.New("the job's record could not be written: the session was closed and the job handed back")
	// errCancelled: the publisher wants the job to end.
	errCancelled = errors.New("the job was cancelled")
)

// sessionCauses are the errors with which sessions end that did not fail.
var sessionCauses = ledger.Causes{
	Cancelled: errCancelled, Released: []error{errDrained, errUnrecorded}, Lost: lease.ErrLost, Storage: ErrStorage,
}

// execution is one delivery on its way from the fetcher to its acknowledgement:
// claim, admit, run, settle, effects.
type execution struct {
	w       *Worker
	msg     fetch.Delivery
	id      jobspec.Identity
	job     *jobspec.Job  // nil: the message is not a valid job
	invalid *errors.Error // why
	ctx     context.Context
	span    trace.Span
	ackWait *lease.Message
	begun   time.Time

	deliveries uint64 // of the message, as the server counts them: a hint

	record  *lifecycle.Handle
	session sessionRun          // while the job is this worker's
	place   *semaphore.Weighted // what it has in place of its slot, which is another job's already; nil: it has its slot
	done    chan struct{}

	mu      sync.Mutex              // guards what follows
	cancel  context.CancelCauseFunc // of the session under way; nil: there is none
	control Control
	ending  bool            // the publisher wants the job to end
	result  lifecycle.State // the outcome that this execution wrote
	fault   error           // the failure, without secrets
}

// log returns the logger for lines about this job. It is made for each line, because a
// session that is open for hours logs little.
func (e *execution) log() *zerolog.Logger {
	with := e.w.log.With().Str("job_id", e.id.ID).Int("run", e.id.Run).Str("queue", e.id.Queue).Uint64("stream_seq", e.id.StreamSeq)
	// By these ids traces and log lines find each other.
	if span := trace.SpanContextFromContext(e.ctx); span.IsValid() {
		with = with.Stringer("trace_id", span.TraceID()).Stringer("span_id", span.SpanID())
	}
	log := with.Logger()
	return &log
}

// process processes the delivery. What goes wrong in it concerns this
// job alone. What is on the stack from here to the wait for frames stays there as
// long as the session is open, so each step returns before the next begins.
func (e *execution) process() {
	e.ctx, e.begun = e.w.base, time.Now()
	e.ackWait = e.w.lease.Track(e.msg.Reply())
	defer e.close()
	defer e.recoverPanic()
	defer e.endSession()
	if c := (claim{e}); c.claim() {
		e.run()
		e.settlement().settle()
	}
}

// open reads the message and begins its span.
func (e *execution) open() {
	e.read()
	if meta, err := e.msg.Metadata(); err == nil {
		e.deliveries = meta.NumDelivered
	}
	e.record = lifecycle.NewHandle(lifecycle.HandleOptions{
		Store: e.w.store, JobID: e.id.ID, Now: e.w.now, CancelSeen: func() { e.end(errCancelled) },
	})
	e.ctx, e.span = e.w.startProcess(e.ctx, e.msg.Headers(), e.id, e.deliveries)
}

// read reads the message, once.
func (e *execution) read() {
	if e.id.ID != "" {
		return
	}
	e.id, e.job, e.invalid = jobspec.Read(e.msg)
	if e.job != nil {
		e.job.ID = e.id.ID
	}
}

// refused reports whether the circuit of the job's app is known to be open.
func (e *execution) refused() (open bool) {
	if !e.w.circuits.AnyOpen() {
		return false
	}
	var err error
	defer errors.Recover(&err, errors.PhaseJob) // the same panic is handled where the job is processed
	e.read()
	if e.job == nil {
		return false
	}
	d := e.w.defaults()
	return e.w.circuits.Peek(cmp.Or(e.job.GetAppId(), d.AppID), cmp.Or(e.job.GetRegion(), d.Region), e.id.ID) != nil
}

func (e *execution) close() {
	if e.span != nil {
		endSpan(e.span, e.fault)
	}
	close(e.done)
	e.ackWait.Release()
}

// recoverPanic keeps a fault of the worker itself from ending the process.
func (e *execution) recoverPanic() {
	if v := recover(); v != nil {
		e.fault = fmt.Errorf("fault of the worker: %v", v)
		e.log().Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("panic in the worker: the job is handed back")
		e.abortProbe(false)
		e.releaseSession(lifecycle.ReleasedByFault)
		e.nak(e.w.o.AckWait)
	}
}

// releaseSession writes in the record that this worker no longer runs the job, and what
// its session used. Other workers rely on the record as long as the lease is valid. This
// worker starts no other session of the job before that is written, or resultTimeout has
// passed: then what the session used is not lost if it dies.
func (e *execution) releaseSession(reason string) {
	if e.session.ctx == nil { // it did not get as far
		return
	}
	r := e.record.Current()
	if r == nil || r.State != lifecycle.StateRunning || r.Session != e.session.previousSession+1 || !e.w.lease.Own(r.WorkerID) {
		return
	}
	failpoint.Here("giving_up")
	next := r.Clone()
	e.recordClosed(next)
	next.Release(reason)
	e.session.releasing = true
	e.w.register(e) // it still is, except after a panic
	e.w.background.Go(func() {
		ctx, cancel := context.WithTimeout(e.w.base, resultTimeout)
		defer cancel()
		err := retry.Until(ctx, retry.Backoff{Initial: kv.RetryPause, Max: time.Second},
			func(err error) bool {
				// A conflict: the record is older than this worker left it, as in a bucket that was restored.
				return errors.Is(err, lifecycle.ErrSuperseded) || errors.Is(err, kv.ErrConflict) || errors.Is(err, nats.ErrConnectionClosed)
			},
			func() error { return e.record.PutFenced(ctx, next.Clone()) })
		e.w.deregister(e)
		e.settlement().storeUsage(next) // a record that has it may be replaced, or age, before the next delivery
		failpoint.Here("given_up")
		if err != nil && !errors.Is(err, lifecycle.ErrSuperseded) {
			e.log().Warn().Err(err).Msg("could not write that the job was released; it is taken over once this worker's lease ends")
		}
	})
}

// settling bounds a step that decides or publishes something.
func (e *execution) settling() (context.Context, context.CancelFunc) {
	return context.WithTimeout(e.ctx, e.w.o.SettleTimeout)
}

// end cancels the session under way, if there is one.
func (e *execution) end(why error) {
	e.mu.Lock()
	cancel := e.cancel
	e.mu.Unlock()
	if cancel != nil {
		cancel(why)
	}
}

// abortProbe ends a probe that showed nothing about the app; reached says whether it
// got as far as the backend.
func (e *execution) abortProbe(reached bool) {
	if e.session.permit == nil || !e.session.permit.Probe() {
		return
	}
	ctx, cancel := context.WithTimeout(e.w.base, storeTimeout)
	defer cancel()
	if err := e.session.permit.Abort(ctx, reached); err != nil {
		e.log().Warn().Err(err).Msg("could not end the probe of a circuit yet; trying again")
	}
}

// nak gives the message back to the queue; it comes again after delay.
func (e *execution) nak(delay time.Duration) {
	e.ackWait.Release()
	if err := e.msg.NakWithDelay(delay); err != nil {
		e.log().Debug().Err(err).Msg("could not hand the job back; its ack wait will run out")
	}
}

// nakWithBackoff leaves the job to its next delivery, which finds what was
// written and goes on from there. What keeps failing is tried less and less
// often.
func (e *execution) nakWithBackoff(err error) {
	e.log().Warn().Err(err).Msg("the job could not be settled here; it will be delivered again")
	e.nak(nakPause << min(max(e.deliveries, 1)-1, 4))
}

// acknowledge takes the message off the queue.
func (e *execution) acknowledge() {
	failpoint.Here("before_ack")
	confirm := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, storeTimeout)
		defer cancel()
		return e.msg.DoubleAck(ctx)
	}
	acked := func(err error) bool { return errors.Is(err, jetstream.ErrMsgAlreadyAckd) }
	err := confirm(e.ctx)
	if err != nil && !acked(err) {
		ctx, cancel := e.settling()
		defer cancel()
		err = retry.Until(ctx, retry.Backoff{Initial: kv.RetryPause, Max: time.Second}, acked, func() error { return confirm(ctx) })
	}
	if err != nil && !acked(err) {
		e.log().Warn().Err(err).Msg("the acknowledgement was not confirmed; the job may be delivered again, and will find its outcome")
		return
	}
	e.ackWait.Release()
}
