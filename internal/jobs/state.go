package jobs

import (
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fleet"
)

// WorkerState is what a worker replies when it is asked for its state.
type WorkerState struct {
	fleet.Presence
	Ready    bool              `json:"ready"`
	NotReady string            `json:"not_ready,omitempty"` // why
	Jobs     []string          `json:"jobs"`                // those that it runs, at most 100
	Circuits []circuit.Circuit `json:"circuits"`            // those not closed
}

// maxListedJobs bounds WorkerState.Jobs.
const maxListedJobs = 100

// State says what the worker does and whether it is ready.
func (w *Worker) State() WorkerState {
	s := WorkerState{Presence: w.fleet.Self(), Jobs: []string{}, Circuits: w.circuits.NotClosed()}
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

// InFleet is the number of the queue's jobs that run, in the whole fleet: exact
// here, elsewhere as last published.
func (w *Worker) InFleet(queue string) int { return w.inHand()[queue] + w.fleet.InHand(queue) }

// inHand counts the jobs that this worker runs, by queue.
func (w *Worker) inHand() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	busy := make(map[string]int, len(w.o.Queues))
	for _, e := range w.running {
		busy[e.id.Queue]++
	}
	return busy
}
