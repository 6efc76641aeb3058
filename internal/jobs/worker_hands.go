package jobs

// handle takes a delivery from the pull loop; it does not wait for its end.
func (w *Worker) handle(d delivery) {
	w.count(1)
	w.tasks.Add(1)
	select {
	case w.next <- d: // a goroutine waits, its stack grown already
	default:
		w.hands.Go(func() { w.work(d) })
	}
}

// maxResting bounds the goroutines that wait for the next job: they save
// growing a stack for each, which a burst's last ones need not keep.
const maxResting = 64

// work processes a delivery, and those that come after it.
func (w *Worker) work(d delivery) {
	for {
		w.process(d)
		if w.resting.Add(1) > maxResting {
			w.resting.Add(-1)
			return
		}
		select {
		case d = <-w.next:
			w.resting.Add(-1)
		case <-w.rest:
			return
		}
	}
}

func (w *Worker) process(d delivery) {
	defer w.tasks.Done()
	t := &task{w: w, msg: d, done: make(chan struct{})}
	defer w.leave(t)
	t.process()
}

// leave gives back what the task still has.
func (w *Worker) leave(t *task) {
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
