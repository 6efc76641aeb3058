package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// seat is what a job holds while its session may live.
type seat struct {
	give  func() // hands back its app's slot
	leave func() // the gate
}

// start waits for a seat, takes the job over, runs it and settles it. What is on
// the stack from here to the wait for frames stays there as long as the session
// lives, so whatever needs much of it has a function of its own.
func (t *task) start(from *Record) error {
	draft := t.draft(from)
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	defer t.untilDrained(cancel)()
	defer t.leave()
	ctx, err := t.sit(ctx, draft)
	if err != nil {
		return t.notStarted(draft.AppID, err)
	}
	pass, err := t.allowed(ctx, from, draft)
	if pass == nil {
		return err
	}
	if owned, err := t.takeOver(draft, pass); !owned {
		return err
	}
	t.settle(t.attempt(ctx, cancel, draft.Session-1, pass))
	return nil
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

// sit waits for a seat. The returned context is ctx's, and ends when the seat is
// lost. Every job takes its slot first, so that none waits for a slot that is
// held by one that waits for its place at the gate, and nobody's place stays
// empty for a job that waits for a slot.
func (t *task) sit(ctx context.Context, draft *Record) (context.Context, error) {
	waiting, stopWaiting := t.whileFetching(ctx)
	defer stopWaiting()
	work, give, err := t.w.slots.Take(waiting, ctx, draft.AppID, t.id.ID)
	if err != nil {
		return nil, err
	}
	leave, err := t.enter(work, draft)
	if err != nil {
		give()
		return nil, err
	}
	t.seat = seat{give: give, leave: leave}
	return work, nil
}

// enter passes the gate; waiting there ends with work, whose slot may be lost. A
// job that has a slot does not keep it from others while another runs alone
// here; the one that has to be alone does.
func (t *task) enter(work context.Context, draft *Record) (leave func(), err error) {
	waiting, stopWaiting := t.whileFetching(work)
	defer stopWaiting()
	switch {
	case draft.Crashes >= aloneAfter:
		return t.enterAlone(waiting, draft)
	case t.w.slots.Limits(draft.AppID):
		return t.w.gate.enterNow()
	default:
		return t.w.gate.enter(waiting, false)
	}
}

// enterAlone keeps new jobs away, and waits for those that run to end.
func (t *task) enterAlone(waiting context.Context, draft *Record) (func(), error) {
	t.log().Warn().Int("crashes", draft.Crashes).Msg("the job has ended its worker before: it runs alone")
	t.w.pull.pause(true)
	leave, err := t.w.gate.enter(waiting, true)
	if err != nil {
		t.w.pull.pause(false)
		return nil, err
	}
	return func() { leave(); t.w.pull.pause(false) }, nil
}

// leave is for a job that this worker runs no longer.
func (t *task) leave() {
	t.w.deregister(t)
	t.stand()
}

// stand gives the seat back, if the job has one.
func (t *task) stand() {
	if t.seat.leave == nil {
		return
	}
	t.seat.give()
	t.seat.leave()
	t.seat = seat{}
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
func (t *task) notStarted(app string, err error) error {
	switch {
	case errors.Is(err, errSlotsBusy), errors.Is(err, errGateShut):
		delay, steady := t.w.slots.comeBack(app)
		if end := t.notAfter(); past(end, t.w.o.Now().Add(delay)) {
			delay = max(end.Sub(t.w.o.Now()), 0) + time.Millisecond // it expires in time
		}
		if steady && t.deliveries > 1 {
			t.w.pull.returned(t.msg.queue)
		}
		t.handBack(delay)
	case errors.Is(err, ErrLeaseLost):
		t.unsettled(err)
	default:
		t.handBack(0)
	}
	return nil
}

// allowed asks the circuit; nil: where that is open the job is held.
func (t *task) allowed(ctx context.Context, from, draft *Record) (*Pass, error) {
	if past(t.notAfter(), t.w.o.Now()) { // while it waited
		return nil, ErrConflict // look again, and find it expired
	}
	pass, err := t.w.circuits.Allow(ctx, draft.AppID, draft.Region, t.id.ID)
	switch {
	case err != nil:
		return nil, err
	case pass.Go:
		return &pass, nil
	}
	settling, cancel := t.settling()
	defer cancel()
	return nil, t.hold(settling, from, pass)
}

// takeOver makes the job this worker's; false: it is not.
func (t *task) takeOver(draft *Record, pass *Pass) (bool, error) {
	if !t.w.register(t) {
		t.inconclusive(draft.AppID, *pass, false)
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
		t.inconclusive(draft.AppID, *pass, false)
		return false, err
	}
	failpoint.Here("takeover")
	return true, nil
}
