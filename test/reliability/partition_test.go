package reliability

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/test/reliability/invariant"
)

// A node is cut off from the other two, with the worker that is connected
// to it, for longer than the lease.
func TestAClusterThatIsDividedHoldsNoTwoSessionsOfAJob(t *testing.T) {
	if testing.Short() {
		t.Skip("clusters that are divided: not with -short")
	}
	t.Parallel()
	window, lasts := natstest.Unhurried(6*time.Second), natstest.Unhurried(11*time.Second)
	for name, c := range map[string]struct {
		replicas int
		// cut names the workers that can't write records meanwhile: behind is
		// connected to the node that is cut off, before to another.
		cut []string
	}{
		"a worker with its node":                            {3, []string{"behind"}},
		"the records on one side and the jobs on the other": {1, []string{"before"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster, _ := newCluster(t)
			if c.replicas == 1 {
				spread(t, cluster, window)
			}
			f := newFleetAt(t, cluster.ClientURLs(), window, c.replicas, simulator.Options{Addr: "127.0.0.1:0"})
			node := cluster.StreamLeader("KV_" + f.names.StateBucket())
			workers := map[string]*process{
				"behind": f.worker("behind", "NATS_URL="+cluster.ClientURL(node), "AVATAR_WORKER_CONCURRENCY=6"),
				"before": f.worker("before", "NATS_URL="+cluster.ClientURL((node+1)%chaosNodes), "AVATAR_WORKER_CONCURRENCY=6"),
			}
			const total = 24
			for i := range total {
				f.publish(job(fmt.Sprintf("j-%d", i), "slow-1500", 2))
			}
			f.await("running", 12, running)
			if c.replicas > 1 { // the other side elects leaders first
				js, err := jetstream.New(natstest.ConnectURL(t, cluster.ClientURL((node+1)%chaosNodes)))
				if err != nil {
					t.Fatal(err)
				}
				f.measureOutages(natsAway, f.answers(js))
			}
			start := time.Now()
			cluster.Isolate(node)
			linger(t.Context(), lasts)
			cluster.Heal(node)
			ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
			defer cancel()
			if err := cluster.WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			for _, name := range c.cut {
				f.fault(invariant.Fault{Kind: "divided", WorkerID: workers[name].workerID(), Start: start, End: time.Now().Add(reconnect), Lasting: true})
			}
			f.settle()
			report, seen := f.check()
			if report.Outcomes[lifecycle.StateCompleted] != total || report.Failures != 0 {
				t.Errorf("want all %d completed without a failed attempt: %s", total, report)
			}
			noTwoAtOnce(t, seen)
			for _, w := range workers {
				w.alive()
			}
		})
	}
}

// noTwoAtOnce fails the test for each two sessions of a job that were connected
// at the same time.
func noTwoAtOnce(t *testing.T, seen invariant.Seen) {
	t.Helper()
	by := map[string][]simulator.Session{}
	for _, s := range seen.Sessions {
		if id := s.ExtraParams[invariant.JobParam]; !s.Confirmed.IsZero() {
			by[id] = append(by[id], s)
		}
	}
	for id, list := range by {
		slices.SortFunc(list, func(a, b simulator.Session) int { return a.Confirmed.Compare(b.Confirmed) })
		for i := 1; i < len(list); i++ {
			if both := list[i-1].Closed.Sub(list[i].Confirmed); both > 0 {
				t.Errorf("job %s: two sessions were connected for %s", id, both)
			}
		}
	}
}
