package lease

import (
	"context"
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
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

const waitTime = 60 * time.Second

var window = natstest.Unhurried(2 * time.Second)

// env is a server with a bucket, and a store that other workers read it by.
type env struct {
	t      *testing.T
	server *natsserver.Server
	store  *kv.Store
}

func newEnv(t *testing.T) *env {
	t.Helper()
	s := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, s))
	if err != nil {
		t.Fatal(err)
	}
	bucket, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "STATE", History: 1, LimitMarkerTTL: time.Minute, Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	return &env{t: t, server: s, store: kv.NewStore(js, bucket, window/8)}
}

// worker is a Manager behind a proxy for its requests, and what it reported.
type worker struct {
	*Manager
	nc      *nats.Conn
	proxy   *proxy
	changes chan *Lease
	renewed chan bool
}

// proxy carries requests to the server. It drops them, or only their replies.
type proxy struct {
	mu       sync.Mutex
	requests bool // dropped
	reads    bool // only requests that read are dropped
	replies  int  // how many replies to writes are still to be dropped
	lost     int  // replies dropped
	refusals int  // how many writes are still to be refused, as by a leader of before
	landing  bool // they are stored all the same
}

func (p *proxy) drop(requests bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = requests
}

func (p *proxy) dropReads(reads bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads = reads
}

func (p *proxy) loseReplies(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.replies = n
}

func (p *proxy) refuse(n int, landing bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusals, p.landing = n, landing
}

// refused reports whether a write is refused by the proxy, and whether it is forwarded
// then.
func (p *proxy) refused(subject string) (refused, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refusals == 0 || !strings.HasPrefix(subject, "$KV.STATE."+Prefix) {
		return false, true
	}
	p.refusals--
	return true, p.landing
}

func (p *proxy) lostReplies() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

// carry reports whether a request is forwarded, and returns its reply subject.
func (p *proxy) carry(subject, reply string) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.requests, p.reads && !strings.HasPrefix(subject, "$KV."):
		return "", false
	case p.replies > 0 && strings.HasPrefix(subject, "$KV."):
		p.replies--
		p.lost++
		return nats.NewInbox(), true // JetStream stores the write, and its reply goes nowhere
	default:
		return reply, true
	}
}

func (e *env) worker(id string, with ...func(*Options)) *worker {
	e.t.Helper()
	nc := natstest.Connect(e.t, e.server)
	prefix := "proxy-" + id
	w := &worker{nc: nc, proxy: &proxy{}, changes: make(chan *Lease, 100), renewed: make(chan bool, 1000)}
	between := natstest.Connect(e.t, e.server)
	_, err := between.Subscribe(prefix+".>", func(m *nats.Msg) {
		subject := strings.TrimPrefix(m.Subject, prefix+".")
		if !strings.HasPrefix(subject, "$KV.") {
			subject = jetstream.DefaultAPIPrefix + subject
		}
		reply, on := w.proxy.carry(subject, m.Reply)
		if refused, stored := w.proxy.refused(subject); on && refused {
			const conflict = `{"stream":"KV_STATE","seq":0,"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 1"}}`
			if err := m.Respond([]byte(conflict)); err != nil {
				e.t.Error(err)
			}
			reply, on = nats.NewInbox(), stored
		}
		if !on {
			return
		}
		if err := between.PublishMsg(&nats.Msg{Subject: subject, Reply: reply, Header: m.Header, Data: m.Data}); err != nil {
			e.t.Error(err)
		}
	})
	if err != nil {
		e.t.Fatal(err)
	}
	if err := between.Flush(); err != nil {
		e.t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, prefix)
	if err != nil {
		e.t.Fatal(err)
	}
	bucket, err := js.KeyValue(e.t.Context(), "STATE")
	if err != nil {
		e.t.Fatal(err)
	}
	o := Options{
		NC: nc, Store: kv.NewStore(js, bucket, window/8), ID: id, Window: window, Now: time.Now,
		Changed: func(h *Lease) { w.changes <- h },
		Renewed: func(ok bool) { w.renewed <- ok },
		Log:     zerolog.New(zerolog.NewTestWriter(e.t)),
	}
	for _, f := range with {
		f(&o)
	}
	w.Manager = New(o)
	return w
}

// start starts the worker, and stops it when the test ends.
func (e *env) start(w *worker) *Lease {
	e.t.Helper()
	w.Start(e.t.Context())
	e.t.Cleanup(w.Stop)
	return e.next(w)
}

// next waits for the next change of the worker's lease.
func (e *env) next(w *worker) *Lease {
	e.t.Helper()
	return receive(e.t, w.changes)
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(waitTime):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// leaseValid reports whether another worker finds the lease of this id.
func (e *env) leaseValid(id string) bool {
	e.t.Helper()
	stored, err := e.store.Stored(e.t.Context(), key(id))
	if err != nil {
		e.t.Fatal(err)
	}
	return !stored.IsZero()
}

// expires waits until the server has removed the lease of this id.
func (e *env) expires(id string) {
	e.t.Helper()
	natstest.Eventually(e.t, "the lease of "+id+" expires", func() bool { return !e.leaseValid(id) })
}

func (w *worker) renewals(t *testing.T, n int) {
	t.Helper()
	for range n {
		if !receive(t, w.renewed) {
			t.Fatal("the lease was lost")
		}
	}
}

func TestLeaseIsRenewedBeyondItsWindow(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	if w.Ready() == nil || w.Current() != nil {
		t.Error("a worker has a lease before it starts")
	}
	h := e.start(w)
	if h.ID != "w" || w.Current() != h || w.Ready() != nil {
		t.Errorf("%+v, ready: %v", h, w.Ready())
	}
	w.renewals(t, renewalsPerWindow+1)
	if h.Context().Err() != nil || w.Current() != h || !e.leaseValid("w") {
		t.Error("the lease did not outlive its window")
	}
	if len(w.changes) > 0 {
		t.Error("a renewal was reported as a change")
	}
}

func TestWorkUnderALeaseEndsWithTheContextOfStartWhileTheLeaseGoesOn(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	ctx, end := context.WithCancelCause(t.Context())
	w.Start(ctx)
	h := e.next(w)
	t.Cleanup(w.Stop)
	drained := errors.New("drained")
	end(drained)
	receive(t, h.Context().Done())
	if cause := context.Cause(h.Context()); cause != drained {
		t.Errorf("ended by %v", cause)
	}
	w.renewals(t, renewalsPerWindow+1)
	if w.Current() != h || !e.leaseValid("w") {
		t.Error("the lease ended with the work under it")
	}
}

func TestLeaseOfAWorkerThatDiedExpires(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	h := e.start(w)
	ended := make(chan bool, 1)
	stop := context.AfterFunc(h.Context(), func() { ended <- e.leaseValid("w") })
	defer stop()
	w.proxy.drop(true)
	if !receive(t, ended) {
		t.Error("the key was gone before the worker gave up its sessions")
	}
	if !errors.Is(context.Cause(h.Context()), ErrLost) {
		t.Errorf("ended by %v", context.Cause(h.Context()))
	}
	if e.next(w) != nil || w.Current() != nil {
		t.Error("the loss was not reported")
	}
	if err := w.Ready(); !errors.Is(err, ErrLost) {
		t.Errorf("got %v", err)
	}
	e.expires("w")
}

func TestRenewalWhoseReplyIsLostKeepsTheLease(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	h := e.start(w)
	for range 2 {
		before := w.proxy.lostReplies()
		w.proxy.loseReplies(1)
		for w.proxy.lostReplies() == before {
			w.renewals(t, 1)
		}
	}
	w.renewals(t, 1)
	if h.Context().Err() != nil || w.Current() != h {
		t.Error("a write that landed cost the lease")
	}
}

func TestFirstWriteWhoseReplyIsLostIsTheLease(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	w.proxy.loseReplies(2)
	if h := e.start(w); h.ID != "w" {
		t.Errorf("got %+v", h)
	}
	w.renewals(t, 1)
}

func TestALeaseOutlivesARefusalByALeaderOfBefore(t *testing.T) {
	t.Parallel()
	for name, landing := range map[string]bool{"that the leader of now has taken": true, "that no leader has taken": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t)
			w := e.worker("w")
			first := e.start(w)
			w.renewals(t, 1)
			w.proxy.refuse(2, landing)
			natstest.Eventually(t, "two renewals were refused", func() bool {
				w.proxy.mu.Lock()
				defer w.proxy.mu.Unlock()
				return w.proxy.refusals == 0
			})
			w.renewals(t, 3)
			if first.Context().Err() != nil || w.Current() != first {
				t.Error("the lease was lost")
			}
		})
	}
}

func TestLostLeaseBeginsAgainUnderAnotherID(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	first := e.start(w)
	w.proxy.drop(true)
	if e.next(w) != nil {
		t.Fatal("the loss was not reported")
	}
	w.proxy.drop(false)
	second := e.next(w)
	if second == nil || second.ID != "w-2" || second.Context().Err() != nil {
		t.Fatalf("got %+v", second)
	}
	if first.Context().Err() == nil {
		t.Error("the first lease is valid again")
	}
	for id, own := range map[string]bool{"w": true, "w-2": true, "w-17": true, "w2": false, "": false, "v": false} {
		if w.Own(id) != own {
			t.Errorf("Own(%q) is %v", id, !own)
		}
	}
	if ok, err := w.Valid(t.Context(), "w-2"); !ok || err != nil || w.Ready() != nil {
		t.Errorf("valid: %v %v, ready: %v", ok, err, w.Ready())
	}
	if ok, err := w.Valid(t.Context(), ""); ok || err != nil {
		t.Errorf("a lease without an id is valid: %v %v", ok, err)
	}
	e.expires("w")
	natstest.Eventually(t, "the lost lease is not valid", func() bool { // others' are taken to be for a moment
		ok, err := w.Valid(t.Context(), "w")
		return !ok && err == nil
	})
}

func TestLeaseThatAnotherWriterChangedIsLost(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(ctx context.Context, s *kv.Store, revision uint64) error{
		"overwritten": func(ctx context.Context, s *kv.Store, revision uint64) error {
			_, err := s.Put(ctx, key("w"), entry{WorkerID: "w", Renewal: 1000}, revision)
			return err
		},
		"removed": func(ctx context.Context, s *kv.Store, revision uint64) error {
			return s.Remove(ctx, key("w"), revision)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t)
			w := e.worker("w")
			h := e.start(w)
			for {
				var got entry
				revision, err := e.store.Get(t.Context(), key("w"), &got)
				if err != nil {
					t.Fatal(err)
				}
				if err = change(t.Context(), e.store, revision); err == nil {
					break
				} else if !errors.Is(err, kv.ErrConflict) { // a renewal was faster
					t.Fatal(err)
				}
			}
			if e.next(w) != nil {
				t.Fatal("the loss was not reported")
			}
			if !errors.Is(context.Cause(h.Context()), ErrLost) {
				t.Errorf("ended by %v", context.Cause(h.Context()))
			}
			if second := e.next(w); second == nil || second.ID != "w-2" {
				t.Errorf("got %+v", second)
			}
		})
	}
}

func TestLeaseIsTriedForUntilItCanBeWritten(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	w.proxy.drop(true)
	w.Start(t.Context())
	t.Cleanup(w.Stop)
	natstest.Eventually(t, "a write without a reply is reported", func() bool { return !errors.Is(w.Ready(), errNoLease) })
	if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "can't be written") {
		t.Errorf("got %v", err)
	}
	w.proxy.drop(false)
	if h := e.next(w); h == nil || h.ID != "w" {
		t.Errorf("got %+v", h)
	}
}

func TestCleanStopRemovesTheKey(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	w.Start(t.Context())
	h := e.next(w)
	w.Stop()
	if e.leaseValid("w") {
		t.Error("the key outlives its worker")
	}
	if w.Current() != nil || h.Context().Err() == nil || errors.Is(context.Cause(h.Context()), ErrLost) {
		t.Errorf("current %+v, ended by %v", w.Current(), context.Cause(h.Context()))
	}
}

func TestNowIsTheServersTimeWhateverTheWorkersClock(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var skew atomic.Int64
	skew.Store(int64(-time.Hour))
	w := e.worker("w", func(o *Options) {
		o.Now = func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	})
	off := func() time.Duration { return time.Until(w.Now()).Abs() }
	if off() < 59*time.Minute {
		t.Errorf("off by %s before the server's clock was read", off())
	}
	h := e.start(w)
	w.AwaitClock(t.Context())
	if off() > window {
		t.Errorf("off by %s", off())
	}
	skew.Store(int64(time.Hour)) // the clock is set
	if off() > window {
		t.Errorf("off by %s when the clock was set", off())
	}
	w.renewals(t, renewalsPerClockCheck)
	if off() > window || h.Context().Err() != nil {
		t.Errorf("off by %s after the clock was set, lease: %v", off(), h.Context().Err())
	}
}

func TestAMonotonicClockThatStoodStillIsCorrected(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	e.start(w)
	late := func() bool { return time.Until(w.Now()) < -window }
	for name, reads := range map[string]func(){
		"a short stop": func() { w.renewals(t, renewalsPerClockCheck+1) },
		"a long stop": func() { // the lease has expired meanwhile
			w.proxy.drop(true)
			if e.next(w) != nil {
				t.Fatal("the loss was not reported")
			}
			w.proxy.drop(false)
			e.next(w)
		},
	} {
		c := *w.clock.Load()
		c.local = c.local.Add(time.Hour)
		w.clock.Store(&c)
		if !late() {
			t.Fatalf("%s: the clock is not late", name)
		}
		for len(w.renewed) > 0 {
			<-w.renewed
		}
		reads()
		natstest.Eventually(t, name+": Now is right again", func() bool { return !late() })
	}
}

// A renewal that was answered late may have been stored long before, or just now. A
// clock that is ahead would expire jobs before their deadline.
func TestNowIsNeverAheadHoweverLateARenewalIsAnswered(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	h := e.start(w)
	natstest.Eventually(t, "the next renewal reads the clock", func() bool {
		var now entry
		_, err := e.store.Get(t.Context(), key(h.ID), &now)
		return err == nil && now.Renewal%renewalsPerClockCheck == renewalsPerClockCheck-1
	})
	w.proxy.drop(true) // as while a leader is elected
	<-time.After(850 * time.Millisecond)
	w.proxy.drop(false)
	w.renewals(t, 2)
	const jitter = 20 * time.Millisecond // of the wall clock
	if ahead := time.Until(w.Now()); ahead > jitter {
		t.Errorf("Now is ahead by %s", ahead)
	}
}

func TestThereIsNoLeaseBeforeTheServersClockIsRead(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	w.proxy.dropReads(true)
	w.Start(t.Context())
	t.Cleanup(w.Stop)
	natstest.Eventually(t, "a clock that can't be read is reported", func() bool {
		err := w.Ready()
		return err != nil && strings.Contains(err.Error(), "can't be read")
	})
	w.proxy.dropReads(false)
	if h := e.next(w); h == nil || h.ID != "w" {
		t.Errorf("got %+v", h)
	}
}

func TestAckWaitIsExtendedUntilRelease(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	w := e.worker("w")
	sub, err := natstest.Connect(t, e.server).SubscribeSync("ack.*")
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	e.start(w)
	one, two := w.Track("ack.one"), w.Track("ack.two")
	extended := make(map[string]int)
	// At once, and then three times in a window.
	for extended["ack.one"] < 3 || extended["ack.two"] < 3 {
		msg, err := sub.NextMsg(waitTime)
		if err != nil {
			t.Fatal(err)
		}
		if string(msg.Data) != "+WPI" {
			t.Fatalf("sent %q", msg.Data)
		}
		extended[msg.Subject]++
		if least := min(extended["ack.one"], extended["ack.two"]); least == 0 && extended[msg.Subject] > 1 {
			t.Error("the first extension came a third of a window late")
		}
	}
	one.Release()
	one.Release()
	if err := w.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	after := 0
	for two := 0; two < 2; {
		msg, err := sub.NextMsg(waitTime)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Subject == "ack.two" {
			two++
		} else if two > 0 {
			after++
		}
	}
	if after > 0 {
		t.Error("a message was extended after its release")
	}
	two.Release()
}

func TestMarginLeavesTimeToCloseASession(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ window, want time.Duration }{
		{3 * time.Second, time.Second}, {9 * time.Second, 3 * time.Second}, {time.Minute, 3 * time.Second},
	} {
		if got := Margin(tc.window); got != tc.want {
			t.Errorf("window %s: got %s, want %s", tc.window, got, tc.want)
		}
	}
}

// Sessions under such a lease would end with it, and settle nothing.
func TestThereIsNoLeaseInABucketThatTakesKeysAndNoChanges(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	js, err := jetstream.New(natstest.Connect(t, e.server))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "KV_STATE")
	if err != nil {
		t.Fatal(err)
	}
	config := stream.CachedInfo().Config
	config.DiscardNewPerSubject = true
	if _, err := js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	w := e.worker("w")
	w.Start(t.Context())
	t.Cleanup(w.Stop)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for err := w.Ready(); err == nil || !strings.Contains(err.Error(), "can't be written"); err = w.Ready() {
		select {
		case <-again.C:
		case h := <-w.changes:
			t.Fatalf("it has the lease %+v", h)
		case <-time.After(waitTime):
			t.Fatalf("ready: %v", err)
		}
	}
}
