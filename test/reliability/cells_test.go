package reliability

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
	"avatarworker/test/reliability/invariant"
)

const natsPassword = "a-password-for-tests"

// cell is one cell of deploy/nats/cells.conf.
type cell struct{ name string }

func (c cell) names() topology.Names {
	if c.name == "" {
		return topology.Names{Prefix: "avatar"}
	}
	return topology.Names{Prefix: "avatar_" + c.name}
}

func (c cell) placement() *jetstream.Placement {
	if c.name == "" {
		return nil
	}
	return &jetstream.Placement{Cluster: c.name}
}

func (c cell) operator() []nats.Option {
	if c.name == "" {
		return nil
	}
	return []nats.Option{nats.UserInfo("operator", natsPassword)}
}

// env is a cell worker's environment, in addition to what all workers have.
func (c cell) env() map[string]string {
	if c.name == "" {
		return nil
	}
	return map[string]string{
		"AVATAR_NATS_PREFIX": c.names().Prefix, "AVATAR_NATS_PLACEMENT_CLUSTER": c.name,
		"AVATAR_NATS_USER": "worker_" + c.name, "AVATAR_NATS_PASSWORD": natsPassword, "AVATAR_NATS_INBOX_PREFIX": "_INBOX_worker_" + c.name,
	}
}

// cells are two cells in clusters of three nodes each, with the accounts of
// deploy/nats/cells.conf, and an arbiter in a third cluster, so that those that
// are left elect a leader when a whole cluster is lost.
type cells struct {
	t          *testing.T
	federation *natsserver.Federation
	fleets     []*fleet

	mu  sync.Mutex
	ids map[string]string // which cell's stream accepted a job
}

var cellNames = []string{"eu", "us"}

func newCells(t *testing.T, lease time.Duration) *cells {
	t.Helper()
	takeNodes(t, 7)
	c := &cells{t: t, ids: map[string]string{}}
	err := insist(func() (err error) {
		ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
		defer cancel()
		c.federation, err = natsserver.StartFederation(ctx, filepath.Join("..", "..", "deploy", "nats", "cells.conf"), t.TempDir(), zerolog.Nop(),
			natsserver.Member{Name: cellNames[0], Nodes: 3}, natsserver.Member{Name: cellNames[1], Nodes: 3}, natsserver.Member{Name: "arbiter", Nodes: 1})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.federation.Shutdown(); err != nil {
			t.Errorf("stopping NATS: %v", err)
		}
	})
	for i, name := range cellNames {
		f := newFleetIn(t, cell{name}, c.urls(i), lease, 3, simulator.Options{Addr: "127.0.0.1:0"})
		c.placed(f, name)
		f.measureOutages(natsAway, f.answers(f.js)) // of a cluster that is lost, too
		c.fleets = append(c.fleets, f)
	}
	return c
}

func (c *cells) urls(i int) string { return c.federation.Cluster(i).ClientURLs() }

// placed checks that all of a cell is kept in its cluster.
func (c *cells) placed(f *fleet, cluster string) {
	c.t.Helper()
	seen := 0
	for info := range f.js.ListStreams(c.t.Context()).Info() {
		if strings.Contains(info.Config.Name, strings.ToUpper(f.names.Prefix)+"_") {
			if seen++; info.Cluster.Name != cluster {
				c.t.Errorf("stream %s is in cluster %s, want %s", info.Config.Name, info.Cluster.Name, cluster)
			}
		}
	}
	if seen != 11 {
		c.t.Errorf("cell %s has %d streams and buckets, want 11", cluster, seen)
	}
}

// publisher connects a user of the file's accounts to these servers.
func (c *cells) publisher(user, urls string) jetstream.JetStream {
	c.t.Helper()
	js, err := jetstream.New(natstest.ConnectURL(c.t, urls, nats.UserInfo(user, natsPassword), nats.CustomInboxPrefix("_INBOX_"+user),
		nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond)))
	if err != nil {
		c.t.Fatal(err)
	}
	return js
}

// publish publishes a job until it is accepted, and notes by which cell.
func (c *cells) publish(ctx context.Context, js jetstream.JetStream, subject string, job map[string]any) {
	id := job["id"].(string)
	job["extra_params"] = map[string]any{invariant.JobParam: id}
	data, err := json.Marshal(job)
	if err != nil {
		c.t.Error(err)
		return
	}
	for ctx.Err() == nil {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		ack, err := js.Publish(once, subject, data, jetstream.WithMsgID(id))
		cancel()
		if err == nil {
			c.accepted(id, ack.Stream)
			return
		}
		linger(ctx, 100*time.Millisecond)
	}
	c.t.Errorf("job %s was not accepted", id)
}

func (c *cells) accepted(id, stream string) {
	c.mu.Lock()
	c.ids[id] = stream
	c.mu.Unlock()
	for _, f := range c.fleets {
		if stream == f.names.JobsStream() {
			f.mu.Lock()
			f.accepted = append(f.accepted, id)
			f.mu.Unlock()
			return
		}
	}
	c.t.Errorf("job %s was accepted by stream %s, which belongs to no cell", id, stream)
}

// load publishes, as often as that, a job in each region and one by its id, until
// ctx ends. All of them are accepted when it returns.
func (c *cells) load(ctx context.Context, every time.Duration) {
	queue := topology.Names{}.Jobs("default")
	always := context.WithoutCancel(ctx) // what was begun is published
	byID := c.publisher("publisher_by_id", c.urls(0)+","+c.urls(1))
	var wg sync.WaitGroup
	publish := func(js jetstream.JetStream, subject string, job map[string]any) {
		wg.Go(func() {
			once, cancel := context.WithTimeout(always, 5*time.Minute)
			defer cancel()
			c.publish(once, js, subject, job)
		})
	}
	regions := []jetstream.JetStream{c.publisher("publisher", c.urls(0)), c.publisher("publisher", c.urls(1))}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		for r, js := range regions {
			publish(js, queue, cellsJob(cellNames[r], i))
		}
		job := cellsJob("id", i)
		publish(byID, queue+"."+job["id"].(string), job)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	wg.Wait()
}

// cellsJob makes a job of a second, or three under the race detector, where fewer are
// published: some run at any time. Of eight, one gives its frames out, one records
// them, and one fails at first.
func cellsJob(kind string, i int) map[string]any {
	avatar := fmt.Sprintf("slow-%d", natstest.Unhurried(500*time.Millisecond).Milliseconds())
	id := func(how string) string { return fmt.Sprintf("%s-%s-%d", how, kind, i) }
	switch i % 8 {
	case 1:
		return withFrames(job(id("frames"), avatar, 2))
	case 3:
		j := job(id("object"), avatar, 2)
		j["output"] = map[string]any{"object": map[string]any{}}
		return j
	case 5:
		return job(id("flaky"), "flaky-connectionClosed-1", 2)
	default:
		return job(id("discard"), avatar, 2)
	}
}

// Two clusters of three nodes, joined by gateways, with a cell in each; one cluster
// after the other is lost whole, for longer than a lease.
func TestAClusterThatIsLostWholeStopsItsOwnCellOnlyAndItsJobsGoOnWhenItIsBack(t *testing.T) {
	if testing.Short() {
		t.Skip("two clusters of three nodes: not with -short")
	}
	t.Parallel()
	lease, away, every, losses := natstest.Unhurried(8*time.Second), natstest.Unhurried(9*time.Second), natstest.Unhurried(400*time.Millisecond), 1
	if long() {
		length, _ := chaosLength(t)
		lease, away, every = 15*time.Second, 30*time.Second, 200*time.Millisecond
		losses = max(int(length/(2*away)), 2)
	}
	c := newCells(t, lease)
	var workers []*process
	for i, f := range c.fleets {
		for w := range 2 {
			workers = append(workers, f.launch(fmt.Sprintf("%s-%d", cellNames[i], w)))
		}
	}
	for _, w := range workers {
		w.waitReady()
	}
	heard := c.listen()
	loading, stop := context.WithCancel(t.Context())
	defer stop()
	loaded := make(chan struct{})
	go func() {
		defer close(loaded)
		c.load(loading, every)
	}()
	for loss := range losses {
		lost, left := c.fleets[loss%2], c.fleets[1-loss%2]
		lost.await("running", 3, running)
		c.lose(loss%2, away)
		lost.await("outcomes since the cluster is back", lost.count(final)+5, final)
		left.await("running", 1, running)
	}
	stop()
	<-loaded
	c.finish(losses, heard)
}

// lose stops every node of a cluster for that long. Meanwhile the other cell runs
// jobs, and a worker that begins there is ready.
func (c *cells) lose(i int, away time.Duration) {
	c.t.Helper()
	left := c.fleets[1-i]
	done := left.count(final)
	start := time.Now()
	if err := c.federation.KillCluster(i); err != nil {
		c.t.Fatal(err)
	}
	left.worker(cellNames[1-i] + "-meanwhile")
	linger(c.t.Context(), time.Until(start.Add(away)))
	if err := insist(func() error { return left.newConsumer(c.t.Context()) }); err != nil {
		c.t.Errorf("cell %s while the other is lost: no consumer can be made, as a live job needs one: %v", cellNames[1-i], err)
	}
	if n := left.count(final) - done; n < int(away/time.Second) {
		c.t.Errorf("cell %s had %d outcomes in %s while the other was lost", cellNames[1-i], n, away)
	} else {
		c.t.Logf("cell %s had %d outcomes in %s meanwhile", cellNames[1-i], n, away)
	}
	if err := insist(func() error { return c.federation.StartCluster(i) }); err != nil {
		c.t.Fatal(err)
	}
	back, cancel := context.WithTimeout(c.t.Context(), natstest.Patience)
	defer cancel()
	if err := c.federation.WaitReady(back); err != nil {
		c.t.Fatal(err)
	}
}

// newConsumer makes a consumer, which takes a leader of all clusters.
func (f *fleet) newConsumer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	events, err := f.js.Stream(ctx, f.names.EventsStream())
	if err == nil {
		_, err = events.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	}
	return err
}

// listen follows both cells as a listener does, connected to the second cluster.
// The function it returns gives the jobs whose completion was heard.
func (c *cells) listen() (heard func() map[string]bool) {
	c.t.Helper()
	nc := natstest.ConnectURL(c.t, c.urls(1), nats.UserInfo("listener", natsPassword), nats.MaxReconnects(-1))
	var mu sync.Mutex
	ids := map[string]bool{}
	_, err := nc.Subscribe(topology.Names{}.EventsFilter("completed", ""), func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		ids[m.Subject[strings.LastIndexByte(m.Subject, '.')+1:]] = true
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return func() map[string]bool {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(ids)
	}
}

// heard checks that the listener heard of the cell's completions: of all, unless the
// cell or the listener's own cluster was lost. A listener hears what comes while it
// is connected, and the last ones may be on their way.
func (c *cells) heard(i int, lost bool, heard func() map[string]bool) {
	c.t.Helper()
	f := c.fleets[i]
	err := insist(func() error {
		n, ids := 0, heard()
		for _, id := range f.accepted {
			if ids[id] {
				n++
			}
		}
		if n == 0 || !lost && n < len(f.accepted) {
			return fmt.Errorf("cell %s: the listener heard %d of %d completions", cellNames[i], n, len(f.accepted))
		}
		c.t.Logf("cell %s: a listener in the second cluster heard %d of %d completions", cellNames[i], n, len(f.accepted))
		return nil
	})
	if err != nil {
		c.t.Error(err)
	}
}

// finish waits until both cells have settled everything, and checks them.
func (c *cells) finish(losses int, heard func() map[string]bool) {
	c.t.Helper()
	count := map[string]int{}
	for i, f := range c.fleets {
		f.settle()
		report, seen := f.check()
		c.t.Logf("cell %s: %s", cellNames[i], report)
		if report.Outcomes[lifecycle.StateCompleted] != report.Jobs || report.Jobs != len(f.accepted) {
			c.t.Errorf("cell %s accepted %d jobs; all are to be completed: %s", cellNames[i], len(f.accepted), report)
		}
		if i >= losses && report.Lost+report.Again+report.Crashes > 0 {
			f.failures(seen)
			c.t.Errorf("cell %s was touched by the loss of the other: %s", cellNames[i], report)
		}
		for id := range seen.History {
			if count[id]++; count[id] > 1 {
				c.t.Errorf("job %s was in both cells", id)
			}
		}
		c.heard(i, i < losses, heard)
	}
	if len(count) != len(c.ids) {
		c.t.Errorf("%d jobs were accepted, %d have records", len(c.ids), len(count))
	}
	c.t.Logf("%d jobs over the cells: %d and %d", len(c.ids), len(c.fleets[0].accepted), len(c.fleets[1].accepted))
}
