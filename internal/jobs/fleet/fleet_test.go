package fleet

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

// env is a bucket of presences and the offset of its server's clock.
type env struct {
	t      *testing.T
	js     jetstream.JetStream
	bucket jetstream.KeyValue

	mu  sync.Mutex
	off time.Duration
}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{t: t, js: natstest.JetStream(t)}
	e.makeBucket()
	return e
}

func (e *env) makeBucket() {
	e.t.Helper()
	bucket, err := e.js.CreateKeyValue(e.t.Context(), jetstream.KeyValueConfig{Bucket: "FLEET", History: 1, LimitMarkerTTL: time.Minute, Storage: jetstream.MemoryStorage})
	if err != nil {
		e.t.Fatal(err)
	}
	e.bucket = bucket
}

func (e *env) now() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Add(e.off)
}

func (e *env) pass(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.off += d
}

func (e *env) store() *kv.Store { return kv.NewStore(e.js, e.bucket, 2*time.Second) }

// fleet runs a worker's Fleet until the test ends, or the returned function is
// called.
func (e *env) fleet(id string, with ...func(*Options)) (f *Fleet, stop func()) {
	e.t.Helper()
	o := Options{
		Store: e.store(), Self: Presence{Worker: "host", WorkerID: id, Slots: 4},
		Fill: func(*Presence) {}, Now: e.now, Log: zerolog.New(zerolog.NewTestWriter(e.t)),
	}
	for _, f := range with {
		f(&o)
	}
	f = New(o)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { f.Run(ctx) })
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	e.t.Cleanup(stop)
	return f, stop
}

func (e *env) eventually(what string, ok func() bool) {
	e.t.Helper()
	natstest.Eventually(e.t, what, ok)
}

// stored reads a worker's presence from the bucket.
func (e *env) stored(id string) (p Presence, ok bool) {
	e.t.Helper()
	revision, err := e.store().Get(e.t.Context(), Key(id), &p)
	if err != nil {
		e.t.Fatal(err)
	}
	return p, revision != 0
}

func (e *env) appears(id string) {
	e.t.Helper()
	e.eventually(id+" is published", func() bool { _, ok := e.stored(id); return ok })
}

func (e *env) put(p Presence) {
	e.t.Helper()
	if _, err := e.store().Put(e.t.Context(), Key(p.WorkerID), p, 0); err != nil {
		e.t.Fatal(err)
	}
}

// sees waits until the Fleet knows exactly n other workers.
func (e *env) sees(f *Fleet, n int) {
	e.t.Helper()
	e.eventually("it sees the others", func() bool { return len(f.Others()) == n })
}

func TestPresenceIsPublishedAsItIsThen(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	f, _ := e.fleet("w1", func(o *Options) { o.Fill = func(p *Presence) { p.NotReady = "no lease" } })
	e.appears("w1")
	closed := f.Connected("app")
	f.Drain()
	e.eventually("the change is published", func() bool {
		p, _ := e.stored("w1")
		return p.Draining && p.Running == 1 && p.Apps["app"] == 1 && p.NotReady == "no lease" && p.Slots == 4
	})
	if !f.HasOpenSession("app") || f.HasOpenSession("other") {
		t.Error("HasOpenSession does not count this worker's sessions")
	}
	closed()
	e.eventually("the end is published", func() bool {
		p, _ := e.stored("w1")
		return p.Running == 0 && len(p.Apps) == 0
	})
	if f.HasOpenSession("app") {
		t.Error("a closed session lives")
	}
	msg, err := e.js.Stream(t.Context(), "KV_FLEET")
	if err != nil {
		t.Fatal(err)
	}
	last, err := msg.GetLastMsgForSubject(t.Context(), "$KV.FLEET."+Key("w1"))
	if err != nil {
		t.Fatal(err)
	}
	if ttl := last.Header.Get("Nats-TTL"); ttl != "900" && ttl != "15m0s" {
		t.Errorf("the presence of a worker that dies is kept for %q", ttl)
	}
}

func TestOtherWorkersAreSeenWhileTheirPresenceIsFresh(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	f, _ := e.fleet("w1")
	e.appears("w1")
	e.put(Presence{WorkerID: "w2", Busy: map[string]int{"default": 2}, Apps: map[string]int{"app": 1}})
	e.put(Presence{WorkerID: "w3", Busy: map[string]int{"default": 3, "slow": 1}})
	e.sees(f, 2)
	if n := f.InHand("default"); n != 5 {
		t.Errorf("%d in hand", n)
	}
	if n := f.InHand("none"); n != 0 {
		t.Errorf("%d in hand of a queue that is not there", n)
	}
	if !f.HasOpenSession("app") {
		t.Error("a session of another worker is not known")
	}
	e.pass(freshFor)
	if list := f.Others(); len(list) != 0 || f.InHand("default") != 0 || f.HasOpenSession("app") {
		t.Errorf("%+v: they have not published for %s", list, freshFor)
	}
}

func TestWorkerThatLeavesIsForgotten(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	f, _ := e.fleet("w1")
	_, stop := e.fleet("w2")
	e.sees(f, 1)
	stop()
	if _, ok := e.stored("w2"); ok {
		t.Error("the presence outlives its worker")
	}
	e.sees(f, 0)
}

func TestRenamedWorkerLeavesNothingUnderItsOldID(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	other, _ := e.fleet("other")
	f, stop := e.fleet("w1")
	e.appears("w1")
	e.sees(other, 1)
	f.Rename(t.Context(), "w1-2")
	e.appears("w1-2")
	if _, ok := e.stored("w1"); ok {
		t.Error("the old presence is still there")
	}
	e.eventually("others see the new id", func() bool {
		list := other.Others()
		return len(list) == 1 && list[0].WorkerID == "w1-2"
	})
	e.eventually("it does not take itself for another", func() bool { return len(f.Others()) == 1 })
	stop()
	if _, ok := e.stored("w1-2"); ok {
		t.Error("the presence outlives its worker")
	}
}

func TestRenameToTheSameIDKeepsThePresence(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	f, _ := e.fleet("w1")
	e.appears("w1")
	f.Rename(t.Context(), "w1")
	if _, ok := e.stored("w1"); !ok {
		t.Error("the presence was removed")
	}
}

func TestPresenceThatWasRemovedIsWrittenAgain(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(e *env) error{
		"by hand": func(e *env) error { return e.bucket.Purge(e.t.Context(), Key("w1")) },
		"with its bucket": func(e *env) error {
			if err := e.js.DeleteKeyValue(e.t.Context(), "FLEET"); err != nil {
				return err
			}
			e.makeBucket()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			f, _ := e.fleet("w1")
			e.appears("w1")
			if err := remove(e); err != nil {
				t.Fatal(err)
			}
			f.Publish()
			e.appears("w1")
		})
	}
}

func TestWatchThatEndsIsStartedAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	watched := &natstest.EndingBucket{KeyValue: e.bucket, Watchers: make(chan jetstream.KeyWatcher, 10)}
	f, _ := e.fleet("w1", func(o *Options) { o.Store = kv.NewStore(e.js, watched, time.Second) })
	if err := (<-watched.Watchers).Stop(); err != nil {
		t.Fatal(err)
	}
	e.put(Presence{WorkerID: "w2"}) // while nothing watches
	e.sees(f, 1)
}

// Its revisions are below those that the workers have seen.
func TestWorkersSeeEachOtherInABucketThatWasMadeAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	quick := func(o *Options) { o.Store = kv.NewStore(e.js, e.bucket, 100*time.Millisecond) }
	a, _ := e.fleet("a", quick)
	e.put(Presence{WorkerID: "b"})
	e.sees(a, 1)
	for range 50 {
		if _, err := e.bucket.PutString(t.Context(), "x", ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.js.DeleteKeyValue(t.Context(), "FLEET"); err != nil {
		t.Fatal(err)
	}
	e.makeBucket()
	e.put(Presence{WorkerID: "c"})
	e.sees(a, 2)
}

func TestValueThatIsNoPresenceIsIgnored(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	f, _ := e.fleet("w1")
	e.put(Presence{WorkerID: "w2"})
	e.sees(f, 1)
	if _, err := e.bucket.Put(t.Context(), Key("w2"), []byte("not JSON")); err != nil {
		t.Fatal(err)
	}
	e.put(Presence{WorkerID: "w3"})
	e.eventually("only w3 is seen", func() bool {
		list := f.Others()
		return len(list) == 1 && list[0].WorkerID == "w3"
	})
}

func TestPresenceIsFreshForThreePublications(t *testing.T) {
	t.Parallel()
	stored := time.Unix(1_000_000, 0)
	if !Fresh(stored, stored.Add(3*interval-1)) || Fresh(stored, stored.Add(3*interval)) {
		t.Error("wrong")
	}
}
