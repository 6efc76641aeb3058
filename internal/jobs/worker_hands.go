package jobs

// handle takes a delivery from the pull loop; it does not wait for its end.
func (w *Worker) handle(d delivery) {
	w.count(1)
	w.tasks.Add(1)
	t := &task{w: w, msg: d, done: make(chan struct{})}
	select {
	case w.next <- t: // a goroutine waits, its stack grown already
	default:
		w.hands.Add(1)
		go w.work(t)
	}
}

// maxResting bounds the goroutines that wait for the next job: they save
// growing a stack for each, which a burst's last ones need not keep.
const maxResting = 64

// work brings a delivery to its end, and those that come after it.
func (w *Worker) work(t *task) {
	defer w.hands.Done()
	for t != nil {
		t.process()
		w.leave(t)
		t = w.another()
	}
}

// another waits for the next delivery; nil: enough others do, or there is none
// any more.
func (w *Worker) another() *task {
	if w.resting.Add(1) > maxResting {
		w.resting.Add(-1)
		return nil
	}
	select {
	case t := <-w.next:
		w.resting.Add(-1)
		return t
	case <-w.rest:
		return nil
	}
}

// leave gives back what the task still has.
func (w *Worker) leave(t *task) {
	defer w.tasks.Done()
	if t.vacated {
		w.leftovers.Release(1)
		return
	}
	w.freePlace()
}

// freePlace makes room for another job.
func (w *Worker) freePlace() {
	w.count(-1)
	w.pull.done()
}

func (w *Worker) count(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy += n
	w.o.Observer.SlotsBusy(w.busy, w.o.Concurrency)
}
