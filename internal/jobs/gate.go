package jobs

import (
	"context"

	"golang.org/x/sync/semaphore"

	"avatarworker/internal/errors"
)

// errGateShut says that a job runs alone, or waits for it.
var errGateShut = errors.New("another job runs alone")

// gate lets jobs run side by side, or one of them alone: a job that has killed
// two workers takes no innocent neighbours with it.
type gate struct {
	room  *semaphore.Weighted
	width int64
}

func newGate(width int) *gate {
	return &gate{room: semaphore.NewWeighted(int64(width)), width: int64(width)}
}

// enter waits for a place, alone for the whole gate. The semaphore serves in
// order, so a job that waits to be alone is not overtaken for ever.
func (g *gate) enter(ctx context.Context, alone bool) (leave func(), err error) {
	n := int64(1)
	if alone {
		n = g.width
	}
	if err := g.room.Acquire(ctx, n); err != nil {
		return nil, context.Cause(ctx)
	}
	return func() { g.room.Release(n) }, nil
}

// enterNow takes a place beside others without waiting; errGateShut: it would
// have to.
func (g *gate) enterNow() (leave func(), err error) {
	if !g.room.TryAcquire(1) {
		return nil, errGateShut
	}
	return func() { g.room.Release(1) }, nil
}
