package reliability

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/simulator"
	"avatarworker/test/reliability/invariant"
)

// long reports whether the long forms are asked for.
func long() bool { return os.Getenv("AVATAR_CHAOS") != "" }

const (
	fleetWorkers     = 3
	fleetConcurrency = 16
	cooldown         = time.Second
)

// faultyAccount runs three workers on queued jobs of an account with a fault,
// lets it last, and repairs it. The fault is there before the workers start, or
// comes before the first job.
func faultyAccount(t *testing.T, fault string, before bool, total int, lasts time.Duration) (invariant.Report, invariant.Seen) {
	t.Helper()
	f := newFleet(t, "", 5*time.Second)
	f.env["AVATAR_CIRCUIT_COOLDOWN"], f.env["AVATAR_CIRCUIT_MAX_COOLDOWN"] = cooldown.String(), (2 * cooldown).String()
	queue := func() {
		if err := f.backend.SetFault(simulator.Control{Fault: fault}); err != nil {
			t.Fatal(err)
		}
		for i := range total {
			f.publish(job(fmt.Sprintf("j-%d", i), "ok", 1))
		}
	}
	if before {
		queue()
	}
	var workers []*process
	for i := range fleetWorkers {
		workers = append(workers, f.launch(fmt.Sprintf("w%d", i)))
	}
	for _, w := range workers {
		w.waitReady()
	}
	if !before {
		queue()
	}
	// No signal says that nothing happens: it has to be watched for a while.
	linger(t.Context(), lasts)
	if err := f.backend.SetFault(simulator.Control{}); err != nil {
		t.Fatal(err)
	}
	repaired := time.Now()
	f.settle()
	t.Logf("settled %s after the account was repaired", time.Since(repaired).Round(time.Millisecond))
	for _, w := range workers {
		w.alive()
	}
	return f.check()
}

func jobsQueued() (int, time.Duration) {
	if long() {
		return 10_000, 30 * time.Second
	}
	return 200, 5 * time.Second
}

func TestARefusedAccountOpensTheCircuitAndLosesNoJob(t *testing.T) {
	t.Parallel()
	for _, fault := range []errors.Code{errors.CodeBillingRequired, errors.CodeCreditsExhausted} {
		t.Run(string(fault), func(t *testing.T) {
			t.Parallel()
			total, lasts := jobsQueued()
			report, seen := faultyAccount(t, string(fault), true, total, lasts)
			if report.Outcomes[lifecycle.StateCompleted] != total || len(seen.Letters) != 0 {
				t.Errorf("want all completed, no dead letters: %s", report)
			}
			times := refusals(seen, fault)
			if len(times) == 0 {
				t.Fatal("no session was refused")
			}
			// As many as the fleet runs at once before the circuit is open, and then a
			// probe in each cooldown, which is at least four fifths of the setting.
			span := times[len(times)-1].Sub(times[0])
			most := fleetWorkers*fleetConcurrency + int(span/(cooldown*8/10)) + 1
			t.Logf("%d jobs: %d sessions refused in %s, at most %d may be", total, len(times), span, most)
			if len(times) > most {
				t.Errorf("%d sessions refused in %s, want at most %d", len(times), span, most)
			}
			if span < cooldown*8/10 {
				t.Error("no probe")
			}
		})
	}
}

// refusals are the times of the attempts that were refused, in order.
func refusals(seen invariant.Seen, code errors.Code) (times []time.Time) {
	known := map[string]bool{}
	for _, ev := range seen.Events {
		if ev.Type == event.TypeError && ev.Code == code && !known[ev.ID] {
			known[ev.ID] = true
			times = append(times, ev.Time)
		}
	}
	slices.SortFunc(times, time.Time.Compare)
	return times
}

func TestARevokedKeyDoesNotEmptyTheQueueIntoTheDeadLetters(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]bool{"revoked before the workers start": true, "revoked while they run": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			total, lasts := jobsQueued()
			report, seen := faultyAccount(t, string(errors.CodeSessionTokenExpired), before, total, lasts)
			most := 5 + fleetWorkers*fleetConcurrency // circuit.failures and what ran at once
			if before {
				most = 0 // a worker looks at its keys before it takes a job
			}
			t.Logf("%d jobs: %d dead letters in %s", total, len(seen.Letters), lasts)
			if n := len(seen.Letters); n > most {
				t.Errorf("%d dead letters, want at most %d", n, most)
			}
			if report.Outcomes[lifecycle.StateCompleted] != total-len(seen.Letters) {
				t.Errorf("the others are to complete: %s", report)
			}
		})
	}
}
