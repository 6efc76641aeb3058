package reliability

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
	"avatarworker/test/reliability/invariant"
)

// With one replica, which is the default, each stream and bucket is on one node:
// while that is away the others are to go on.
func TestANodeOfThreeThatIsAwayRunsNoSessionAgainWhoseWorkerAndRecordLive(t *testing.T) {
	if testing.Short() {
		t.Skip("a minute with a cluster: not with -short")
	}
	t.Parallel()
	window, away, every := natstest.Unhurried(6*time.Second), natstest.Unhurried(8*time.Second), natstest.Unhurried(250*time.Millisecond)
	if long() {
		window, away = 30*time.Second, 45*time.Second
	}
	cluster, _ := newCluster(t)
	spread(t, cluster, window)
	f := newFleetAt(t, cluster.ClientURLs(), window, 1, simulator.Options{Addr: "127.0.0.1:0"})
	streams := []string{
		f.names.JobsStream(), "KV_" + f.names.StateBucket(), "KV_" + f.names.FleetBucket(), f.names.EventsStream(),
		f.names.DLQStream(), f.names.FramesStream(), "OBJ_" + f.names.RecordingsBucket(),
	}
	for i := range 3 {
		f.worker(fmt.Sprintf("w%d", i))
	}
	total := int(3 * (away + away/2) / every)
	published := make(chan struct{})
	go func() {
		defer close(published)
		f.load(t.Context(), total, every, nodesJob)
	}()
	f.await("running", 2, running)
	// Its output's stream a job needs all the time; the bucket of the records can be
	// away for less than a lease.
	f.measureOutages(natsAway, f.takesRecords(f.js))
	f.measureOutages(invariant.Fault{Kind: "frames away", Jobs: "frames-"}, streamAnswers(f.js, f.names.FramesStream()))
	f.measureOutages(invariant.Fault{Kind: "recordings away", Jobs: "object-"}, streamAnswers(f.js, "OBJ_"+f.names.RecordingsBucket()))
	var written []time.Time // since when the bucket of the records was away
	for node := range chaosNodes {
		there := on(cluster, node, streams)
		t.Logf("%s: node %d, which has %v, goes away", time.Now().UTC().Format(time.StampMilli), node, there)
		if there["KV_"+f.names.StateBucket()] {
			written = append(written, time.Now())
		}
		if err := cluster.Kill(node); err != nil {
			t.Fatal(err)
		}
		linger(t.Context(), away)
		f.back(cluster, node)
		f.await("outcomes since the node is back", f.count(final)+20, final)
	}
	<-published
	f.settle()
	report, seen := f.check()
	if report.Outcomes[lifecycle.StateCompleted] != total || report.Failures != 0 || report.Crashes != 0 {
		f.failures(seen)
		t.Errorf("want all %d completed, without a failed attempt or a crash of workers that lived: %s", total, report)
	}
	for _, since := range written {
		f.writtenLater(since, seen)
	}
}

// spread puts the jobs on node 2, their records on node 1, and everything else on
// node 0.
func spread(t *testing.T, cluster *natsserver.Cluster, window time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	names := topology.Names{Prefix: "avatar"}
	js, err := jetstream.New(natstest.ConnectURL(t, cluster.ClientURLs()))
	if err != nil {
		t.Fatal(err)
	}
	settings := fleetSettings(window, 1)
	settings.Placement = onNode(0)
	createStreams(ctx, t, js, names, settings)
	// Made again where they are to be: to move them takes the nodes a while.
	for name, node := range map[string]int{"KV_" + names.StateBucket(): 1, names.JobsStream(): 2} {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		config := stream.CachedInfo().Config
		config.Placement = onNode(node)
		if err := js.DeleteStream(ctx, name); err != nil {
			t.Fatal(err)
		}
		if err := insist(func() error { _, err := js.CreateStream(ctx, config); return err }); err != nil {
			t.Fatal(err)
		}
	}
}

func onNode(node int) *jetstream.Placement {
	return &jetstream.Placement{Tags: []string{fmt.Sprintf("node:n%d", node)}}
}

func nodesJob(i int) map[string]any {
	j := job(fmt.Sprintf("discard-%d", i), "slow-1000", 2)
	switch i % 8 {
	case 0:
		j = withFrames(job(fmt.Sprintf("frames-%d", i), "slow-1000", 2))
	case 1:
		j = job(fmt.Sprintf("object-%d", i), "slow-1000", 2)
		j["output"] = map[string]any{"object": map[string]any{}}
	}
	return j
}

// on lists those of the streams that a node has.
func on(cluster *natsserver.Cluster, node int, streams []string) map[string]bool {
	there := map[string]bool{}
	for _, stream := range streams {
		if cluster.StreamLeader(stream) == node {
			there[stream] = true
		}
	}
	return there
}

// back starts a node again and waits for the cluster.
func (f *fleet) back(cluster *natsserver.Cluster, node int) {
	f.t.Helper()
	if err := insist(func() error { return cluster.Start(node) }); err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(f.t.Context(), natstest.Patience)
	defer cancel()
	if err := cluster.WaitReady(ctx); err != nil {
		f.t.Fatal(err)
	}
}

// writtenLater looks at the sessions that had said everything before their
// workers' leases ended, while their records could not be written: their results
// are to be written later, and nothing is spoken again.
func (f *fleet) writtenLater(since time.Time, seen invariant.Seen) {
	f.t.Helper()
	until := since.Add(f.lease - f.lease/4 - lease.Margin(f.lease))
	finished := map[string]time.Time{}
	for _, s := range seen.Sessions {
		if s.Closed.After(since) && s.Closed.Before(until) && s.CloseCode == 1000 && s.ClosedBy == "client" && s.Ends == 2 {
			finished[s.ExtraParams[invariant.JobParam]] = s.Closed
		}
	}
	f.t.Logf("%d sessions finished while the bucket of the records was away", len(finished))
	for _, s := range seen.Sessions {
		id := s.ExtraParams[invariant.JobParam]
		if closed, ok := finished[id]; ok && s.Opened.After(closed) {
			f.t.Errorf("job %s: a session finished at %s, with its worker's lease standing, and another was opened at %s",
				id, closed.Format(time.StampMilli), s.Opened.Format(time.StampMilli))
		}
	}
}
