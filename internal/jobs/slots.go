package jobs

import (
	"golang.org/x/sync/semaphore"

	"avatarworker/internal/jobs/fetch"
)

// places are what jobs in hand have that are in no slot.
type places struct {
	finalizing *semaphore.Weighted // executions that gave up their slot
	waiting    *semaphore.Weighted // executions that only check a job and hold it
}

// newPlaces returns places for jobs that are finished beside those in slots.
func newPlaces(slots, finishing int) places {
	return places{semaphore.NewWeighted(int64(finishing)), semaphore.NewWeighted(int64(max(slots, minWaiting)))}
}

// handle takes a delivery from the pull loop; it does not wait for its end.
func (w *Worker) handle(d fetch.Delivery) {
	w.count(1)
	w.executions.Add(1)
	e := &execution{w: w, msg: d, done: make(chan struct{})}
	if e.refused() {
		e.freeSlotFor(w.waiting) // it will be held: the next message may be a job that can run
	}
	w.pool.Start(e)
}

// process brings a delivery to its end.
func (w *Worker) process(e *execution) {
	e.process()
	w.returnPlace(e)
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
