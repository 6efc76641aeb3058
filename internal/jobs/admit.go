package jobs

import (
	"context"
	"time"

	"golang.org/x/sync/semaphore"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/kv"
)

// soleWait is how long a job waits for a session limit where its worker has one
// slot. Other jobs get it meanwhile.
const soleWait = 500 * time.Millisecond

// errSuspect: another suspect runs here.
var errSuspect = errors.New("another job that may have crashed its workers runs here")

// permits are what a job holds while its session may live: its keys of session
// limits, and the place of the one suspect.
type permits struct {
	release func() // nil: there are none
}

// sessionRun is what a worker holds for a job that it has taken over, or is about
// to.
type sessionRun struct {
	permits

	ctx     context.Context // of the session
	cancel  context.CancelCauseFunc
	stops   []func() bool   // what no longer cancels it
	permit  *circuit.Permit // of its app's circuit; nil: not asked yet
	before  int             // session number before this one; 0: there was none
	started string          // why the job had no session

	// What became of the attempt, once its session is closed.
	report Report
	err    error // what the Runner said
	cause  error // why the session was cancelled, if it was
}

// admit waits for the permits and takes the job over. It reports whether the job
// is this worker's now.
func (e *execution) admit(from *Record) (taken bool, err error) {
	holder := e.w.lease.Current()
	if holder == nil {
		e.nak(nakPause)
		return false, nil
	}
	if e.freed != nil { // the circuit has closed meanwhile
		e.nak(0)
		return false, nil
	}
	draft := e.draft(from, holder.ID)
	if e.w.keys.refused(draft.AppID) {
		e.nak(e.w.pace.next("key "+draft.AppID, e.begun, e.w.pace.spread(keyPause)))
		return false, nil
	}
	e.openSession(from, draft, holder)
	defer func() {
		if !taken {
			e.leave()
		}
	}()
	if err := e.acquire(draft); err != nil {
		e.notStarted(draft, err)
		return false, nil
	}
	if fault := e.w.o.Storage.Check(e.ctx, e.job, draft.Checkpoint); fault != nil {
		return false, e.notStored(from, fault)
	}
	if allowed, err := e.allowed(from, draft); !allowed || err != nil {
		return false, err
	}
	return e.takeOver(draft)
}

// notStored ends a job that can never be stored, and holds one that can't be now.
func (e *execution) notStored(from *Record, fault error) error {
	ctx, cancel := e.settling()
	defer cancel()
	if err := errors.Of(fault); err.Code == errors.CodeInvalidJob {
		return e.giveUp(ctx, from, err, ReasonInvalidJob)
	}
	return e.holdForStorage(ctx, from, fault)
}

// openSession prepares what ends the session: the drain, and the loss of the
// worker's lease.
func (e *execution) openSession(from, draft *Record, holder *lease.Holder) {
	ctx, cancel := context.WithCancelCause(e.ctx)
	end := func(by context.Context) func() bool {
		return context.AfterFunc(by, func() { cancel(context.Cause(by)) })
	}
	e.session = sessionRun{
		before: draft.Session - 1, started: startedAs(e.record.current(), from),
		ctx: ctx, cancel: cancel, stops: []func() bool{end(e.w.drained), end(holder.Context())},
	}
}

// draft is the record to take the job over with.
func (e *execution) draft(from *Record, workerID string) *Record {
	return started(from, e.job, workerID, e.w.defaults(), e.w.now())
}

// settlementRecord is the record to settle a job by that was not started here.
func (e *execution) settlementRecord(from *Record) *Record {
	next := e.next(from)
	if e.job != nil {
		next.identify(e.job, e.w.defaults())
	}
	next.StreamSeq, next.Queue = e.id.StreamSeq, e.id.Queue
	return next
}

// next is a copy of r to be changed and written; a new record where there is
// none.
func (e *execution) next(r *Record) *Record {
	if r != nil {
		return r.clone()
	}
	next := &Record{CreatedAt: e.w.now(), JobID: e.id.ID, Run: e.id.Run, StreamSeq: e.id.StreamSeq, Queue: e.id.Queue}
	if e.job != nil {
		next.identify(e.job, e.w.defaults())
	}
	return next
}

// acquire waits for the permits. A suspect takes its place first: it never waits
// for it, so that no key of a limit lies idle meanwhile.
func (e *execution) acquire(draft *Record) error {
	if e.w.fetching.Err() != nil {
		return errDrained
	}
	suspect := draft.Crashes >= suspectAfter
	if suspect && !e.w.suspect.TryAcquire(1) {
		return errSuspect
	}
	release, err := e.acquireLimits(draft)
	if err != nil && suspect {
		e.w.suspect.Release(1)
	}
	if err != nil {
		return err
	}
	e.session.release = func() {
		release()
		if suspect {
			e.w.suspect.Release(1)
		}
	}
	return nil
}

// acquireLimits waits as long as the worker fetches: a job that only waits is
// better off elsewhere.
func (e *execution) acquireLimits(draft *Record) (release func(), err error) {
	job := limited(draft)
	if len(e.w.limits.Names(job)) == 0 {
		return func() {}, nil
	}
	waiting, cancel := context.WithCancelCause(e.session.ctx)
	defer cancel(nil)
	stop := context.AfterFunc(e.w.fetching, func() { cancel(errDrained) })
	defer stop()
	if e.w.o.Concurrency == 1 {
		var end context.CancelFunc
		waiting, end = context.WithTimeoutCause(waiting, soleWait, limit.ErrBusy)
		defer end()
	}
	return e.w.limits.Acquire(waiting, job)
}

func limited(r *Record) limit.Job {
	return limit.Job{ID: r.JobID, App: r.AppID, Avatar: r.AvatarID, Region: r.Region, Queue: r.Queue, Labels: r.Labels}
}

// leave is for a job that this worker no longer runs, or never ran.
func (e *execution) leave() {
	if e.session.cancel == nil {
		return
	}
	e.w.deregister(e)
	e.abortProbe(false)
	e.releasePermits()
	for _, stop := range e.session.stops {
		stop()
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

// freeSlot lets the next job start: the session is closed and its result is
// written, so any worker could do what is left. No more jobs are left so than the
// worker runs sessions; it reports false for one too many, which keeps its slot.
func (e *execution) freeSlot() bool {
	return e.freed != nil || e.freeSlotFor(e.w.finalizing)
}

// freeSlotFor gives the slot back and takes a place of another kind, if there is
// one.
func (e *execution) freeSlotFor(places *semaphore.Weighted) bool {
	if !places.TryAcquire(1) {
		return false
	}
	e.freed = places
	e.releasePermits()
	e.w.freeSlot()
	return true
}

// notStarted hands a job back that got no permits: that costs it nothing.
func (e *execution) notStarted(draft *Record, err error) {
	switch {
	case errors.Is(err, limit.ErrBusy):
		e.postponeFor("limit " + e.w.limits.Names(limited(draft))[0])
	case errors.Is(err, errSuspect):
		e.postponeFor("suspect")
	case errors.Is(err, lease.ErrLost):
		e.nakWithBackoff(err)
	default:
		e.nak(0)
	}
}

// postponeFor hands the job back for as long as the number of jobs that wait for
// the same asks for.
func (e *execution) postponeFor(what string) {
	if e.deliveries > 1 {
		e.w.pull.Returned(e.msg.Queue)
	}
	e.nak(e.inTime(e.w.pace.next(what, e.begun, e.w.pace.spread(minReturn))))
}

// inTime is a delay after which the job, if its deadline comes first, expires.
func (e *execution) inTime(delay time.Duration) time.Duration {
	now := e.w.now()
	if end := e.notAfter(); past(end, now.Add(delay)) {
		return max(end.Sub(now), 0) + time.Millisecond
	}
	return delay
}

// allowed asks the circuit; false: that is open, and the job is held.
func (e *execution) allowed(from, draft *Record) (bool, error) {
	if past(e.notAfter(), e.w.now()) { // while it waited
		return false, kv.ErrConflict // look again, and find it expired
	}
	permit, refusal, err := e.w.circuits.Allow(e.session.ctx, draft.AppID, draft.Region, e.id.ID)
	if err != nil {
		return false, err
	}
	if refusal != nil {
		ctx, cancel := e.settling()
		defer cancel()
		return false, e.hold(ctx, from, heldByCircuit(refusal))
	}
	e.session.permit = permit
	return true, nil
}

// takeOver makes the job this worker's; false: it is not.
func (e *execution) takeOver(draft *Record) (bool, error) {
	if !e.w.register(e) {
		e.nak(e.w.o.AckWait / 3)
		return false, nil
	}
	failpoint.Here("before_takeover")
	// Not under the session's context: a drain whose time is up just now would
	// leave it unknown whether the job was taken over, and the next worker would
	// count a crash.
	ctx, cancel := e.settling()
	defer cancel()
	if err := e.record.put(ctx, draft); err != nil {
		return false, err
	}
	failpoint.Here("takeover")
	return true, nil
}
