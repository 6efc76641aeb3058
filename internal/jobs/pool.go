package jobs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"avatarworker/internal/jobs/fetch"
)

// pool is the goroutines that process deliveries.
type pool struct {
	working    sync.WaitGroup
	next       chan *execution // to one that is idle
	idle       atomic.Int32
	noMore     chan struct{}       // closed when there is nothing more to process
	finalizing *semaphore.Weighted // executions that gave up their slot
	waiting    *semaphore.Weighted // executions that only check a job and hold it
}

// newPool returns a pool with places for jobs that are finished beside those in slots.
func newPool(slots, finishing int) pool {
	return pool{
		next: make(chan *execution), noMore: make(chan struct{}),
		finalizing: semaphore.NewWeighted(int64(finishing)),
		waiting:    semaphore.NewWeighted(int64(max(slots, minWaiting))),
	}
}

// handle takes a delivery from the pull loop; it does not wait for its end.
func (w *Worker) handle(d fetch.Delivery) {
	w.count(1)
	w.executions.Add(1)
	e := &execution{w: w, msg: d, done: make(chan struct{})}
	if e.refused() {
		e.freeSlotFor(w.waiting) // it will be held: the next message may be a job that can run
	}
	select {
	case w.next <- e: // an idle goroutine waits, with its stack grown already
	default:
		w.working.Add(1)
		go w.work(e)
	}
}

// maxIdle caps the goroutines kept for reuse, which avoids growing new stacks.
const maxIdle = 64

// work brings a delivery to its end, and those that come after it.
func (w *Worker) work(e *execution) {
	defer w.working.Done()
	for e != nil {
		e.process()
		w.returnPlace(e)
		e = w.another()
	}
}

// another waits for the next delivery. It returns nil if enough others wait, or
// there are no more.
func (w *Worker) another() *execution {
	if w.idle.Add(1) > maxIdle {
		w.idle.Add(-1)
		return nil
	}
	select {
	case e := <-w.next:
		w.idle.Add(-1)
		return e
	case <-w.noMore:
		return nil
	}
}

// returnPlace gives back the execution's slot, or the place that it took instead.
func (w *Worker) returnPlace(e *execution) {
	defer w.executions.Done()
	if e.place != nil {
		e.place.Release(1)
		return
	}
	w.freeSlot()
}

// freeSlot makes room for another job.
func (w *Worker) freeSlot() {
	w.count(-1)
	w.pull.Done()
}

func (w *Worker) count(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy += n
	w.o.Observer.SlotsBusy(w.busy, w.o.Concurrency)
}
