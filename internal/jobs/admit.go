package jobs

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/kv"
)

// soleWait is how long a job waits for a session limit where its worker has one
// slot. Other jobs get it meanwhile.
const soleWait = 500 * time.Millisecond

const (
	// minReturn is about the least time after which a job that waits for others
	// is redelivered.
	minReturn = 2 * time.Second
	// keyPause is about how long a job of an app whose key is refused to this
	// worker stays away.
	keyPause = 2 * time.Second
)

// errSuspect: the job, or one that runs here, may be what crashes its workers.
var errSuspect = errors.New("a job that may have crashed its workers does not run alongside one that was running when a worker died")

// permits are what a job holds while its session may be open: its keys of session
// limits, and its entry in suspect.Jobs.
type permits struct {
	release func() // nil: there are none
}

// sessionRun is what a worker holds for a job that it has taken over, or is about
// to.
type sessionRun struct {
	permits

	ctx             context.Context // of the session
	cancel          context.CancelCauseFunc
	permit          *circuit.Permit // of its app's circuit; nil: not asked yet
	previousSession int             // session number before this one; 0: there was none
	startedAs       string          // why the job had no session
	// reserved gives back what is reserved of its budgets, once the ledger has what
	// it cost; nil: nothing is.
	reserved  func()
	sent      ledger.Sent // the session's usage record on its way to the ledger
	releasing bool        // it stays registered until its record says that it is closed

	// What became of the attempt, once its session is closed.
	report Report
	err    error // what the Runner said
	cause  error // why the session was cancelled, if it was
}

// admission takes an execution's job over.
type admission struct{ *execution }

// admit waits for the permits and takes the job over. It reports whether the job
// is this worker's now.
func (a admission) admit(from *lifecycle.Record) (taken bool, err error) {
	holder := a.w.lease.Current()
	if holder == nil {
		a.nak(nakPause)
		return false, nil
	}
	if a.place != nil { // the circuit has closed meanwhile, or it has just done its effects
		a.backToQueue("slot")
		return false, nil
	}
	draft := a.draft(from, holder.ID)
	if a.w.keys.Refused(draft.AppID) {
		a.nak(a.w.pace.Next("key "+draft.AppID, a.begun, a.w.pace.Spread(keyPause)))
		return false, nil
	}
	a.prepareSession(from, draft, holder)
	defer func() {
		if !taken {
			a.endSession()
		}
	}()
	if err := a.acquire(draft); err != nil {
		a.notStarted(draft, err)
		return false, nil
	}
	if fault := a.w.o.Storage.Reserve(a.ctx, a.job, draft.Checkpoint); fault != nil {
		return false, a.notStored(from, fault)
	}
	if enough, err := a.afford(from, draft); !enough || err != nil {
		return false, err
	}
	if allowed, err := a.allowed(from, draft); !allowed || err != nil {
		return false, err
	}
	return a.takeOver(draft)
}

// notStored ends a job that can never be stored, and holds one that can't be now.
func (a admission) notStored(from *lifecycle.Record, fault error) error {
	ctx, cancel := a.settling()
	defer cancel()
	if err := errors.Of(fault); err.Code == errors.CodeInvalidJob {
		return a.settlement().deadLetterUnattempted(ctx, from, err, lifecycle.ReasonInvalidJob)
	}
	return a.settlement().holdForStorage(ctx, from, fault)
}

// prepareSession prepares what ends the session: the drain and the loss of the
// worker's lease, with the lease's context, and what ends this one alone.
func (a admission) prepareSession(from, draft *lifecycle.Record, holder *lease.Lease) {
	ctx, cancel := context.WithCancelCause(trace.ContextWithSpan(holder.Context(), a.span))
	a.session = sessionRun{
		previousSession: draft.Session - 1, startedAs: lifecycle.StartedAs(a.record.Current(), from),
		ctx: ctx, cancel: cancel,
	}
}

// draft is the record to take the job over with.
func (e *execution) draft(from *lifecycle.Record, workerID string) *lifecycle.Record {
	return lifecycle.Start(from, e.job, workerID, e.w.defaults(), e.w.now())
}

// unstartedRecord is the record to settle a job by that was not started here.
func (e *execution) unstartedRecord(from *lifecycle.Record) *lifecycle.Record {
	return lifecycle.UnstartedRecord(from, e.id, e.job, e.w.defaults(), e.w.now())
}

// acquire waits for the permits. The entry in suspect.Jobs comes first: a job never
// waits for that, so that it holds no key of a limit without using it.
func (a admission) acquire(draft *lifecycle.Record) error {
	if a.w.fetching.Err() != nil {
		return errDrained
	}
	crashes := draft.Crashes // an utterance finished sets the record's to 0
	if !a.w.crashed.Enter(crashes) {
		return errSuspect
	}
	release, err := a.acquireLimits(draft)
	if err != nil {
		a.w.crashed.Leave(crashes)
		return err
	}
	a.session.release = func() {
		release()
		a.w.crashed.Leave(crashes)
	}
	return nil
}

// acquireLimits waits as long as the worker fetches: a job that only waits is
// better off elsewhere.
func (a admission) acquireLimits(draft *lifecycle.Record) (release func(), err error) {
	job := limited(draft)
	if len(a.w.limits.Names(job)) == 0 {
		return func() {}, nil
	}
	waiting, cancel := context.WithCancelCause(a.session.ctx)
	defer cancel(nil)
	stop := context.AfterFunc(a.w.fetching, func() { cancel(errDrained) })
	defer stop()
	if a.w.o.Concurrency == 1 {
		var end context.CancelFunc
		waiting, end = context.WithTimeoutCause(waiting, soleWait, limit.ErrBusy)
		defer end()
	}
	return a.w.limits.Acquire(waiting, job)
}

func limited(r *lifecycle.Record) limit.Job {
	return limit.Job{ID: r.JobID, App: r.AppID, Avatar: r.AvatarID, Region: r.Region, Queue: r.Queue, Labels: r.Labels}
}

// endSession is called when this worker no longer runs the job, or never ran it. It
// cancels the session's context, and returns the permits and what is reserved. It does
// nothing if there is no session, or the second time.
func (e *execution) endSession() {
	if e.session.cancel == nil {
		return
	}
	if !e.session.releasing {
		e.w.deregister(e)
	}
	e.abortProbe(false)
	e.releasePermits()
	if e.session.reserved != nil {
		e.session.reserved()
		e.session.reserved = nil
	}
	e.session.cancel(nil)
	e.session.cancel = nil
}

// releasePermits gives the permits back, if the job has any.
func (e *execution) releasePermits() {
	if e.session.release == nil {
		return
	}
	e.session.release()
	e.session.release = nil
}

// freeSlot lets the next job start: the session is closed and its result is written,
// so any worker could do what is left. At most InHand minus Concurrency jobs may be at
// that step; it returns false for one more, which keeps its slot.
func (e *execution) freeSlot() bool {
	return e.place != nil || e.freeSlotFor(e.w.finalizing)
}

// freeSlotFor gives the slot back and takes a place of another kind, if one is left.
func (e *execution) freeSlotFor(places *semaphore.Weighted) bool {
	if !places.TryAcquire(1) {
		return false
	}
	e.place = places
	e.releasePermits()
	e.w.freeSlot()
	return true
}

// notStarted hands a job back that got no permits: that costs it nothing.
func (a admission) notStarted(draft *lifecycle.Record, err error) {
	switch {
	case errors.Is(err, limit.ErrBusy):
		a.backToQueue("limit " + a.w.limits.Names(limited(draft))[0])
	case errors.Is(err, errSuspect):
		a.backToQueue("suspect")
	case errors.Is(err, lease.ErrLost):
		a.nakWithBackoff(err)
	default:
		a.nak(0)
	}
}

// backToQueue hands the job back. waitsFor names what it waits for: the more jobs
// wait for the same, the later it comes again.
func (e *execution) backToQueue(waitsFor string) {
	if e.deliveries > 1 {
		e.w.pull.Returned(e.msg.Queue)
	}
	e.nak(e.inTime(e.w.pace.Next(waitsFor, e.begun, e.w.pace.Spread(minReturn))))
}

// inTime is a delay after which the job, if its deadline comes first, expires.
func (e *execution) inTime(delay time.Duration) time.Duration {
	now := e.w.now()
	if end := e.notAfter(); lifecycle.Past(end, now.Add(delay)) {
		return max(end.Sub(now), 0) + time.Millisecond
	}
	return delay
}

// afford reserves the session under the budgets of its job; false: there is not
// enough left, and the job is held.
func (a admission) afford(from, draft *lifecycle.Record) (bool, error) {
	if a.w.budgets == nil {
		return true, nil
	}
	ctx, cancel := a.settling()
	defer cancel()
	release, refusal, err := a.w.budgets.Reserve(ctx, budgeted(draft))
	if err != nil {
		return false, err
	}
	if refusal != nil {
		return false, a.settlement().hold(ctx, from, a.w.heldByBudget(refusal))
	}
	a.session.reserved = release
	return true, nil
}

func budgeted(r *lifecycle.Record) budget.Job { return budget.Job{App: r.AppID, Labels: r.Labels} }

// allowed asks the circuit; false: that is open, and the job is held.
func (a admission) allowed(from, draft *lifecycle.Record) (bool, error) {
	if lifecycle.Past(a.notAfter(), a.w.now()) { // while it waited
		return false, kv.ErrConflict // the record is read again, and the job found expired
	}
	permit, refusal, err := a.w.circuits.Allow(a.session.ctx, draft.AppID, draft.Region, a.id.ID)
	if err != nil {
		return false, err
	}
	if refusal != nil {
		ctx, cancel := a.settling()
		defer cancel()
		return false, a.settlement().hold(ctx, from, heldByCircuit(refusal))
	}
	a.session.permit = permit
	return true, nil
}

// takeOver makes the job this worker's; false: it is not.
func (a admission) takeOver(draft *lifecycle.Record) (bool, error) {
	if !a.w.register(a.execution) {
		a.nak(a.w.o.AckWait / 3)
		return false, nil
	}
	failpoint.Here("before_takeover")
	if a.session.ctx.Err() != nil { // the lease is lost, as after a freeze, or the drain's time is up
		a.notStarted(draft, context.Cause(a.session.ctx))
		return false, nil
	}
	// Not under the session's context: a drain whose time is up just now would
	// leave it unknown whether the job was taken over, and the next worker would
	// count a crash.
	ctx, cancel := a.settling()
	defer cancel()
	draft.Begin(a.w.now())
	if err := a.record.Put(ctx, draft); err != nil {
		return false, err
	}
	failpoint.Here("takeover")
	return true, nil
}
