package alert

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

const (
	waitTime  = 60 * time.Second
	threshold = 3
	window    = time.Hour
	code      = errors.CodeConnectionFailed
)

// env is a stream of error events, a bucket, and the alerts that were published.
type env struct {
	t     *testing.T
	js    jetstream.JetStream
	store *kv.Store

	mu        sync.Mutex
	seq       int
	alerts    map[string]event.RecurringAlert // by id
	published int                             // calls of Publish
	raised    map[errors.Code]int
	fault     error // of publishing
}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{t: t, js: natstest.JetStream(t), alerts: make(map[string]event.RecurringAlert), raised: make(map[errors.Code]int)}
	bucket, err := e.js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "FLEET", History: 1, LimitMarkerTTL: time.Minute, Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	e.store = kv.NewStore(e.js, bucket, 2*time.Second)
	e.makeStream()
	return e
}

func (e *env) makeStream() {
	e.t.Helper()
	if _, err := e.js.CreateStream(e.t.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"errors.>"}, Storage: jetstream.MemoryStorage}); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) counter(worker string) *Counter {
	return New(Options{
		JS: e.js, Stream: "EVENTS", Errors: "errors.>", Now: time.Now,
		Config: Config{Threshold: threshold, Window: window},
		Codes:  func(c errors.Code) bool { return c != errors.CodeInvalidJob },
		Store:  e.store,
		Stored: func(_ context.Context, ev event.Event, _ time.Time) (bool, error) {
			e.mu.Lock()
			defer e.mu.Unlock()
			_, stored := e.alerts[ev.ID]
			return stored, nil
		},
		Publish: func(_ context.Context, ev event.Event) (bool, error) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.published++
			if e.fault != nil {
				return false, e.fault
			}
			_, stored := e.alerts[ev.ID]
			e.alerts[ev.ID] = ev.Body.(event.RecurringAlert)
			return !stored, nil
		},
		Raised: func(c errors.Code) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.raised[c]++
		},
		Worker: worker, Log: zerolog.New(zerolog.NewTestWriter(e.t)),
	})
}

// run counts until the test ends.
func (e *env) run(c *Counter) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	e.t.Cleanup(func() { cancel(); wg.Wait() })
}

// fail publishes the error event of a job.
func (e *env) fail(code errors.Code, job string) {
	e.t.Helper()
	e.mu.Lock()
	e.seq++
	id := fmt.Sprint("event", e.seq)
	e.mu.Unlock()
	e.publish(code, id, job)
}

func (e *env) publish(code errors.Code, id, job string) {
	e.t.Helper()
	data, err := json.Marshal(map[string]string{"job_id": job, "app_id": "app of " + job})
	if err != nil {
		e.t.Fatal(err)
	}
	msg := &nats.Msg{Subject: "errors.transport." + string(code), Data: data, Header: nats.Header{"ce-id": {id}}}
	if _, err := e.js.PublishMsg(e.t.Context(), msg); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) list() []event.RecurringAlert {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []event.RecurringAlert
	for _, a := range e.alerts {
		list = append(list, a)
	}
	return list
}

func (e *env) eventually(what string, ok func() bool) {
	e.t.Helper()
	natstest.Eventually(e.t, what, ok)
}

// alerted waits for the alert of the code.
func (e *env) alerted(c errors.Code) event.RecurringAlert {
	e.t.Helper()
	var got event.RecurringAlert
	e.eventually("alert of "+string(c), func() bool {
		for _, a := range e.list() {
			if a.Code == c {
				got = a
				return true
			}
		}
		return false
	})
	return got
}

func TestFailureThatRecursIsOneAlertOfTheFleet(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.fail(code, "before") // no worker ran then
	for i := range 3 {
		e.run(e.counter(fmt.Sprint("w", i)))
	}
	e.fail(code, "j1")
	e.publish(errors.CodeInvalidJob, "x1", "j")
	e.publish(errors.CodeInvalidJob, "x2", "j")
	e.publish(errors.CodeInvalidJob, "x3", "j")
	e.fail(code, "j1")
	got := e.alerted(code)
	if got.Count != threshold || got.Window != "1h0m0s" || !got.First.Before(got.Last) || got.Time != got.Last {
		t.Errorf("%+v", got)
	}
	if !slices.Equal(got.JobIDs, []string{"j1", "before"}) || !slices.Equal(got.AppIDs, []string{"app of j1", "app of before"}) {
		t.Errorf("jobs %v, apps %v: the newest first, each once", got.JobIDs, got.AppIDs)
	}
	// More of the same within the window is not another alert. That of the
	// second code shows that every worker has counted them.
	e.fail(code, "j2")
	e.fail(code, "j3")
	for range threshold {
		e.fail(errors.CodeInternal, "j4")
	}
	e.alerted(errors.CodeInternal)
	if list := e.list(); len(list) != 2 {
		t.Errorf("%+v", list)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.raised[code] != 1 || e.raised[errors.CodeInternal] != 1 {
		t.Errorf("counted %v: each alert once in the fleet", e.raised)
	}
}

func TestAlertThatCouldNotBePublishedIsPublishedWithTheNextEvent(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.fault = errors.New("no stream")
	e.run(e.counter("w"))
	for range threshold {
		e.fail(code, "j1")
	}
	e.eventually("it was tried", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.published == 1
	})
	e.mu.Lock()
	e.fault = nil
	e.mu.Unlock()
	e.fail(code, "j2")
	if got := e.alerted(code); got.Count != threshold+1 {
		t.Errorf("%+v", got)
	}
}

func TestAlertOfAWorkerThatDiedBetweenClaimAndPublishIsPublishedByAnother(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	dead := e.counter("dead")
	claimed, err := dead.claim(t.Context(), code, time.Now().UTC())
	if err != nil {
		t.Fatal(err)
	}
	e.run(e.counter("w"))
	for range threshold {
		e.fail(code, "j1")
	}
	e.alerted(code)
	id := event.AlertID(event.AlertRecurring, claimed, string(code))
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.alerts[id]; !ok || len(e.alerts) != 1 {
		t.Errorf("%v, want the alert that was claimed: %s", e.alerts, id)
	}
}

func TestAlertIsClaimedAgainOnlyAfterTheWindow(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	a, b := e.counter("a"), e.counter("b")
	now := time.Unix(1_000_000, 0).UTC()
	for _, tc := range []struct {
		by   *Counter
		at   time.Time
		want time.Time
	}{
		{a, now, now},
		{b, now.Add(window - 1), now},
		{a, now.Add(window - 1), now},
		{b, now.Add(window), now.Add(window)},
		{a, now.Add(window + 1), now.Add(window)},
	} {
		if got, err := tc.by.claim(t.Context(), code, tc.at); err != nil || !got.Equal(tc.want) {
			t.Errorf("at %s: got %s, %v, want %s", tc.at, got, err, tc.want)
		}
	}
	if got, err := a.claim(t.Context(), errors.CodeInternal, now); err != nil || !got.Equal(now) {
		t.Errorf("another code: got %s, %v", got, err)
	}
}

func TestCountGoesOnWhenTheStreamIsMadeAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.run(e.counter("w"))
	for range threshold {
		e.fail(code, "j1")
	}
	e.alerted(code)
	if err := e.js.DeleteStream(t.Context(), "EVENTS"); err != nil {
		t.Fatal(err)
	}
	e.makeStream()
	for range threshold {
		e.fail(errors.CodeInternal, "j2")
	}
	e.alerted(errors.CodeInternal)
}

func TestWindowForgetsWhatHasLeftIt(t *testing.T) {
	t.Parallel()
	start := time.Unix(1_000_000, 0)
	w := &eventWindow{ids: make(map[string]bool)}
	add := func(id string, after time.Duration) { w.add(seenEvent{id: id, at: start.Add(after)}, time.Minute) }
	add("a", 0)
	add("b", 10*time.Second)
	add("b", 11*time.Second) // the event again
	if len(w.seen) != 2 {
		t.Errorf("%d events, want 2: one that comes again counts once", len(w.seen))
	}
	add("c", 60*time.Second)
	if len(w.seen) != 2 || w.seen[0].id != "b" {
		t.Errorf("%+v", w.seen)
	}
	add("a", 61*time.Second) // forgotten, so it counts
	if len(w.seen) != 3 || len(w.ids) != 3 {
		t.Errorf("%d events, %d ids", len(w.seen), len(w.ids))
	}
}

func TestWindowIsBounded(t *testing.T) {
	t.Parallel()
	w := &eventWindow{ids: make(map[string]bool)}
	for i := range maxWindow + 100 {
		w.add(seenEvent{id: fmt.Sprint(i), at: time.Unix(0, int64(i))}, time.Hour)
	}
	if len(w.seen) != maxWindow || len(w.ids) != maxWindow || w.seen[0].id != "100" {
		t.Errorf("%d events, %d ids, from %s", len(w.seen), len(w.ids), w.seen[0].id)
	}
}

func TestAlertListsTheNewestJobs(t *testing.T) {
	t.Parallel()
	c := New(Options{Config: Config{Threshold: 1, Window: time.Minute}, Worker: "w"})
	w := &eventWindow{ids: make(map[string]bool)}
	for i := range 3 * event.MaxAlertJobs {
		w.add(seenEvent{id: fmt.Sprint(i), at: time.Unix(int64(i), 0), job: fmt.Sprint("j", i/2)}, time.Hour)
	}
	got := c.event(code, w).Body.(event.RecurringAlert)
	if len(got.JobIDs) != event.MaxAlertJobs || got.JobIDs[0] != "j14" || got.JobIDs[9] != "j5" {
		t.Errorf("jobs %v", got.JobIDs)
	}
	if got.AppIDs == nil || len(got.AppIDs) != 0 || got.Count != 30 || got.Worker != "w" {
		t.Errorf("%+v", got)
	}
}
