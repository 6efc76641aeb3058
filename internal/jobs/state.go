package jobs

// WorkerState is what a worker tells of itself when asked.
type WorkerState struct {
	Presence
	Ready    bool      `json:"ready"`
	NotReady string    `json:"not_ready,omitempty"` // why
	Jobs     []string  `json:"jobs"`                // those that it runs, at most 100
	Circuits []Circuit `json:"circuits"`            // those not closed
}

// maxListedJobs bounds WorkerState.Jobs.
const maxListedJobs = 100

// State tells how the worker stands.
func (w *Worker) State() WorkerState {
	s := WorkerState{Presence: w.fleet.snapshot(), Jobs: []string{}, Circuits: w.circuits.notClosed()}
	if err := w.Ready(); err != nil {
		s.NotReady = err.Error()
	}
	s.Ready = s.NotReady == ""
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.running {
		if len(s.Jobs) == maxListedJobs {
			break
		}
		s.Jobs = append(s.Jobs, id)
	}
	return s
}

// InHand is the number of the queue's jobs that this worker runs.
func (w *Worker) InHand(queue string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, t := range w.running {
		if t.id.Queue == queue {
			n++
		}
	}
	return n
}

// snapshot is the worker's presence as it is now.
func (f *fleet) snapshot() Presence {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.self
	p.At = f.now()
	p.Apps = make(map[string]int, len(f.self.Apps))
	for app, n := range f.self.Apps {
		p.Apps[app] = n
	}
	return p
}

// notClosed lists the circuits that are open or being probed.
func (c *Circuits) notClosed() []Circuit {
	c.mu.Lock()
	defer c.mu.Unlock()
	open := []Circuit{}
	for _, known := range c.known {
		if known.State != circuitClosed {
			open = append(open, known)
		}
	}
	return open
}
