package jobs

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// seat is what a job holds while its session may live.
type seat struct {
	leave func() // the gate
	give  func() // hands back its app's slot
}

// start waits for a seat, takes the job over, runs it and settles it. What is on
// the stack from here to the wait for frames stays there as long as the session
// lives, so whatever needs much of it has a function of its own.
func (t *task) start(from *Record) error {
	draft := t.draft(from)
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	defer t.untilDrained(cancel)()
	if draft.Crashes >= aloneAfter {
		defer t.pausePulling(draft)()
	}
	defer t.leave()
	ctx, err := t.sit(ctx, draft)
	if err != nil {
		return t.notStarted(err)
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

// pausePulling keeps new jobs away from one that runs alone.
func (t *task) pausePulling(draft *Record) (resume func()) {
	t.log().Warn().Int("crashes", draft.Crashes).Msg("the job has ended its worker before: it runs alone")
	t.w.pull.pause(true)
	return func() { t.w.pull.pause(false) }
}

// sit waits for a seat. The returned context is ctx's, and ends when the seat is
// lost.
func (t *task) sit(ctx context.Context, draft *Record) (context.Context, error) {
	waiting, stopWaiting := t.whileFetching(ctx)
	defer stopWaiting()
	leave, err := t.w.gate.enter(waiting, draft.Crashes >= aloneAfter)
	if err != nil {
		return nil, err
	}
	work, give, err := t.w.slots.Take(waiting, ctx, draft.AppID, t.id.ID)
	if err != nil {
		leave()
		return nil, err
	}
	t.seat = seat{leave: leave, give: give}
	return work, nil
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
