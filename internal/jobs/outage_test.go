package jobs_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// full leaves a stream as many bytes as it has: it takes nothing more. The
// function returned gives it room again.
func (h *env) full(stream string) (empty func()) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := h.js.Stream(ctx, stream)
	if err != nil {
		h.t.Fatal(err)
	}
	before := s.CachedInfo().Config
	limited := before
	limited.MaxBytes, limited.Discard = max(1, int64(s.CachedInfo().State.Bytes)), jetstream.DiscardNew
	h.update(limited)
	return func() { h.update(before) }
}

func (h *env) update(c jetstream.StreamConfig) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := h.js.UpdateStream(ctx, c); err != nil {
		h.t.Fatal(err)
	}
}

// renewals counts those of a worker's lease.
type renewals struct {
	nopObserver
	done chan bool
}

func newRenewals() renewals { return renewals{done: make(chan bool, 1000)} }

func (r renewals) LeaseExtended(ok bool) {
	select {
	case r.done <- ok:
	default:
	}
}

// outlive waits until the lease was renewed n times from now on.
func (r renewals) outlive(ctx context.Context, n int) error {
	for len(r.done) > 0 {
		<-r.done
	}
	for range n {
		select {
		case <-r.done:
		case <-ctx.Done():
			return untilDone(ctx)
		}
	}
	return nil
}

// What is kept for people, and for circuits, decides nothing about a session.
func TestSessionsOutliveABucketOfTheFleetThatIsFullOrGone(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]func(h *env){
		"full": func(h *env) { h.full("KV_" + h.names.FleetBucket()) },
		"gone": func(h *env) {
			if err := h.js.DeleteKeyValue(h.t.Context(), h.names.FleetBucket()); err != nil {
				h.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			renewed := newRenewals()
			s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
				connect(a)
				if err := renewed.outlive(ctx, 8); err != nil { // the two share them: four leases
					return err
				}
				return speak(ctx, a, 1)
			})
			h.start(s, h.leaseOf(natstest.Unhurried(4*time.Second)), func(o *options) { o.Observer, o.Patience = renewed, 100*time.Millisecond })
			h.submit("default", job("before"))
			h.state("before", lifecycle.StateRunning)
			breaks(h)
			h.submit("default", job("after"))
			for _, id := range []string{"before", "after"} {
				if r := h.outcome(id, lifecycle.StateCompleted); r.Session != 1 {
					t.Errorf("%s took %d sessions", id, r.Session)
				}
			}
		})
	}
}

func TestResultIsWrittenOnceTheBucketOfRecordsHasRoomAgain(t *testing.T) {
	h := newEnv(t)
	full := make(chan func(), 1)
	var first sync.Once // its number is 2 if the lease is lost before it begins
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		first.Do(func() { full <- h.full("KV_" + h.names.StateBucket()) })
		_, err := speakAll(ctx, a)
		return err
	})
	w := h.start(s, func(o *options) { o.SettleTimeout = 200 * time.Millisecond })
	h.submit("default", job("j1"))
	empty := receive(t, full, "session")
	h.eventually("the worker notices", func() bool { return w.Ready() != nil })
	// Its lease is lost, and nothing can be begun: for several leases.
	h.stays(3*testAckWait, "one session", func() bool { return len(s.ran()) == 1 })
	empty()
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	h.eventually("ready again", func() bool { return w.Ready() == nil })
	if got := s.ran(); len(got) != 1 {
		t.Errorf("spoken in sessions %v, want one", got)
	}
}

// stays watches for so long that something remains true.
func (h *env) stays(long time.Duration, what string, holds func() bool) {
	h.t.Helper()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for end := time.After(long); ; {
		select {
		case <-ticker.C:
		case <-end:
			return
		}
		if !holds() {
			h.t.Errorf("not any more: %s", what)
			return
		}
	}
}

// A restored stream gives out sequences again.
func TestNewJobsOfARestoredStreamAreRun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := natsserver.Options{StoreDir: dir, Port: natsserver.RandomPort}
	// session runs f with a worker on the files as they are.
	session := func(f func(h *env, s *script)) {
		server, err := natsserver.Start(o)
		if err != nil {
			t.Fatal(err)
		}
		h := &env{t: t, server: server}
		h.openOnDisk()
		s := &script{}
		w := h.start(s)
		f(h, s)
		w.end()
		w.nc.Close()
		h.nc.Close()
		if err := server.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
	session(func(h *env, _ *script) {
		h.submit("default", job("first"))
		h.settled()
	})
	stream, backup := streamFiles(t, dir, "AVATAR_JOBS"), filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(stream)); err != nil {
		t.Fatal(err)
	}
	var lost, again uint64
	session(func(h *env, s *script) {
		lost = h.submit("default", job(""))
		h.settled()
		if len(s.ran()) != 1 {
			t.Errorf("ran %v", s.ran())
		}
	})
	if err := os.RemoveAll(stream); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(stream, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	session(func(h *env, s *script) {
		again = h.submit("default", job("", `"labels":{"who":"another"}`))
		h.settled()
		if len(s.ran()) != 1 {
			t.Errorf("of one new job ran %v", s.ran())
		}
	})
	if lost != again {
		t.Errorf("sequence %d was not given out again: the new job has %d", lost, again)
	}
}

// streamFiles finds where a server keeps a stream.
func streamFiles(t *testing.T, dir, stream string) string {
	t.Helper()
	found := ""
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, filepath.Join("streams", stream)) {
			found = path
			return fs.SkipAll
		}
		return err
	})
	if err != nil || found == "" {
		t.Fatalf("no files of stream %s: %v", stream, err)
	}
	return found
}

// newSpreadEnv is an env on three nodes whose streams have one replica each: the
// stream is alone on a node, and all others are on the next one.
func newSpreadEnv(t *testing.T, window time.Duration, stream string) (h *env, c *natsserver.Cluster, alone int) {
	t.Helper()
	t.Parallel()
	c = natstest.Cluster(t, 3)
	h = &env{t: t, storage: jetstream.FileStorage, url: c.ClientURLs(), settings: topology.DefaultSettings()}
	h.nc = natstest.ConnectURL(t, h.url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		t.Fatal(err)
	}
	onNode := func(i int) *jetstream.Placement {
		return &jetstream.Placement{Tags: []string{fmt.Sprintf("node:n%d", i)}}
	}
	h.settings.AckWait, h.settings.Storage, h.settings.Placement = window, h.storage, onNode(1)
	ensure := func() bool {
		h.handles, _, err = topology.Ensure(t.Context(), h.js, h.names, h.settings)
		return err == nil
	}
	h.eventually("the streams are on a node", ensure)
	made, err := h.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	config := made.CachedInfo().Config
	config.Placement = onNode(0)
	if err := h.js.DeleteStream(t.Context(), stream); err != nil {
		t.Fatal(err)
	}
	h.eventually("the stream is on a node of its own", func() bool {
		_, err := h.js.CreateStream(t.Context(), config)
		return err == nil && ensure()
	})
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h, c, 0
}

// through connects the env itself to another node.
func (h *env) through(url string) {
	h.t.Helper()
	h.nc = natstest.ConnectURL(h.t, url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		h.t.Fatal(err)
	}
	h.eventually("the records are there", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if h.handles.State, err = h.js.KeyValue(ctx, h.names.StateBucket()); err != nil {
			return false
		}
		_, err = h.js.Stream(ctx, h.names.JobsStream())
		return err == nil
	})
}

func TestSessionsOutliveTheNodeOfTheFleetsBucket(t *testing.T) {
	window := natstest.Unhurried(2 * time.Second)
	h, c, alone := newSpreadEnv(t, window, "KV_"+topology.Names{}.FleetBucket())
	renewed := newRenewals()
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		if err := renewed.outlive(ctx, size(6, 60)); err != nil {
			return err
		}
		return speak(ctx, a, 1)
	})
	h.start(s, at(c, (alone+1)%3, window), func(o *options) { o.Observer, o.Patience = renewed, 100*time.Millisecond })
	h.submit("default", job("before"))
	h.state("before", lifecycle.StateRunning)
	if err := c.Stop(alone); err != nil {
		t.Fatal(err)
	}
	h.through(c.ClientURL((alone + 1) % 3))
	if r := h.finalWithin("before", time.Minute); r.Outcome != lifecycle.StateCompleted || r.Session != 1 {
		t.Errorf("%s after %d sessions", r.Outcome, r.Session)
	}
}

// finalWithin waits long for the job's outcome, by looking.
func (h *env) finalWithin(id string, limit time.Duration) (r *lifecycle.Record) {
	h.t.Helper()
	natstest.EventuallyWithin(h.t, limit, "the job "+id+" has its outcome", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if _, err := h.handles.State.Get(ctx, id); err != nil {
			return false
		}
		r = h.record(id)
		return r.State.Final()
	})
	return r
}

// The node that keeps the records reboots as a session ends. The worker's lease is
// lost meanwhile; no other worker can take the job.
func TestFinishedSessionIsNotThrownAwayWhileTheRecordsAreAway(t *testing.T) {
	const window = 3 * time.Second
	h, c, alone := newSpreadEnv(t, window, "KV_"+topology.Names{}.StateBucket())
	var spoken atomic.Int32
	down, finished := make(chan struct{}), make(chan struct{}, 9)
	lost := newLosses()
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		select {
		case <-down:
		case <-ctx.Done():
			return untilDone(ctx)
		}
		spoken.Add(1)
		defer func() { finished <- struct{}{} }()
		return speak(ctx, a, 1)
	})
	h.start(s, at(c, (alone+1)%3, window), func(o *options) {
		o.Observer, o.SettleTimeout = lost, 500*time.Millisecond
	})
	h.submit("default", job("j1", `"output":{"discard":{}}`))
	h.state("j1", lifecycle.StateRunning)
	if err := c.Stop(alone); err != nil {
		t.Fatal(err)
	}
	close(down)
	receive(t, finished, "end of the session")
	receive(t, lost.c, "loss of the lease") // longer than any step that settles waits
	if os.Getenv("AVATAR_LONG") != "" {
		<-time.After(45 * time.Second)
	}
	if err := c.Start(alone); err != nil {
		t.Fatal(err)
	}
	h.through(c.ClientURL((alone + 1) % 3))
	if r := h.finalWithin("j1", time.Minute); r.Outcome != lifecycle.StateCompleted || spoken.Load() != 1 {
		t.Errorf("%s, spoken %d times", r.Outcome, spoken.Load())
	}
}

// losses are those of a worker's lease.
type losses struct {
	nopObserver
	c chan struct{}
}

func newLosses() losses { return losses{c: make(chan struct{}, 100)} }

func (l losses) LeaseExtended(ok bool) {
	if ok {
		return
	}
	select {
	case l.c <- struct{}{}:
	default:
	}
}

// The first jobs that can't publish their events do not know yet that none can.
func TestAJobWhoseEventIsNotTakenGivesItsSlotUpSoon(t *testing.T) {
	h := newEnv(t)
	empty := h.full(h.names.EventsStream())
	w := h.start(&script{}, func(o *options) { o.Concurrency, o.SettleTimeout = 1, time.Hour })
	defer w.end()
	for _, id := range []string{"beside", "in-the-slot", "next"} {
		h.submit("default", job(id))
		h.outcome(id, lifecycle.StateCompleted)
	}
	empty()
	h.settled()
}
