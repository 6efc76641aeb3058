package limit

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

const waitTime = 60 * time.Second

// env is a bucket, and the leases that have ended.
type env struct {
	t      *testing.T
	js     jetstream.JetStream
	bucket jetstream.KeyValue

	mu    sync.Mutex
	gone  map[string]bool
	away  error // instead of whether a lease is valid
	asked int
}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{t: t, js: natstest.JetStream(t), gone: make(map[string]bool)}
	e.makeBucket()
	return e
}

func (e *env) makeBucket() {
	e.t.Helper()
	bucket, err := e.js.CreateKeyValue(e.t.Context(), jetstream.KeyValueConfig{Bucket: "STATE", History: 1, LimitMarkerTTL: time.Minute, Storage: jetstream.MemoryStorage})
	if err != nil {
		e.t.Fatal(err)
	}
	e.bucket = bucket
}

func (e *env) leaseValid(_ context.Context, worker string) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	return !e.gone[worker], e.away
}

func (e *env) set(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

func (e *env) store() *kv.Store { return kv.NewStore(e.js, e.bucket, 2*time.Second) }

// limits returns the Limits of a worker that has listed the keys. Its watch ends
// with the test, or with the returned function.
func (e *env) limits(worker string, with ...func(*Options)) (l *Limits, stop func()) {
	e.t.Helper()
	o := Options{
		Store: e.store(), Worker: func() string { return worker }, LeaseValid: e.leaseValid,
		CheckInterval: time.Hour, Apps: map[string]int{"app": 1}, MaxWaiting: 100, Log: zerolog.New(zerolog.NewTestWriter(e.t)),
	}
	for _, f := range with {
		f(&o)
	}
	l = New(o)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { l.Run(ctx) })
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	e.t.Cleanup(stop)
	if len(o.Apps) > 0 || len(o.Rules) > 0 {
		e.eventually("the keys are listed", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.listed
		})
	}
	return l, stop
}

func (e *env) eventually(what string, ok func() bool) {
	e.t.Helper()
	natstest.Eventually(e.t, what, ok)
}

// keys counts the keys that are held, as the bucket has them.
func (e *env) keys() int {
	e.t.Helper()
	list, err := e.bucket.ListKeysFiltered(e.t.Context(), Prefix+">")
	if err != nil {
		e.t.Fatal(err)
	}
	n := 0
	for range list.Keys() {
		n++
	}
	return n
}

// acquire waits for the job's keys.
func (e *env) acquire(l *Limits, job Job) (release func()) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), waitTime)
	defer cancel()
	release, err := l.Acquire(ctx, job)
	if err != nil {
		e.t.Fatalf("job %s: %v", job.ID, err)
	}
	return release
}

// waiting starts to wait for the job's keys, and returns once the job waits.
func (e *env) waiting(l *Limits, job Job) <-chan func() {
	e.t.Helper()
	got := make(chan func(), 1)
	go func() {
		release, err := l.Acquire(e.t.Context(), job)
		if err == nil {
			got <- release
		}
	}()
	e.eventually("job "+job.ID+" waits", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.waiting > 0
	})
	return got
}

func (e *env) receive(c <-chan func()) func() {
	e.t.Helper()
	select {
	case release := <-c:
		return release
	case <-time.After(waitTime):
		e.t.Fatal("the job still waits")
		return nil
	}
}

// full checks that the job's limits allow no session now.
func (e *env) full(l *Limits, job Job) {
	e.t.Helper()
	ctx, cancel := context.WithCancel(e.t.Context())
	cancel()
	if release, err := l.Acquire(ctx, job); err == nil {
		release()
		e.t.Errorf("job %s got a session", job.ID)
	}
}

func most(n int) func(*Options) { return func(o *Options) { o.Apps["app"] = n } }

func look(d time.Duration) func(*Options) { return func(o *Options) { o.CheckInterval = d } }

func job(id string) Job { return Job{ID: id, App: "app"} }

// peak counts what is there at a time.
type peak struct{ now, most atomic.Int64 }

func (p *peak) enter() {
	now := p.now.Add(1)
	for {
		most := p.most.Load()
		if now <= most || p.most.CompareAndSwap(most, now) {
			return
		}
	}
}

func (p *peak) leave() { p.now.Add(-1) }

// broadcast wakes all that wait.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

func newBroadcast() *broadcast { return &broadcast{c: make(chan struct{})} }

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.c
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.c)
	b.c = make(chan struct{})
}

func TestWorkersTogetherStayWithinTheLimit(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	const workers, limit, each, rounds = 4, 3, 3, 3
	var p peak
	all := make([]*Limits, workers)
	for i := range all {
		all[i], _ = e.limits(fmt.Sprint("w", i), most(limit))
	}
	natstest.Together(workers*each, func(i int) {
		for round := range rounds {
			release, err := all[i%workers].Acquire(t.Context(), job(fmt.Sprintf("j%d-%d", i, round)))
			if err != nil {
				t.Error(err)
				return
			}
			p.enter()
			if n := e.keys(); n > limit {
				t.Errorf("%d keys", n)
			}
			p.leave()
			release()
		}
	})
	if n := p.most.Load(); n > limit {
		t.Errorf("%d sessions at a time, want at most %d", n, limit)
	}
	e.eventually("all keys are free", func() bool { return e.keys() == 0 })
}

func TestKeyOfAWorkerWhoseLeaseEndedIsFree(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	dead, _ := e.limits("dead")
	defer e.acquire(dead, job("j1"))()
	l, _ := e.limits("w", look(20*time.Millisecond))
	e.full(l, job("j2"))
	got := e.waiting(l, job("j2"))
	e.eventually("the lease was looked at twice", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.asked > 1
	})
	if len(got) > 0 {
		t.Fatal("a key whose holder lives was taken")
	}
	e.set(func() { e.gone["dead"] = true })
	e.receive(got)()
}

func TestKeyIsNotFreeWhileItIsUnknownWhetherItsHolderLives(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	other, _ := e.limits("other")
	release := e.acquire(other, job("j1"))
	l, _ := e.limits("w", look(10*time.Millisecond))
	e.set(func() { e.away, e.gone["other"] = errors.New("no answer"), true })
	got := e.waiting(l, job("j2"))
	e.eventually("the lease was asked for", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.asked > 3
	})
	if len(got) > 0 {
		t.Error("a key was taken though its holder may live")
	}
	release()
	e.receive(got)()
}

func TestReleasedKeyGoesToTheNextJob(t *testing.T) {
	t.Parallel()
	for name, same := range map[string]bool{"of this worker": true, "of another worker": false} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			l, _ := e.limits("w1")
			next := l
			if !same {
				next, _ = e.limits("w2")
			}
			// Look is an hour: only the watch can say that the key is free.
			release := e.acquire(l, job("j1"))
			e.eventually("the other worker sees it", func() bool {
				next.mu.Lock()
				defer next.mu.Unlock()
				return next.keysOf("app_id/app").busy == 1
			})
			got := e.waiting(next, job("j2"))
			if len(got) > 0 {
				t.Fatal("two sessions at a time")
			}
			release()
			e.receive(got)()
			e.eventually("the limit is forgotten", func() bool {
				next.mu.Lock()
				defer next.mu.Unlock()
				return len(next.keys) == 0
			})
		})
	}
}

func TestJobsUnderSeveralLimitsNeverDeadlock(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	rules := func(o *Options) {
		o.Apps = map[string]int{"app": 2}
		o.Rules = []Rule{{Key: "label.room", Max: 1}, {Key: "avatar_id", Max: 1}, {Key: "region", Max: 2}, {Key: "queue", Max: 3}}
	}
	const workers, jobs = 3, 12
	all := make([]*Limits, workers)
	for i := range all {
		all[i], _ = e.limits(fmt.Sprint("w", i), rules, look(50*time.Millisecond))
	}
	var perRoom, perAvatar [2]peak
	released := newBroadcast()
	natstest.Together(jobs, func(i int) {
		room, avatar := i%2, (i/2)%2
		j := Job{
			ID: fmt.Sprint("j", i), App: "app", Region: "r", Queue: "q", Avatar: fmt.Sprint("a", avatar),
			Labels: map[string]string{"room": fmt.Sprint("room", room)},
		}
		for {
			next := released.wait()
			release, err := all[i%workers].Acquire(t.Context(), j)
			if errors.Is(err, ErrBusy) {
				<-next // as the job does in its queue
				continue
			}
			if err != nil {
				t.Error(err)
				return
			}
			perRoom[room].enter()
			perAvatar[avatar].enter()
			perAvatar[avatar].leave()
			perRoom[room].leave()
			release()
			released.send()
			return
		}
	})
	for i := range 2 {
		if perRoom[i].most.Load() > 1 || perAvatar[i].most.Load() > 1 {
			t.Errorf("%d sessions in a room, %d of an avatar", perRoom[i].most.Load(), perAvatar[i].most.Load())
		}
	}
	e.eventually("all keys are free", func() bool { return e.keys() == 0 })
}

func TestJobThatGetsOnlyOneOfItsKeysKeepsNone(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	rules := func(o *Options) { o.Rules = []Rule{{Key: "region", Max: 1}} }
	l, _ := e.limits("w", rules, most(2))
	release := e.acquire(l, Job{ID: "j1", App: "app", Region: "r"})
	e.full(l, Job{ID: "j2", App: "app", Region: "r"})
	// The app's second key is not kept by j2.
	e.eventually("the key is free again", func() bool { return e.keys() == 2 })
	other := e.acquire(l, Job{ID: "j3", App: "app", Region: "other"})
	other()
	release()
}

func TestWatchThatEndsIsStartedAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	other, _ := e.limits("other")
	release := e.acquire(other, job("j1"))
	watched := &natstest.EndingBucket{KeyValue: e.bucket, Watchers: make(chan jetstream.KeyWatcher, 10)}
	l, _ := e.limits("w", func(o *Options) { o.Store = kv.NewStore(e.js, watched, time.Second) })
	got := e.waiting(l, job("j2"))
	if err := (<-watched.Watchers).Stop(); err != nil {
		t.Fatal(err)
	}
	release() // while nothing watches
	e.eventually("the key is removed", func() bool { return e.keys() == 0 })
	e.receive(got)()
}

// Its revisions are below those that the worker has seen.
func TestKeysAreFreeAgainInABucketThatWasMadeAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	for range 50 {
		if _, err := e.bucket.Put(t.Context(), "x", nil); err != nil {
			t.Fatal(err)
		}
	}
	other, _ := e.limits("other")
	release := e.acquire(other, job("j1"))
	l, _ := e.limits("w", func(o *Options) { o.Store = kv.NewStore(e.js, e.bucket, 100*time.Millisecond) })
	got := e.waiting(l, job("j2"))
	if err := e.js.DeleteKeyValue(t.Context(), "STATE"); err != nil {
		t.Fatal(err)
	}
	e.makeBucket()
	third, _ := e.limits("third")
	thirds := e.acquire(third, job("j3"))
	before := l.lastCreated()
	e.eventually("it is listed", func() bool { return !l.lastCreated().Equal(before) })
	thirds()
	e.receive(got)()
	release()
}

func (l *Limits) lastCreated() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.created
}

// landsUnanswered is a store whose writes land while unanswered is set, and are answered
// after it only.
func (e *env) landsUnanswered(unanswered *atomic.Bool) *kv.Store {
	e.t.Helper()
	js := natstest.Way(e.t, e.js.Conn(), func(m *nats.Msg, publish func(*nats.Msg)) {
		if strings.HasPrefix(m.Subject, "$KV.") && unanswered.Load() {
			m.Reply = ""
		}
		publish(m)
	})
	bucket, err := js.KeyValue(e.t.Context(), "STATE")
	if err != nil {
		e.t.Fatal(err)
	}
	return kv.NewStore(js, bucket, 100*time.Millisecond)
}

func TestAKeyWhoseWriteWasNotAnsweredInTimeIsFreeAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var unanswered atomic.Bool
	l, _ := e.limits("w", func(o *Options) { o.Store = e.landsUnanswered(&unanswered) })
	unanswered.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := l.Acquire(ctx, job("j1")); err == nil {
		t.Fatal("acquired by a write that was not answered")
	}
	e.eventually("the write lands", func() bool { return e.keys() == 1 })
	unanswered.Store(false)
	e.eventually("the key is removed", func() bool { return e.keys() == 0 })
	e.acquire(l, job("j1"))()
}

func TestAKeyIsRemovedThoughItWasWrittenAgainWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var unanswered atomic.Bool
	l, _ := e.limits("w", func(o *Options) { o.Store = e.landsUnanswered(&unanswered) })
	release := e.acquire(l, job("j1"))
	unanswered.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	l.rewrite(ctx, limitKey{"app_id/app", 1})
	unanswered.Store(false)
	release()
	e.eventually("the key is removed", func() bool { return e.keys() == 0 })
}

// What the watch reports may come before the answer to a read from before.
func TestAKeyThatIsFreeIsTakenThoughThisWorkerTookItForAnothers(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, _ := e.limits("w", look(20*time.Millisecond))
	l.update(limitKey{"app_id/app", 1}, holder{WorkerID: "other", JobID: "j", revision: 10})
	e.receive(e.waiting(l, job("j1")))()
}

func TestWhereTheKeysCanNotBeListedTheWorkerSaysWhy(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var away atomic.Bool
	away.Store(true)
	l := New(Options{
		Store:  kv.NewStore(e.js, &natstest.UnwatchedBucket{KeyValue: e.bucket, Away: &away}, time.Second),
		Worker: func() string { return "w" }, LeaseValid: e.leaseValid, CheckInterval: time.Hour,
		Apps: map[string]int{"app": 1}, MaxWaiting: 1, Log: zerolog.Nop(),
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { l.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	e.eventually("it says why", func() bool { return l.Err() != nil })
	if !strings.Contains(l.Err().Error(), "session limits") {
		t.Error(l.Err())
	}
	away.Store(false)
	e.eventually("it goes on", func() bool { return l.Err() == nil })
	e.acquire(l, job("j1"))()
}

func TestTooManyThatWaitAreTurnedAway(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, _ := e.limits("w", func(o *Options) { o.MaxWaiting, o.Apps["more"] = 2, 1 })
	release := e.acquire(l, job("j1"))
	more := e.acquire(l, Job{ID: "j2", App: "more"})
	first := e.waiting(l, job("j3"))
	if _, err := l.Acquire(t.Context(), job("j4")); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v: half of the room is for one limit", err)
	}
	second := make(chan func(), 1)
	go func() {
		if r, err := l.Acquire(t.Context(), Job{ID: "j5", App: "more"}); err == nil {
			second <- r
		}
	}()
	e.eventually("both wait", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.waiting == 2
	})
	if _, err := l.Acquire(t.Context(), Job{ID: "j6", App: "more"}); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v: there is room for two", err)
	}
	release()
	more()
	e.receive(first)()
	e.receive(second)()
}

func TestWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, _ := e.limits("w")
	defer e.acquire(l, job("j1"))()
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := l.Acquire(ctx, job("j2"))
		done <- err
	}()
	why := errors.New("drained")
	cancel(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestWorkerWithoutALeaseTakesNoKey(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, _ := e.limits("")
	e.full(l, job("j1"))
	if e.keys() != 0 {
		t.Error("a key names no worker")
	}
}

func TestJobUnderNoLimitWaitsForNothing(t *testing.T) {
	t.Parallel()
	l := New(Options{})
	release, err := l.Acquire(t.Context(), job("j1"))
	if err != nil {
		t.Fatal(err)
	}
	release()
	l.Run(t.Context()) // returns: there is nothing to follow
}

func TestHeldKeyIsWrittenAgainBeforeItsBucketForgetsIt(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, _ := e.limits("w", func(o *Options) { o.RewriteInterval = 20 * time.Millisecond })
	release := e.acquire(l, job("j1"))
	first := e.revision()
	e.eventually("it is written again", func() bool { return e.revision() > first+1 })
	e.full(l, job("j2"))
	release()
	e.eventually("it is free", func() bool { return e.keys() == 0 })
}

// revision is that of the newest key.
func (e *env) revision() uint64 {
	e.t.Helper()
	status, err := e.bucket.Status(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return status.(*jetstream.KeyValueBucketStatus).StreamInfo().State.LastSeq
}

func TestStopRemovesTheKeysThatWereGivenBack(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	l, stop := e.limits("w")
	e.acquire(l, job("j1"))()
	stop()
	if n := e.keys(); n != 0 {
		t.Errorf("%d keys are left", n)
	}
}

func TestNamesOfTheLimitsOfAJob(t *testing.T) {
	t.Parallel()
	l := New(Options{
		Apps: map[string]int{"app": 2, "free": 0},
		Rules: []Rule{
			{Key: "label.room", Max: 1}, {Key: "app_id", Max: 5}, {Key: "avatar_id", Max: 1},
			{Key: "region", Max: 1}, {Key: "queue", Max: 1},
		},
	})
	for name, tc := range map[string]struct {
		job  Job
		want []string
	}{
		"all":           {Job{App: "app", Avatar: "a", Region: "r", Queue: "q", Labels: map[string]string{"room": "x"}}, []string{"app_id/app", "avatar_id/a", "label/room/x", "queue/q", "region/r"}},
		"a rule only":   {Job{App: "free"}, []string{"app_id/free"}},
		"no such label": {Job{App: "app", Labels: map[string]string{"floor": "x"}}, []string{"app_id/app"}},
		"none":          {Job{}, nil},
	} {
		if got := l.Names(tc.job); fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%s: got %v, want %v", name, got, tc.want)
		}
	}
	if b := l.limitsOf(Job{App: "app"}); len(b) != 1 || b[0].max != 2 {
		t.Errorf("got %+v: of two limits for one thing the lower holds", b)
	}
}
