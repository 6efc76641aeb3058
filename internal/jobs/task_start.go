package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// seat is what a job holds while its session may live.
type seat struct {
	ctx  context.Context // of the work; ends when the seat is lost, too
	give func()          // hands back its app's slot
	part func()          // goes out of the gate; nil: there is no seat
}

// work is what a worker holds for a job that it has taken, or is about to take.
type work struct {
	seat

	app     string
	cancel  context.CancelCauseFunc
	undrain func() bool // the drain time ends it no more
	pass    Pass        // of its app's circuit
	before  int         // session number before this one; 0: there was none
	as      string      // why the job had no session

	// What became of the attempt, once its session is closed.
	report Report
	err    error // what the Runner said
	cause  error // why the work was cancelled, if it was
}

// start waits for a seat and takes the job over; false: it is not this worker's.
func (t *task) start(from *Record) (taken bool, err error) {
	draft := t.draft(from)
	ctx, cancel := context.WithCancelCause(t.ctx)
	t.work = work{
		app: draft.AppID, before: draft.Session - 1, as: takenOverAs(t.current(), from),
		cancel: cancel, undrain: t.untilDrained(cancel),
	}
	defer func() {
		if !taken {
			t.leave()
		}
	}()
	if t.work.seat, err = t.sit(ctx, draft); err != nil {
		t.notStarted(err)
		return false, nil
	}
	if pass, err := t.allowed(from, draft); !pass || err != nil {
		return false, err
	}
	return t.takeOver(draft)
}

// draft is the record to take the job over with.
func (t *task) draft(from *Record) *Record {
	return takeover(from, t.job, t.w.o.ID, t.w.limits(), t.w.o.Now().UTC())
}

// untilDrained cancels the work when the drain time is up, unless the function
// returned was called before.
func (t *task) untilDrained(cancel context.CancelCauseFunc) (stop func() bool) {
	return context.AfterFunc(t.w.drained, func() { cancel(context.Cause(t.w.drained)) })
}

// sit waits for a seat: a slot of the app and a place at the gate. Every job
// takes its slot first, so that none waits for a slot that is held by one that
// waits for its place at the gate, and nobody's place stays empty for a job that
// waits for a slot.
func (t *task) sit(ctx context.Context, draft *Record) (s seat, err error) {
	if t.w.fetching.Err() != nil {
		return seat{}, errDrained
	}
	s = seat{ctx: ctx, give: func() {}}
	if t.w.slots.Limits(draft.AppID) {
		waiting, stopWaiting := t.whileFetching(ctx)
		defer stopWaiting()
		if s.ctx, s.give, err = t.w.slots.Take(waiting, ctx, draft.AppID, t.id.ID); err != nil {
			return seat{}, err
		}
	}
	if s.part, err = t.enter(s.ctx, draft); err != nil {
		s.give()
		return seat{}, err
	}
	return s, nil
}

// enter passes the gate; waiting there ends with ctx, whose slot may be lost. A
// job that has a slot does not keep it from others while another runs alone
// here; the one that has to be alone does.
func (t *task) enter(ctx context.Context, draft *Record) (part func(), err error) {
	if draft.Crashes >= aloneAfter {
		return t.enterAlone(ctx, draft)
	}
	part, err = t.w.gate.enterNow()
	if err == nil || t.w.slots.Limits(draft.AppID) {
		return part, err
	}
	waiting, stopWaiting := t.whileFetching(ctx)
	defer stopWaiting()
	return t.w.gate.enter(waiting, false)
}

// errCrowded: sessions beside which the job may not run have not ended in time.
var errCrowded = errors.New("the job is to run alone, and others run on")

// enterAlone keeps new jobs away, and waits for those that run to end; but not
// for as long as a session may last, since meanwhile this worker starts nothing.
func (t *task) enterAlone(ctx context.Context, draft *Record) (part func(), err error) {
	waiting, stopWaiting := t.whileFetching(ctx)
	defer stopWaiting()
	waiting, cancel := context.WithTimeoutCause(waiting, t.patience(), errCrowded)
	defer cancel()
	t.log().Warn().Int("crashes", draft.Crashes).Msg("the job has ended its worker before: it runs alone")
	t.w.pull.pause(true)
	leave, err := t.w.gate.enter(waiting, true)
	if err != nil {
		t.w.pull.pause(false)
		return nil, err
	}
	return func() { leave(); t.w.pull.pause(false) }, nil
}

// patience is how long the job waits to be alone, and then leaves the others in
// peace: longer each time, so that it comes to its turn where sessions are long.
func (t *task) patience() time.Duration {
	return min(t.w.o.AlonePatience<<min(max(t.deliveries, 1)-1, 10), maxAlonePatience)
}

// leave is for a job that this worker runs no longer, or never ran.
func (t *task) leave() {
	if t.work.cancel == nil {
		return
	}
	t.w.deregister(t)
	t.stand()
	t.work.undrain()
	t.work.cancel(nil)
	t.work.cancel = nil
}

// stand gives the seat back, if the job has one.
func (t *task) stand() {
	if t.work.part == nil {
		return
	}
	t.work.give()
	t.work.part()
	t.work.part = nil
}

// vacate lets the next job start: the session is closed and what became of it
// is written, so all that is left could be repeated by anybody. No more jobs are
// left so than the worker runs sessions; one too many keeps its place.
func (t *task) vacate() {
	if t.vacated || !t.w.leftovers.TryAcquire(1) {
		return
	}
	t.vacated = true
	t.stand()
	t.w.freePlace()
}

// whileFetching ends with ctx, or as soon as the worker drains: a job that only
// waits is better off elsewhere.
func (t *task) whileFetching(ctx context.Context) (context.Context, func()) {
	waiting, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(t.w.fetching, func() { cancel(errDrained) })
	return waiting, func() { stop(); cancel(nil) }
}

// notStarted hands a job back that got no seat: that costs it nothing.
func (t *task) notStarted(err error) {
	switch {
	case errors.Is(err, errSlotsBusy), errors.Is(err, errGateShut):
		delay, steady := t.w.slots.comeBack(t.work.app)
		if steady && t.deliveries > 1 {
			t.w.pull.returned(t.msg.queue)
		}
		t.handBack(t.inTime(delay))
	case errors.Is(err, errCrowded):
		t.handBack(t.inTime(t.patience()))
	case errors.Is(err, ErrLeaseLost):
		t.unsettled(err)
	default:
		t.handBack(0)
	}
}

// inTime is a delay after which the job, if its deadline comes first, expires.
func (t *task) inTime(delay time.Duration) time.Duration {
	now := t.w.o.Now()
	if end := t.notAfter(); past(end, now.Add(delay)) {
		return max(end.Sub(now), 0) + time.Millisecond
	}
	return delay
}

// allowed asks the circuit; false: that is open, and the job is held.
func (t *task) allowed(from, draft *Record) (bool, error) {
	if past(t.notAfter(), t.w.o.Now()) { // while it waited
		return false, ErrConflict // look again, and find it expired
	}
	pass, err := t.w.circuits.Allow(t.work.ctx, draft.AppID, draft.Region, t.id.ID)
	if err != nil {
		return false, err
	}
	if !pass.Go {
		settling, cancel := t.settling()
		defer cancel()
		return false, t.hold(settling, from, pass)
	}
	t.work.pass = pass
	return true, nil
}

// takeOver makes the job this worker's; false: it is not.
func (t *task) takeOver(draft *Record) (bool, error) {
	if !t.w.register(t) {
		t.inconclusive(false)
		t.handBack(t.w.o.AckWait / 3)
		return false, nil
	}
	failpoint.Here("before_takeover")
	// Not under the work's context: a drain whose time is up just now would
	// leave it unknown whether the job was taken over, and the next worker would
	// count a crash.
	ctx, cancel := t.settling()
	defer cancel()
	if err := t.put(ctx, draft); err != nil {
		t.inconclusive(false)
		return false, err
	}
	failpoint.Here("takeover")
	return true, nil
}
