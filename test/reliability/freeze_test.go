package reliability

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/test/reliability/invariant"
)

func TestAWorkerFrozenPastItsLeaseSettlesNothingWhenItWakes(t *testing.T) {
	t.Parallel()
	for name, wakes := range map[string]func(f *fleet, heir *process){
		"after the outcomes": func(f *fleet, _ *process) { f.settleRecords(5) },
		"while its heir runs the jobs": func(f *fleet, heir *process) {
			f.await("taken over", 5, func(r lifecycle.Record) bool { return r.WorkerID == heir.workerID() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, "", 2*time.Second)
			f.env["AVATAR_BACKEND_STALL_TIMEOUT"] = "2s"
			frozen := f.worker("frozen")
			for i := range 4 {
				j := withFrames(job(fmt.Sprintf("ok-%d", i), "slow-1000", 1))
				j["utterances"] = []any{silence(3)} // two frames
				if i%2 == 1 {
					j["output"] = map[string]any{"object": map[string]any{}}
				}
				f.publish(j)
			}
			// Fails by itself, so that the frozen worker wakes to a failure.
			hang := job("hang", "hang", 1)
			hang["max_attempts"] = 2
			f.publish(hang)
			f.await("running", 5, running)
			stopped := time.Now()
			frozen.signal(syscall.SIGSTOP)
			heir := f.worker("heir")
			wakes(f, heir)
			// Its lease may have ended up to a quarter of it earlier.
			linger(t.Context(), time.Until(stopped.Add(f.lease)))
			frozen.signal(syscall.SIGCONT)
			f.delayed(stopped, time.Now())
			f.fault(invariant.Fault{Kind: "freeze", WorkerID: frozen.workerID(), Start: stopped, End: time.Now()})
			f.settle()
			// Draining waits for all that it had in hand when it woke.
			frozen.signal(syscall.SIGTERM)
			if !frozen.waitEnd(20*time.Second) || !frozen.cmd.ProcessState.Success() {
				t.Errorf("the worker that was frozen did not stop in good order: %v", frozen.cmd.ProcessState)
			}
			report, seen := f.check()
			if report.Again != 5 || report.Crashes != 5 || report.Outcomes[lifecycle.StateCompleted] != 4 {
				t.Errorf("want 4 jobs completed, and all 5 run again with a crash counted: %s", report)
			}
			for id, history := range seen.History {
				for _, r := range history {
					// It may take a retry like any other worker: that is a later session.
					if r.Time.After(stopped.Add(time.Second)) && r.Record.WorkerID == frozen.workerID() && r.Record.Session == 1 {
						t.Errorf("job %s: the frozen worker wrote %s of its frozen session at %s", id, r.Record.State, r.Time)
					}
				}
			}
		})
	}
}

// settleRecords returns when n jobs have their outcome.
func (f *fleet) settleRecords(n int) { f.await("outcome", n, final) }
