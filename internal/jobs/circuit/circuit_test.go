package circuit

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var (
	unpaid  = errors.Decision{Code: errors.CodeCreditsExhausted, OpensCircuit: true}
	refused = errors.Decision{Code: errors.CodeSessionTokenExpired, AppWide: true}
)

const (
	app      = "app"
	region   = "us-west"
	window   = 30 * time.Second
	waitTime = 60 * time.Second
)

// env is a bucket, the clock of its server, and the leases that stand.
type env struct {
	t      *testing.T
	js     jetstream.JetStream
	bucket jetstream.KeyValue

	mu        sync.Mutex
	now       time.Time
	leases    map[string]bool
	asked     int   // whether a lease is valid
	away      error // of the bucket with the leases
	published map[string]int
	order     []Alert
	fault     error // of publishing
	opened    map[string]bool
}

var bucketConfig = jetstream.KeyValueConfig{Bucket: "FLEET", History: 1, LimitMarkerTTL: time.Minute, Storage: jetstream.MemoryStorage}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{
		t: t, js: natstest.JetStream(t), now: time.Unix(1_000_000, 0).UTC(),
		leases: make(map[string]bool), published: make(map[string]int), opened: make(map[string]bool),
	}
	e.makeBucket()
	return e
}

func (e *env) makeBucket() {
	e.t.Helper()
	bucket, err := e.js.CreateKeyValue(e.t.Context(), bucketConfig)
	if err != nil {
		e.t.Fatal(err)
	}
	e.bucket = bucket
}

func (e *env) clock() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now
}

func (e *env) pass(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now = e.now.Add(d)
}

// Valid implements Leases.
func (e *env) Valid(_ context.Context, id string) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	return e.leases[id], e.away
}

func (e *env) lease(id string, valid bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leases[id] = valid
}

func (e *env) publish(_ context.Context, a Alert) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fault != nil {
		return e.fault
	}
	id := fmt.Sprint(a.Kind, a.OpenedAt.UnixNano(), a.App, a.Region)
	if e.published[id]++; e.published[id] == 1 {
		e.order = append(e.order, a)
	}
	return nil
}

func (e *env) breakEvents(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fault = err
}

func (e *env) alerts() []Alert {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]Alert(nil), e.order...)
}

// worker returns the circuits of a worker that does not run yet.
func (e *env) worker(id string, change ...func(*Options)) *Circuits {
	e.t.Helper()
	e.lease(id, true)
	o := Options{
		Store:  kv.NewStore(e.js, e.bucket, time.Second),
		Config: Config{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 30 * time.Second},
		Leases: e, Window: window, Worker: func() string { return id },
		Now: e.clock, Random: func() float64 { return 1 }, Timeout: 10 * time.Second,
		Publish: e.publish, Log: zerolog.Nop(),
		Changed: func(c Circuit, open bool) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.opened[id+" "+c.App] = open
		},
	}
	for _, f := range change {
		f(&o)
	}
	return New(o)
}

// run runs the circuits until the test, or the returned function, ends them.
func (e *env) run(c *Circuits) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	stop = func() { cancel(); wg.Wait() }
	e.t.Cleanup(stop)
	return stop
}

func (e *env) allow(c *Circuits, job string) (*Permit, *Refusal) {
	e.t.Helper()
	p, r, err := c.Allow(e.t.Context(), app, region, job)
	if err != nil || (p == nil) == (r == nil) {
		e.t.Fatal(p, r, err)
	}
	return p, r
}

func (e *env) refused(c *Circuits, job string) *Refusal {
	e.t.Helper()
	p, r := e.allow(c, job)
	if p != nil {
		e.t.Fatalf("%s is let through, as a probe: %v", job, p.Probe())
	}
	return r
}

func (e *env) probe(c *Circuits, job string) *Permit {
	e.t.Helper()
	p, r := e.allow(c, job)
	if p == nil || !p.Probe() {
		e.t.Fatalf("%s is not the probe: %+v", job, r)
	}
	return p
}

func (e *env) fail(p *Permit, d errors.Decision, open bool, wait time.Duration) {
	e.t.Helper()
	w, o, err := p.Fail(e.t.Context(), d)
	if err != nil || o != open || w != wait {
		e.t.Fatalf("failed: wait %s, open %v, %v; want %s, %v", w, o, err, wait, open)
	}
}

// open opens the circuit of app in region.
func (e *env) open(c *Circuits) {
	e.t.Helper()
	p, r := e.allow(c, "opens")
	if r != nil || p.Probe() {
		e.t.Fatal("the circuit is open")
	}
	e.fail(p, unpaid, true, 10*time.Second)
}

func (e *env) success(p *Permit) {
	e.t.Helper()
	if err := p.Success(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) abort(p *Permit, reached bool) {
	e.t.Helper()
	if err := p.Abort(e.t.Context(), reached); err != nil {
		e.t.Fatal(err)
	}
}

// stored is the entry as the bucket has it; revision 0: it has none.
func (e *env) stored(app, region string) entry {
	e.t.Helper()
	var got entry
	kve, err := e.bucket.Get(e.t.Context(), key(app, region))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return got
	}
	if err == nil {
		err = json.Unmarshal(kve.Value(), &got)
	}
	if err != nil {
		e.t.Fatal(err)
	}
	got.revision = kve.Revision()
	return got
}

// ttl is how long the server keeps the entry, as the write said.
func (e *env) ttl(app, region string) string {
	e.t.Helper()
	s, err := e.js.Stream(e.t.Context(), "KV_FLEET")
	if err != nil {
		e.t.Fatal(err)
	}
	msg, err := s.GetLastMsgForSubject(e.t.Context(), "$KV.FLEET."+key(app, region))
	if err != nil {
		e.t.Fatal(err)
	}
	return msg.Header.Get("Nats-TTL")
}

func (e *env) keys() int {
	e.t.Helper()
	lister, err := e.bucket.ListKeysFiltered(e.t.Context(), Prefix+">")
	if err != nil {
		e.t.Fatal(err)
	}
	n := 0
	for range lister.Keys() {
		n++
	}
	return n
}

func (e *env) eventually(what string, ok func() bool) {
	e.t.Helper()
	natstest.Eventually(e.t, what, ok)
}

func (e *env) knows(c *Circuits, state string) {
	e.t.Helper()
	e.eventually("a worker knows the circuit as "+state, func() bool { return c.get(key(app, region)).State == state })
}

func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func TestCooldownDoublesWithEachFailedProbeAndResetsAfterTenGoodSessions(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	for i, next := range []time.Duration{20 * time.Second, 30 * time.Second, 30 * time.Second} {
		e.refused(c, "early")
		e.pass(30 * time.Second)
		p := e.probe(c, fmt.Sprint("probe", i))
		e.refused(c, "second")
		e.fail(p, unpaid, true, next)
	}
	e.pass(30 * time.Second)
	e.refused(c, "probe2") // before any other could
	e.success(e.probe(c, "good"))
	again, _ := e.allow(c, "again")
	e.fail(again, unpaid, true, 30*time.Second) // not forgotten yet
	e.pass(30 * time.Second)
	e.success(e.probe(c, "good"))
	for range 9 {
		p, _ := e.allow(c, "more")
		e.success(p)
	}
	e.open(c)
	// Where no other comes it goes again, a little later.
	e.pass(10 * time.Second)
	e.fail(e.probe(c, "alone"), unpaid, true, 20*time.Second)
	e.pass(20 * time.Second)
	e.refused(c, "alone")
	e.pass(5 * time.Second)
	e.probe(c, "alone")
}

func TestRowOfFailuresOverDifferentJobsOpensTheCircuit(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c, other := e.worker("w1"), e.worker("w2")
	fail := func(c *Circuits, job string, open bool) {
		t.Helper()
		p, r := e.allow(c, job)
		if r != nil {
			t.Fatal(job, r)
		}
		var wait time.Duration
		if open {
			wait = 10 * time.Second
		}
		e.fail(p, refused, open, wait)
	}
	for range 6 {
		fail(c, "same", false)
	}
	for i := range 3 {
		fail(other, fmt.Sprint("j", i), false)
	}
	p, _ := e.allow(other, "works")
	e.success(p)
	for i := range 4 {
		fail(c, fmt.Sprint("k", i), false)
	}
	fail(other, "last", true)
	if got := e.stored(app, region); got.State != Open || got.Code != errors.CodeSessionTokenExpired || len(got.Failures) != 5 {
		t.Errorf("%+v", got)
	}
	if p, r, err := c.Allow(t.Context(), app, "elsewhere", "j"); p == nil || r != nil || err != nil {
		t.Error("another region is held", r, err)
	}
}

func TestOneJobThatAProxyRefusesOpensTheCircuit(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	blocked := errors.Decision{Code: errors.CodeConnectionFailed, AppWide: true, Proxy: true}
	for range 4 {
		p, _ := e.allow(c, "lone")
		e.fail(p, blocked, false, 0)
	}
	p, _ := e.allow(c, "lone")
	e.fail(p, blocked, true, 10*time.Second)
}

func TestOneProbeOfTheWholeFleet(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var workers []*Circuits
	for i := range 6 {
		c := e.worker(fmt.Sprint("w", i))
		e.run(c)
		workers = append(workers, c)
	}
	e.open(workers[0])
	for _, c := range workers {
		e.knows(c, Open)
	}
	e.pass(10 * time.Second)
	var wg sync.WaitGroup
	probes := make(chan *Permit, 60)
	for i := range 60 {
		wg.Go(func() {
			p, _, err := workers[i%6].Allow(t.Context(), app, region, fmt.Sprint("j", i))
			if err != nil {
				t.Error(err)
			}
			if p != nil {
				probes <- p
			}
		})
	}
	wg.Wait()
	if len(probes) != 1 {
		t.Fatalf("%d jobs let through", len(probes))
	}
	e.success(<-probes)
	for _, c := range workers {
		e.knows(c, Closed)
	}
}

func TestPermitEndsAProbeOnce(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	e.pass(10 * time.Second)
	p := e.probe(c, "j1")
	e.success(p)
	before := e.stored(app, region)
	e.success(p)
	e.abort(p, true)
	if after := e.stored(app, region); p.Probe() || after.State != Closed || after.WorkingSessions != 1 || after.revision != before.revision {
		t.Errorf("probe %v, %+v", p.Probe(), after)
	}
	e.fail(p, refused, false, 0) // while it was spoken
	if after := e.stored(app, region); len(after.Failures) != 1 {
		t.Errorf("a failure after the first frame does not count: %+v", after)
	}
}

// A write of its end that comes late finds the job's next probe.
func TestEndOfAnEarlierProbeLeavesTheNextAlone(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	e.pass(10 * time.Second)
	p := e.probe(c, "j1")
	late := p.aborted(true)
	e.abort(p, true)
	e.pass(time.Minute)
	next := e.probe(c, "j1")
	if got, err := c.change(t.Context(), app, region, late); err != nil || got.State != Probing {
		t.Errorf("%+v, %v", got, err)
	}
	e.success(next)
	if got := e.stored(app, region); got.State != Closed {
		t.Errorf("%+v", got)
	}
}

func TestBucketThatIsAwayDoesNotHoldUpAJobsOwnRecord(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	nowhere, err := jetstream.NewWithAPIPrefix(e.js.Conn(), "nowhere")
	if err != nil {
		t.Fatal(err)
	}
	c := e.worker("w1", func(o *Options) {
		o.Store, o.Timeout = kv.NewStore(nowhere, e.bucket, time.Second), 100*time.Millisecond
	})
	p, _ := e.allow(c, "j1")
	from := time.Now()
	if _, open, err := p.Fail(t.Context(), unpaid); !open || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open %v, %v", open, err)
	}
	if took := time.Since(from); took > natstest.Unhurried(5*time.Second) {
		t.Errorf("took %s", took)
	}
}

func TestProbeThatShowedNothing(t *testing.T) {
	t.Parallel()
	for name, reached := range map[string]bool{"at the backend": true, "before": false} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			c := e.worker("w1")
			e.open(c)
			e.pass(10 * time.Second)
			e.abort(e.probe(c, "j1"), reached)
			if reached {
				e.refused(c, "j2")
				e.pass(10 * time.Second)
			}
			e.probe(c, "j2")
			if got := e.stored(app, region); got.Cooldown != 10*time.Second {
				t.Errorf("cooldown %s", got.Cooldown)
			}
		})
	}
}

func TestProbeIsItsWorkersWhileTheLeaseIsValid(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	first, other := e.worker("w1"), e.worker("w2")
	e.run(other)
	e.open(first)
	e.pass(10 * time.Second)
	p := e.probe(first, "slow")
	e.knows(other, Probing)
	for range 5 {
		e.pass(time.Hour) // live speech that begins late
		if other.Peek(app, region, "j") != nil {
			t.Fatal("no job asks whether the probe is still there")
		}
		e.refused(other, "j")
		if other.Peek(app, region, "j") == nil {
			t.Fatal("each job asks for the lease, within one window")
		}
	}
	if e.asked != 5 {
		t.Errorf("asked %d times for the lease", e.asked)
	}
	e.lease("w1", false)
	e.refused(other, "j") // asked a moment ago
	e.pass(window)
	took := e.probe(other, "j")
	e.success(p) // of the worker that was frozen
	if got := e.stored(app, region); got.State != Probing || got.ProbeWorker != "w2" {
		t.Errorf("a probe that was taken over changed the circuit: %+v", got)
	}
	e.abort(p, true)
	e.success(took)
	if got := e.stored(app, region); got.State != Closed {
		t.Errorf("%+v", got)
	}
}

func TestProbeIsLeftAloneWhileItsLeaseIsUnknown(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	first, other := e.worker("w1"), e.worker("w2")
	e.run(other)
	e.open(first)
	e.pass(10 * time.Second)
	p := e.probe(first, "j1")
	e.knows(other, Probing)
	e.pass(window)
	e.away = errors.New("no answer")
	if got, r, err := other.Allow(t.Context(), app, region, "j2"); got != nil || r != nil || !errors.Is(err, e.away) {
		t.Fatal(got, r, err)
	}
	if got := e.stored(app, region); got.ProbeWorker != "w1" {
		t.Errorf("%+v", got)
	}
	e.success(p)
	e.knows(other, Closed)
	if got, r := e.allow(other, "j2"); got == nil {
		t.Error(r)
	}
}

func TestHeldJobsAskAgainWithinAMinute(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1", func(o *Options) {
		o.Config.Cooldown, o.Config.MaxCooldown = 24*time.Hour, 24*time.Hour
	})
	p, _ := e.allow(c, "opens")
	e.fail(p, unpaid, true, time.Minute)
	if r := e.refused(c, "j"); r.Wait != time.Minute || r.Code != errors.CodeCreditsExhausted {
		t.Errorf("%+v", r)
	}
	if r := c.Peek(app, region, "j"); r == nil || r.Wait != time.Minute {
		t.Errorf("%+v", r)
	}
}

// The worker's id changes when its lease was lost.
func TestProbeOfALostLeaseIsTakenOverByTheSameWorker(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var mu sync.Mutex
	id := "w1"
	c := e.worker(id, func(o *Options) {
		o.Worker = func() string { mu.Lock(); defer mu.Unlock(); return id }
	})
	e.open(c)
	e.pass(10 * time.Second)
	p := e.probe(c, "j1")
	mu.Lock()
	id = ""
	mu.Unlock()
	e.lease("w1", false)
	e.pass(window)
	e.refused(c, "j2")
	mu.Lock()
	id = "w1-2"
	mu.Unlock()
	e.lease("w1-2", true)
	e.refused(c, "j2") // the job is still in hand
	if err := p.Abort(ended(), false); err == nil {
		t.Fatal("written under a context that has ended")
	}
	c.drop(p) // as after a restart
	e.success(e.probe(c, "j2"))
}

func TestEndOfAProbeIsWrittenWhenTheBucketIsThereAgain(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		end  func(*Permit) error
		want string
	}{
		"success": {func(p *Permit) error { return p.Success(ended()) }, Closed},
		"fail": {func(p *Permit) error {
			wait, open, err := p.Fail(ended(), unpaid)
			if !open || wait == 0 {
				t.Error("the job is not held, though the circuit is known to be open")
			}
			return err
		}, Open},
		"abort": {func(p *Permit) error { return p.Abort(ended(), true) }, Open},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			c := e.worker("w1")
			e.open(c)
			e.pass(10 * time.Second)
			p := e.probe(c, "j1")
			if tc.end(p) == nil {
				t.Fatal("written under a context that has ended")
			}
			e.abort(p, false)
			e.pass(time.Hour)
			e.refused(c, "j2")
			if got := e.stored(app, region); got.State != Probing {
				t.Fatalf("%+v", got)
			}
			e.run(c)
			e.eventually("it is written", func() bool { return e.stored(app, region).State == tc.want })
			e.eventually("the next job may ask", func() bool { return c.Peek(app, region, "j2") == nil || tc.want == Open })
		})
	}
}

func TestProbeThatItsWorkerKnowsNothingOfIsEnded(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	e.pass(10 * time.Second)
	c.drop(e.probe(c, "lost"))
	e.refused(c, "j2")
	e.run(c)
	e.eventually("another may probe", func() bool { return c.Peek(app, region, "j2") == nil })
	e.probe(c, "j2")
}

func TestWorkerThatStopsWritesTheEndsOfItsProbes(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	e.pass(10 * time.Second)
	p := e.probe(c, "j1")
	stop := e.run(c)
	if p.Abort(ended(), false) == nil {
		t.Fatal("written under a context that has ended")
	}
	stop()
	if got := e.stored(app, region); got.State != Open {
		t.Errorf("%+v", got)
	}
}
