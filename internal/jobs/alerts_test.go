package jobs_test

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

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// slowCircuits stay open as long as the test lasts.
func slowCircuits(o *options) { o.Circuit.Cooldown, o.Circuit.MaxCooldown = time.Hour, time.Hour }

func TestEveryCircuitThatOpensAtOnceIsPublished(t *testing.T) {
	h := newEnv(t)
	apps := size(150, 400)
	var all sync.WaitGroup
	all.Add(apps)
	h.start(runnerFunc(func(_ context.Context, a *jobs.Attempt) error {
		if a.Session == 1 {
			all.Done()
			all.Wait()
		}
		return failure(errors.CodeCreditsExhausted, errors.PhaseToken)
	}), slowCircuits, func(o *options) { o.Concurrency, o.AckWait = apps, 20*time.Second })
	h.publishAll(apps, func(i int) *nats.Msg {
		return &nats.Msg{Subject: h.names.Jobs("default"), Data: []byte(job(fmt.Sprintf("j%d", i), fmt.Sprintf(`"app_id":"app-%d"`, i)))}
	})
	h.eventually("every circuit is reported", func() bool { return h.countUnder("avatar.alerts.circuit_opened.>") == apps })
}

// countUnder is the number of events under a filter.
func (h *env) countUnder(filter string) int {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	info, err := h.handles.Events.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return -1 // the stream is away
	}
	n := 0
	for _, k := range info.State.Subjects {
		n += int(k)
	}
	return n
}

func TestCircuitIsPublishedOnceTheEventsStreamIsThereAgain(t *testing.T) {
	h := newEnv(t)
	h.start(unpaid(), slowCircuits, func(o *options) { o.SettleTimeout = 200 * time.Millisecond })
	config := h.handles.Events.CachedInfo().Config
	if err := h.js.DeleteStream(t.Context(), config.Name); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j1", `"app_id":"app-bad"`))
	h.state("j1", lifecycle.StateHeld)
	h.stays(time.Duration(size(1, 14))*time.Second, "held", func() bool { return h.record("j1").State == lifecycle.StateHeld })
	if _, err := h.js.CreateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.handles.Events, err = h.js.Stream(t.Context(), config.Name); err != nil {
		t.Fatal(err)
	}
	h.eventually("hold and circuit are reported", func() bool {
		return h.countUnder("avatar.events.held.>") == 1 && h.countUnder("avatar.alerts.circuit_opened.>") == 1
	})
}

// opened is called when a circuit opens.
type opened struct {
	nopObserver
	f func()
}

func (o opened) CircuitOpen(_, _ string, open bool) {
	if open {
		o.f()
	}
}

func TestCircuitOfAWorkerThatDiedIsPublished(t *testing.T) {
	h := newEnv(t)
	made := make(chan *worker, 1)
	var once sync.Once
	died := make(chan struct{})
	w := h.start(unpaid(), slowCircuits, func(o *options) {
		o.Logger = zerolog.Nop()
		o.Observer = opened{f: func() {
			once.Do(func() {
				(<-made).kill()
				close(died)
			})
		}}
	})
	made <- w
	h.submit("default", job("j1", `"app_id":"app-bad"`))
	receive(t, died, "circuit")
	h.start(unpaid(), slowCircuits)
	h.state("j1", lifecycle.StateHeld)
	h.eventually("the circuit is reported", func() bool { return h.countUnder("avatar.alerts.circuit_opened.>") == 1 })
}

func TestRegionsThatJobsNameLeaveFewCircuits(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeConnectionFailed, errors.PhaseConnect)
	}), func(o *options) { o.Retry.MaxAttempts, o.Logger = 1, zerolog.Nop() })
	h.publishAll(300, func(i int) *nats.Msg {
		return &nats.Msg{Subject: h.names.Jobs("default"), Data: []byte(job(fmt.Sprintf("r%d", i), fmt.Sprintf(`"region":"x-%d"`, i)))}
	})
	h.settled()
	keys, err := h.handles.Fleet.ListKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unbounded, circuits := 0, 0
	for key := range keys.Keys() {
		if !strings.HasPrefix(key, "circuit.") {
			continue
		}
		circuits++
		msg, err := h.fleetMessage(key)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Header.Get("Nats-TTL") == "" {
			unbounded++
		}
	}
	if unbounded > 0 {
		t.Errorf("%d of %d circuits of regions that do not exist are kept for ever", unbounded, circuits)
	}
}

func (h *env) fleetMessage(key string) (*jetstream.RawStreamMsg, error) {
	s, err := h.js.Stream(h.t.Context(), "KV_"+h.names.FleetBucket())
	if err != nil {
		return nil, err
	}
	return s.GetLastMsgForSubject(h.t.Context(), "$KV."+h.names.FleetBucket()+"."+key)
}

// A probe is its worker's while the lease is valid, however long it says nothing.
func TestNoSecondProbeWhileOneIsUnderWay(t *testing.T) {
	h := newEnv(t)
	renewed := newRenewals()
	var probes atomic.Int32
	leave := make(chan struct{})
	began := make(chan struct{}, 9)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.AppID != "app-x" {
			_, err := speakAll(ctx, a)
			return err
		}
		if probes.Add(1) == 1 {
			return failure(errors.CodeCreditsExhausted, errors.PhaseToken)
		}
		connect(a)
		began <- struct{}{}
		<-leave // live speech that begins late: no frame yet
		_, err := speakAll(ctx, a)
		return err
	}), func(o *options) { o.Observer = renewed })
	for i := range 5 {
		h.submit("default", job(fmt.Sprintf("x%d", i), `"app_id":"app-x"`))
		if i == 0 {
			h.state("x0", lifecycle.StateHeld)
		}
	}
	receive(t, began, "probe")
	first := probes.Load()
	for i := range 12 { // three leases, with a busy worker
		h.submit("default", job(fmt.Sprintf("busy%d", i)))
		receive(t, renewed.done, "renewal")
	}
	if n := probes.Load() - first; n != 0 {
		t.Errorf("%d more probes than the first", n)
	}
	close(leave)
	for i := range 5 {
		h.outcome(fmt.Sprintf("x%d", i), lifecycle.StateCompleted)
	}
}

// One worker's clock is a day and an hour ahead.
func TestWrongClockGivesNoHeldJobUp(t *testing.T) {
	h := newEnv(t)
	lasts := func(o *options) {
		o.Circuit.Cooldown, o.Circuit.MaxCooldown, o.MaxHold = 300*time.Millisecond, 300*time.Millisecond, 24*time.Hour
	}
	var ahead atomic.Int32
	runner := unpaid()
	h.start(runner, lasts)
	const n = 30
	for i := range n {
		h.submit("default", job(fmt.Sprintf("h%d", i), `"app_id":"app-bad"`))
	}
	for i := range n {
		h.state(fmt.Sprintf("h%d", i), lifecycle.StateHeld)
	}
	looked := postponed{n: &ahead}
	w := h.start(runner, lasts, func(o *options) {
		o.Observer = looked
		o.Now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	})
	h.eventually("it has looked at some", func() bool { return ahead.Load() >= 10 })
	if dead := h.messages(h.names.DLQStream()); dead != 0 {
		t.Errorf("%d of %d held jobs are dead letters", dead, n)
	}
	w.end()
}

// postponed counts the jobs that a worker hands back for a while.
type postponed struct {
	nopObserver
	n *atomic.Int32
}

func (p postponed) Postponed(string, lifecycle.State, time.Duration) { p.n.Add(1) }

// Whatever ends them: here the worker loses its lease each time.
func TestJobWhoseSessionsSettleNothingIsHeldWithAnAlert(t *testing.T) {
	h := newEnv(t)
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		h.loseLeases()
		return untilDone(ctx)
	})
	h.start(s, func(o *options) { o.Logger = zerolog.Nop() })
	h.submit("default", job("j1"))
	r := h.state("j1", lifecycle.StateHeld)
	if r.HeldReason != lifecycle.HeldUnsettled || r.Attempt != 1 || r.Crashes != 0 {
		t.Errorf("held for %s, attempt %d, %d crashes", r.HeldReason, r.Attempt, r.Crashes)
	}
	h.eventually("it is reported", func() bool { return h.countUnder("avatar.alerts.unsettled.>") == 1 })
	e := h.events("avatar.alerts.unsettled.>")[0]
	if e.body["job_id"] != "j1" || !strings.Contains(fmt.Sprint(e.body["message"]), "5 sessions") {
		t.Errorf("%v", e.body)
	}
	h.stays(2*testAckWait, "no more sessions", func() bool { return len(s.ran()) == 5 })
	if n := h.messages(h.names.DLQStream()); n != 0 {
		t.Errorf("%d dead letters", n)
	}
}

// Its worker can't publish it, and is gone before it could.
func TestAlertAboutAJobThatSettlesNothingOutlivesItsWorker(t *testing.T) {
	h := newEnv(t)
	empty := h.full(h.names.EventsStream())
	now := time.Now().UTC()
	h.put(&lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 1, Session: 5, Unsettled: lifecycle.MaxUnsettled, State: lifecycle.StateReleased, Queue: "default", AppID: "app1",
		AvatarID: "a", Attempt: 1, MaxAttempts: 5, CreatedAt: now, UpdatedAt: now, Reason: "unrecorded",
	})
	h.submit("default", job("j1"))
	s := &script{}
	short := func(o *options) { o.SettleTimeout, o.Logger = 300*time.Millisecond, zerolog.Nop() }
	w := h.start(s, short)
	h.eventually("the worker notices", func() bool { return w.Ready() != nil })
	w.end()
	empty()
	h.start(s, short)
	h.state("j1", lifecycle.StateHeld)
	h.eventually("it is reported", func() bool { return h.countUnder("avatar.alerts.unsettled.>") == 1 })
	if ran := s.ran(); len(ran) != 0 {
		t.Errorf("sessions %v", ran)
	}
}

// loseLeases removes every worker's lease.
func (h *env) loseLeases() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	keys, err := h.handles.State.ListKeysFiltered(ctx, lease.Prefix+"*")
	if err != nil {
		h.t.Error(err)
		return
	}
	for key := range keys.Keys() {
		if err := h.handles.State.Purge(ctx, key); err != nil {
			h.t.Error(err)
		}
	}
}

// The worker may not publish dead letters.
func TestDeadLettersThatCannotBeWrittenTakeNoJobsSlot(t *testing.T) {
	t.Parallel()
	url, admin := natstest.Denying(t, "avatar.dlq.>")
	h := &env{t: t, url: url, storage: jetstream.MemoryStorage, settings: topology.DefaultSettings()}
	h.nc = natstest.ConnectURL(t, admin)
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		t.Fatal(err)
	}
	h.settings.AckWait, h.settings.Storage = 10*time.Second, h.storage
	h.ensure()
	w := h.start(&script{}, func(o *options) {
		o.AckWait, o.Concurrency, o.SettleTimeout = 10*time.Second, 4, 3*time.Second
		o.natsOpt = []nats.Option{nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}
		o.Logger = zerolog.Nop()
		nc := natstest.ConnectURL(t, url, o.natsOpt...)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		o.DeadLetters = dlq.NewWriter(js, h.names)
	})
	// If each held one of the four slots for the three seconds of SettleTimeout, they
	// would hold all of them for two minutes.
	for range 160 {
		h.submit("default", `{"nonsense":1}`)
	}
	h.eventually("not ready for want of dead letters", func() bool {
		err := w.Ready()
		return err != nil && strings.Contains(err.Error(), "dead letters")
	})
	for i := range size(10, 50) {
		from, id := time.Now(), fmt.Sprintf("good%d", i)
		h.submit("default", job(id))
		h.outcome(id, lifecycle.StateCompleted)
		if took := time.Since(from); took > time.Minute {
			t.Errorf("job %d waited %s", i, took)
		}
	}
}
