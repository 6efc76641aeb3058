package reliability

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
)

// A job kills its worker while its session is connected, every time. Workers are
// started again, as Kubernetes does.
func TestAPoisonedJobEndsAsWorkerLostAndTheInnocentBesideItComplete(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 3*time.Second)
	f.env["AVATAR_BACKEND_STALL_TIMEOUT"] = "1m" // it is killed, it does not fail
	const poisons, innocents, crashes = 2, 60, 5
	for i := range innocents {
		f.publish(job(fmt.Sprintf("innocent-%d", i), pick(seeded(i), "ok", "slow-300", "slow-1000"), 2))
		if i < poisons {
			f.publish(job(fmt.Sprintf("poison-%d", i), "hang", 1))
		}
	}
	workers := map[string]*process{} // by worker id
	start := func(name string) {
		p := f.worker(name, "AVATAR_WORKER_CONCURRENCY=8")
		workers[p.workerID()] = p
	}
	for i := range 3 {
		start(fmt.Sprintf("w%d", i))
	}
	poisoned := func(r lifecycle.Record) bool { return strings.HasPrefix(r.JobID, "poison-") }
	kills, ended := 0, map[string]bool{}
	for len(ended) < poisons {
		f.await("a poisoned job runs or is given up", 1, func(r lifecycle.Record) bool {
			return poisoned(r) && !ended[r.JobID] && (running(r) && workers[r.WorkerID] != nil || final(r))
		})
		for i := range poisons {
			r := f.record(fmt.Sprintf("poison-%d", i))
			victim := workers[r.WorkerID]
			if final(r) {
				ended[r.JobID] = true
			}
			if !running(r) || victim == nil {
				continue
			}
			delete(workers, r.WorkerID)
			f.kill(victim)
			kills++
			start(victim.name)
		}
		if kills > poisons*crashes {
			t.Fatalf("%d kills by %d jobs that may crash %d times", kills, poisons, crashes)
		}
	}
	f.settle()
	report, seen := f.check()
	if report.Outcomes[lifecycle.StateCompleted] != innocents || len(seen.Letters) != poisons {
		t.Errorf("want %d completed and %d dead letters: %s; %+v", innocents, poisons, report, seen.Letters)
	}
	for _, l := range seen.Letters {
		if !strings.HasPrefix(l.JobID, "poison-") || l.Code != "workerLost" || l.Reason != lifecycle.ReasonWorkerLost {
			t.Errorf("dead letter %+v", l)
		}
	}
	t.Logf("%d kills", kills)
}
