package jobs_test

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// newClusterEnv is an env on three nodes, with leases of that window.
func newClusterEnv(t *testing.T, window time.Duration) (*env, *natsserver.Cluster) {
	t.Helper()
	c := natstest.Cluster(t, 3)
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	h := &env{t: t, storage: jetstream.MemoryStorage, url: c.ClientURLs(), settings: topology.DefaultSettings()}
	h.nc = natstest.ConnectURL(t, h.url, nats.MaxReconnects(-1))
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		t.Fatal(err)
	}
	h.settings.AckWait, h.settings.Storage, h.settings.Replicas = window, h.storage, 3
	h.eventually("streams", func() bool {
		h.handles, _, err = topology.Ensure(ctx, h.js, h.names, h.settings)
		return err == nil
	})
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return h, c
}

// at makes a worker talk to one node only.
func at(c *natsserver.Cluster, node int, window time.Duration) func(*options) {
	return func(o *options) {
		o.AckWait, o.Drain = window, time.Millisecond
		o.url, o.natsOpt = c.ClientURL(node), []nats.Option{nats.DontRandomize(), nats.IgnoreDiscoveredServers()}
	}
}

// A leader that is cut off from the other nodes goes on confirming leases until
// it notices.
func TestWorkerCutOffWithItsNodeEndsItsSessionBeforeAnotherBegins(t *testing.T) {
	t.Parallel()
	const window = 6 * time.Second
	h, c := newClusterEnv(t, window)
	leader := c.ConsumerLeader(h.names.JobsStream(), "default")
	if leader < 0 {
		t.Fatal("the consumer has no leader")
	}
	began, ended, begunAgain := make(chan time.Time, 9), make(chan time.Time, 9), make(chan time.Time, 9)
	first := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- time.Now()
		err := untilDone(ctx)
		ended <- time.Now()
		return err
	}), at(c, leader, window))
	h.submit("default", job("j1"))
	receive(t, began, "session")
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		begunAgain <- time.Now()
		return untilDone(ctx)
	}), at(c, (leader+1)%3, window))
	h.eventually("the fleet knows the first worker", func() bool { return h.fleetMark(first.id) != nil })

	h.eventually("all replicas are in step", func() bool {
		return h.inStep(h.names.JobsStream()) && h.inStep("KV_"+h.names.FleetBucket()) && h.inStep("KV_"+h.names.StateBucket())
	})
	c.Isolate(leader)
	defer c.Heal(leader)
	over := receiveWithin(t, ended, 5*window, "end of the session")
	if again := receiveWithin(t, begunAgain, 5*window, "session again"); again.Before(over) {
		t.Errorf("two sessions of the job were open for %s", over.Sub(again))
	}
}

// inStep reports whether a stream's replicas have all that its leader has.
func (h *env) inStep(stream string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s, err := h.js.Stream(ctx, stream)
	if err != nil || s.CachedInfo().Cluster == nil || len(s.CachedInfo().Cluster.Replicas) != 2 {
		return false
	}
	for _, replica := range s.CachedInfo().Cluster.Replicas {
		if !replica.Current || replica.Offline {
			return false
		}
	}
	return true
}

func receiveWithin(t *testing.T, from <-chan time.Time, limit time.Duration, what string) time.Time {
	t.Helper()
	select {
	case at := <-from:
		return at
	case <-time.After(limit):
		t.Fatalf("no %s within %s", what, limit)
		return time.Time{}
	}
}
