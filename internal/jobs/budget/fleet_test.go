package budget_test

import (
	"context"
	"encoding/json"
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
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

var names = topology.Names{Prefix: "avatar"}

// env is a fleet's streams, with budgets of one worker or more.
type env struct {
	t       *testing.T
	js      jetstream.JetStream
	h       topology.Handles
	ledger  *usage.Ledger
	now     time.Time
	session int
}

func newEnv(t *testing.T) *env {
	t.Helper()
	t.Parallel() // they mostly wait
	js, err := jetstream.New(natstest.ConnectURL(t, natstest.Start(t).ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	h, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
	if err != nil {
		t.Fatal(err)
	}
	return &env{t: t, js: js, h: h, now: time.Date(2026, 2, 28, 23, 0, 0, 0, time.UTC), ledger: usage.NewLedger(usage.Options{JS: js, Names: names, Window: 1000 * 24 * time.Hour, Now: time.Now})}
}

// spend has a session cost so much.
func (e *env) spend(app, customer string, credits int64) {
	e.t.Helper()
	e.session++
	r := usage.Record{JobID: "J", Run: 1, Session: e.session, AppID: app, Queue: "default", ConfirmedAt: e.now, Credits: credits, ConnectedMS: 1}
	if customer != "" {
		r.Labels = map[string]string{"customer": customer}
	}
	if _, err := e.ledger.Store(e.t.Context(), r); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) catchUp() {
	e.t.Helper()
	c, err := usage.OpenCounters(e.t.Context(), e.js, names, []string{"customer"})
	if err == nil {
		err = c.CatchUp(e.t.Context(), func(err error) { e.t.Error(err) })
	}
	if err != nil {
		e.t.Fatal(err)
	}
}

// budgets runs those of a worker until the test ends. leaseValid reports whether a worker's lease is valid.
func (e *env) budgets(worker string, leaseValid func(string) bool, warned chan<- budget.Warning, rules ...budget.Rule) *budget.Budgets {
	e.t.Helper()
	return e.budgetsIn(kv.NewStore(e.js, e.h.State, 2*time.Second), worker, leaseValid, warned, rules...)
}

// budgetsIn is budgets with another way to the bucket of reservations.
func (e *env) budgetsIn(state *kv.Store, worker string, leaseValid func(string) bool, warned chan<- budget.Warning, rules ...budget.Rule) *budget.Budgets {
	e.t.Helper()
	b := budget.New(budget.Options{
		Rules: rules, JS: e.js, Names: names, State: state, Fleet: kv.NewStore(e.js, e.h.Fleet, 100*time.Millisecond), Least: 1, Labels: []string{"customer"},
		Worker: func() string { return worker }, LeaseValid: func(_ context.Context, id string) (bool, error) { return leaseValid(id), nil },
		Written: e.ledger.Sequence, Now: func() time.Time { return e.now }, Log: zerolog.Nop(),
		Warned: func(w budget.Warning) {
			select {
			case warned <- w:
			default:
			}
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); b.Run(ctx) }()
	e.t.Cleanup(func() { cancel(); <-done })
	return b
}

func alive(string) bool { return true }

// reserve reserves for a job, and returns nil if it may not start.
func (e *env) reserve(b *budget.Budgets, app, customer string) (release func()) {
	e.t.Helper()
	job := budget.Job{App: app}
	if customer != "" {
		job.Labels = map[string]string{"customer": customer}
	}
	natstest.Eventually(e.t, "the budgets are known", func() bool { // which a busy machine may not read in time
		var refusal *budget.Refusal
		var err error
		if release, refusal, err = b.Reserve(e.t.Context(), job); err != nil {
			return false
		}
		if refusal != nil && release != nil {
			e.t.Error("a refusal with a reservation")
		}
		return true
	})
	return release
}

// counts reserves until it is refused, and returns how often it was not.
func (e *env) counts(b *budget.Budgets, app, customer string) (n int) {
	for ; n < 100; n++ {
		if e.reserve(b, app, customer) == nil {
			return n
		}
	}
	return n
}

func TestABudgetCountsWhatWasSpentAndWhatRuns(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "acme", 2) // in the counters
	e.catchUp()
	e.spend("app", "acme", 1) // not yet
	rule := budget.Rule{Key: "label.customer", Credits: 8, Per: budget.Month}
	one, two := e.budgets("one", alive, nil, rule), e.budgets("two", alive, nil, rule)
	release := e.reserve(one, "app", "acme")
	if release == nil {
		t.Fatal("there is something left")
	}
	if n := e.counts(two, "app", "acme"); n != 4 {
		t.Errorf("%d more sessions could start, want 8 less 3 spent and one that runs", n)
	}
	if n := e.counts(two, "app", "other"); n != 8 {
		t.Errorf("%d sessions of another customer, want 8", n)
	}
	if n := e.counts(two, "app", ""); n != 100 {
		t.Errorf("%d sessions without the label", n)
	}
	e.spend("app", "acme", 1) // the session that ran cost what it had reserved
	release()
	if e.reserve(two, "app", "acme") != nil {
		t.Error("what ran is spent now, and nothing is left")
	}
}

func TestReservationsOfAWorkerThatIsGoneAreDropped(t *testing.T) {
	e := newEnv(t)
	rule := budget.Rule{Key: "app_id", Credits: 3, Per: budget.Day}
	dead := e.budgets("dead", alive, nil, rule)
	if n := e.counts(dead, "app", ""); n != 3 {
		t.Fatalf("%d sessions", n)
	}
	b := e.budgets("b", func(id string) bool { return id != "dead" }, nil, rule)
	if n := e.counts(b, "app", ""); n != 3 {
		t.Errorf("%d sessions after the worker's lease has ended, want 3", n)
	}
}

func TestAJobUnderTwoBudgetsNeedsBoth(t *testing.T) {
	e := newEnv(t)
	b := e.budgets("w", alive, nil,
		budget.Rule{Key: "app_id", Credits: 5, Per: budget.Day}, budget.Rule{Key: "app_id", Credits: 4, Per: budget.Month},
		budget.Rule{Key: "label.customer", Credits: 2, Per: budget.Month})
	if n := e.counts(b, "app", "acme"); n != 2 {
		t.Errorf("%d of one customer, want 2", n)
	}
	if n := e.counts(b, "app", "other"); n != 2 {
		t.Errorf("%d of another, want what the app has left", n)
	}
	// What was reserved for a job that was refused is given back.
	if n := e.counts(b, "second", "acme"); n != 0 {
		t.Errorf("%d", n)
	}
	if n := e.counts(b, "second", "third"); n != 2 {
		t.Errorf("%d of a second app, want 2", n)
	}
}

func TestANewPeriodBeginsWithTheWholeBudget(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "acme", 9)
	b := e.budgets("w", alive, nil, budget.Rule{Key: "label.customer", Credits: 9, Per: budget.Month}, budget.Rule{Key: "app_id", Credits: 9, Per: budget.Day})
	if e.reserve(b, "app", "acme") != nil {
		t.Error("February is spent")
	}
	e.now = e.now.Add(time.Hour) // the first of March, UTC
	if n := e.counts(b, "app", "acme"); n != 9 {
		t.Errorf("%d in March, want 9", n)
	}
}

func TestABudgetIsRaisedAndLoweredWhileItRuns(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "", 3)
	b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 3, Per: budget.Month})
	set := func(credits int64) {
		t.Helper()
		if _, err := e.h.Fleet.Put(t.Context(), budget.SettingKey("app_id", budget.Month), fmt.Appendf(nil, `{"credits":%d}`, credits)); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, free bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for deadline := time.After(natstest.Patience); (b.Peek(budget.Job{App: "app"}) == nil) != free; {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("never: %s", what)
			}
		}
	}
	if e.reserve(b, "app", "") != nil {
		t.Error("it is spent")
	}
	set(5)
	until("raised", true)
	set(2)
	until("lowered below what is spent", false)
	if err := e.h.Fleet.Delete(t.Context(), budget.SettingKey("app_id", budget.Month)); err != nil {
		t.Fatal(err)
	}
	until("as configured: spent", false)
}

func TestItWarnsOnceAtItsShareAndOnceAtItsEnd(t *testing.T) {
	e := newEnv(t)
	warned := make(chan budget.Warning, 16)
	b := e.budgets("w", alive, warned, budget.Rule{Key: "label.customer", Credits: 10, Per: budget.Month, Warn: 0.8})
	if e.reserve(b, "app", "acme") == nil { // it has read what there was
		t.Fatal("nothing is spent")
	}
	for range 7 {
		e.spend("app", "acme", 1)
	}
	e.spend("app", "other", 1)
	e.spend("app", "acme", 1)
	if w := <-warned; w.Over || w.Value != "acme" || w.Spent != 8 || w.Credits != 10 {
		t.Errorf("%+v", w)
	}
	e.spend("app", "acme", 1)
	e.spend("app", "acme", 4)
	if w := <-warned; !w.Over || w.Spent != 13 && w.Spent != 10 {
		t.Errorf("%+v", w)
	}
	select {
	case w := <-warned:
		t.Errorf("one more: %+v", w)
	default:
	}
}

// The worker that saw it may have died before its alert was published.
func TestAWorkerThatStartsWarnsOfWhatIsSpentAsItWasSet(t *testing.T) {
	e := newEnv(t)
	for customer, credits := range map[string]int64{"raised": 15, "spent": 40, "little": 7} {
		e.spend("app", customer, credits)
	}
	key := budget.SettingKey("label.customer", budget.Month)
	if _, err := e.h.Fleet.PutString(t.Context(), key, `{"credits":20}`); err != nil {
		t.Fatal(err)
	}
	warned := make(chan budget.Warning, 16)
	e.budgets("w", alive, warned, budget.Rule{Key: "label.customer", Credits: 5, Per: budget.Month, Warn: 0.7})
	got := map[string]budget.Warning{}
	for range 2 {
		select {
		case w := <-warned:
			got[w.Value] = w
		case <-time.After(natstest.Patience):
			t.Fatalf("only %v", got)
		}
	}
	if w := got["raised"]; w.Over || w.Credits != 20 || w.Spent != 15 {
		t.Errorf("raised: %+v", w)
	}
	if w := got["spent"]; !w.Over || w.Credits != 20 {
		t.Errorf("spent: %+v", w)
	}
	// Lowered below what is spent: it is spent now.
	if _, err := e.h.Fleet.PutString(t.Context(), key, `{"credits":6}`); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if w := <-warned; w.Value == "spent" || !w.Over || w.Credits != 6 {
			t.Errorf("lowered: %+v", w)
		}
	}
}

// What was set lower holds from the first session on.
func TestNoSessionStartsBeforeWhatWasSetIsKnown(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "", 3)
	if _, err := e.h.Fleet.PutString(t.Context(), budget.SettingKey("app_id", budget.Month), `{"credits":3}`); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 1000, Per: budget.Month})
		if e.reserve(b, "app", "") != nil {
			t.Fatal("a session of a budget that is spent")
		}
	}
}

// An election of the bucket's leader is no reason to spend by the configured credits.
func TestWhereWhatWasSetCanNotBeReadNoSessionStarts(t *testing.T) {
	e := newEnv(t)
	var away atomic.Bool
	away.Store(true)
	e.h.Fleet = &natstest.UnwatchedBucket{KeyValue: e.h.Fleet, Away: &away}
	b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 5, Per: budget.Month})
	job := budget.Job{App: "app"}
	natstest.Eventually(t, "it says why", func() bool {
		return b.Peek(job) != nil && b.Err() != nil && strings.Contains(b.Err().Error(), "cost budget")
	})
	if release, _, _ := b.Reserve(t.Context(), job); release != nil {
		t.Error("a session was started")
	}
	away.Store(false)
	natstest.Eventually(t, "it goes on", func() bool { return b.Err() == nil && b.Peek(job) == nil })
	e.reserve(b, "app", "")()
}

// Its revisions are below those that the worker has seen.
func TestABudgetIsSetInABucketThatWasMadeAgain(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "", 1)
	b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 100, Per: budget.Day})
	set := func(credits int) {
		t.Helper()
		if _, err := e.h.Fleet.PutString(t.Context(), budget.SettingKey("app_id", budget.Day), fmt.Sprintf(`{"credits":%d}`, credits)); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 20 {
		set(50 + n)
	}
	e.reserve(b, "app", "")()
	if err := e.js.DeleteKeyValue(t.Context(), names.FleetBucket()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), e.js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	set(1)
	natstest.Eventually(t, "nothing is left", func() bool { return b.Peek(budget.Job{App: "app"}) != nil })
}

// running is how many sessions each worker has reserved under the budget of the app.
func (e *env) running() map[string]int {
	e.t.Helper()
	entry, err := e.h.State.Get(e.t.Context(), "budget.app_id.app")
	if err != nil {
		e.t.Fatal(err)
	}
	var r struct {
		Running map[string]int `json:"running"`
	}
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		e.t.Fatal(err)
	}
	return r.Running
}

func TestAKeyWhoseWritesAreNotAnsweredKeepsNoOthersWaiting(t *testing.T) {
	e := newEnv(t)
	var lost atomic.Int32
	var answered atomic.Bool
	js := natstest.Way(t, e.js.Conn(), func(m *nats.Msg, publish func(*nats.Msg)) {
		if strings.HasPrefix(m.Subject, "$KV.") && strings.HasSuffix(m.Subject, ".slow") && !answered.Load() {
			lost.Add(1)
			return
		}
		publish(m)
	})
	state, err := js.KeyValue(t.Context(), e.h.State.Bucket())
	if err != nil {
		t.Fatal(err)
	}
	b := e.budgetsIn(kv.NewStore(js, state, 2*time.Second), "w", alive, nil, budget.Rule{Key: "label.customer", Credits: 4, Per: budget.Day})
	e.reserve(b, "app", "quick")()
	ctx, cancel := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if _, _, err := b.Reserve(ctx, budget.Job{App: "app", Labels: map[string]string{"customer": "slow"}}); !errors.Is(err, context.Canceled) {
			t.Errorf("a reservation that was not written: %v", err)
		}
	})
	natstest.Eventually(t, "the slow key is written", func() bool { return lost.Load() > 0 })
	var reserved atomic.Bool
	waiting.Go(func() {
		e.reserve(b, "app", "quick")()
		reserved.Store(true)
	})
	natstest.Eventually(t, "another key is written meanwhile", reserved.Load)
	answered.Store(true)
	cancel()
	waiting.Wait()
}

// overwritten runs budgets whose next write, once it is armed, lands, is not answered,
// and is overwritten by another worker, which reserves a session.
func (e *env) overwritten(worker string, rule budget.Rule) (b *budget.Budgets, arm func(landed func() bool), reserved <-chan func(), writes *atomic.Int32) {
	e.t.Helper()
	other := e.budgets("other", alive, nil, rule)
	releases := make(chan func(), 1)
	var armed atomic.Pointer[func() bool]
	writes = new(atomic.Int32)
	js := natstest.Way(e.t, e.js.Conn(), func(m *nats.Msg, publish func(*nats.Msg)) {
		landed := (*func() bool)(nil)
		if strings.HasPrefix(m.Subject, "$KV.") {
			landed = armed.Swap(nil)
			defer writes.Add(1)
		}
		if landed == nil {
			publish(m)
			return
		}
		m.Reply = ""
		publish(m)
		natstest.Eventually(e.t, "it landed", *landed)
		releases <- e.reserve(other, "app", "")
	})
	state, err := js.KeyValue(e.t.Context(), e.h.State.Bucket())
	if err != nil {
		e.t.Fatal(err)
	}
	b = e.budgetsIn(kv.NewStore(js, state, 200*time.Millisecond), worker, alive, nil, rule)
	return b, func(landed func() bool) { armed.Store(&landed) }, releases, writes
}

func TestAReservationIsMadeOnceThoughItsAnswerIsLost(t *testing.T) {
	e := newEnv(t)
	rule := budget.Rule{Key: "app_id", Credits: 4, Per: budget.Day}
	b, arm, reserved, _ := e.overwritten("slow", rule)
	e.reserve(b, "app", "")() // there is a key
	natstest.Eventually(t, "it is given back", func() bool { return len(e.running()) == 0 })
	arm(func() bool { return e.running()["slow"] == 1 })
	release := e.reserve(b, "app", "")
	if got := e.running(); got["slow"] != 1 || got["other"] != 1 {
		t.Errorf("one session of each worker: %v", got)
	}
	release()
	(<-reserved)()
	natstest.Eventually(t, "both are given back", func() bool { return len(e.running()) == 0 })
}

func TestAReservationIsGivenBackOnceThoughTheAnswerIsLost(t *testing.T) {
	e := newEnv(t)
	rule := budget.Rule{Key: "app_id", Credits: 4, Per: budget.Day}
	b, arm, reserved, writes := e.overwritten("slow", rule)
	first, second := e.reserve(b, "app", ""), e.reserve(b, "app", "")
	arm(func() bool { return e.running()["slow"] == 1 })
	first()
	release := <-reserved
	natstest.Eventually(t, "it is written again", func() bool { return writes.Load() == 5 }) // two reservations; lost, refused, stored
	if _, err := e.h.State.PutString(t.Context(), "after", ""); err != nil {                 // what was written before is stored now
		t.Fatal(err)
	}
	if got := e.running(); got["slow"] != 1 || got["other"] != 1 {
		t.Errorf("one session of each worker: %v", got)
	}
	second()
	release()
	natstest.Eventually(t, "both are given back", func() bool { return len(e.running()) == 0 })
}

// Circuits and settings are in that bucket; sessions go on without it.
func TestWithoutTheBucketOfTheFleetBudgetsAreAsConfigured(t *testing.T) {
	e := newEnv(t)
	e.spend("app", "", 3)
	if err := e.js.DeleteKeyValue(t.Context(), names.FleetBucket()); err != nil {
		t.Fatal(err)
	}
	b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 5, Per: budget.Month})
	if n := e.counts(b, "app", ""); n != 2 {
		t.Errorf("%d sessions, want 2", n)
	}
}

func TestBudgetsAreKeptWithoutCounters(t *testing.T) {
	e := newEnv(t)
	if err := e.js.DeleteStream(t.Context(), names.TotalsStream()); err != nil {
		t.Fatal(err)
	}
	e.now = time.Now().UTC()
	e.spend("app", "", 4)
	b := e.budgets("w", alive, nil, budget.Rule{Key: "app_id", Credits: 6, Per: budget.Day})
	if n := e.counts(b, "app", ""); n != 2 {
		t.Errorf("%d sessions, want 2", n)
	}
}
