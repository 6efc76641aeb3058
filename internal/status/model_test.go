package status_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"pgregory.net/rapid"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

// follow runs a model until the test ends. It polls only when it is asked to.
func follow(t testing.TB, js jetstream.JetStream, names topology.Names, every time.Duration) *status.Model {
	t.Helper()
	m := status.NewModel(status.NewStore(js, names, nil, time.Minute), every)
	running(t, m)
	return m
}

// running runs a model until the test ends.
func running(t testing.TB, m *status.Model) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		m.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

func refresh(t testing.TB, m *status.Model) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	if err := m.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
}

// action is one thing that happens to a fleet.
type action struct{ Kind, A, B int }

// world is a fleet that things happen to.
type world struct {
	t       *testing.T
	js      jetstream.JetStream
	names   topology.Names
	h       topology.Handles
	taken   []jetstream.Msg // delivered and not settled
	records []string        // ids of jobs with a record that were not replayed
	jobs    int
}

func (w *world) do(a action) {
	t := w.t
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%+v: %v", a, err)
		}
	}
	ctx := t.Context()
	queue := []string{"default", "vip", "unserved"}[a.B%3]
	record := func(r lifecycle.Record) {
		data, err := json.Marshal(r)
		must(err)
		_, err = w.h.State.Put(ctx, r.JobID, data)
		must(err)
	}
	switch a.Kind % 13 {
	case 0, 1, 2: // a job is published
		w.jobs++
		header := nats.Header{"Avatar-Job-Id": {"job" + strconv.Itoa(w.jobs)}}
		if a.A%7 == 0 && len(w.records) > 0 { // a replay
			i := a.B % len(w.records)
			header = nats.Header{"Avatar-Job-Id": {w.records[i]}, "Avatar-Run": {"2"}}
			w.records = append(w.records[:i], w.records[i+1:]...)
		}
		body := fmt.Sprintf(`{"app_id":"app%d","avatar_id":"x","audio":{"url":"https://h/a.wav"},"labels":{"customer":"c<%d>"}}`, a.A%3, a.B%4)
		if a.A%11 == 0 {
			body = "no job"
		}
		_, err := w.js.PublishMsg(ctx, &nats.Msg{Subject: w.names.Jobs(queue), Header: header, Data: []byte(body)})
		must(err)
	case 3, 4: // a worker takes jobs
		if queue == "unserved" {
			return
		}
		batch, err := w.h.Consumers[queue].FetchNoWait(1 + a.A%3)
		must(err)
		for msg := range batch.Messages() {
			id := msg.Headers().Get("Avatar-Job-Id")
			meta, err := msg.Metadata()
			must(err)
			run := 1
			if msg.Headers().Get("Avatar-Run") != "" {
				run = 2
			}
			w.taken = append(w.taken, msg)
			if a.A%5 < 2 {
				continue // it waits for a session limit
			}
			record(w.record(id, run, queue, meta, lifecycle.StateRunning, a))
			if run == 1 {
				w.records = append(w.records, id)
			}
		}
	case 5, 6, 7: // a job that was taken gets on
		if len(w.taken) == 0 {
			return
		}
		i := a.A % len(w.taken)
		msg := w.taken[i]
		meta, err := msg.Metadata()
		must(err)
		queue, _ := w.names.QueueOf(msg.Subject())
		state := []lifecycle.State{lifecycle.StateRetrying, lifecycle.StateHeld, lifecycle.StateReleased, lifecycle.StateCompleted, lifecycle.StateDeadLettered, lifecycle.StateExpired}[a.B%6]
		run := 1
		if msg.Headers().Get("Avatar-Run") != "" {
			run = 2
		}
		record(w.record(msg.Headers().Get("Avatar-Job-Id"), run, queue, meta, state, a))
		if state.Final() {
			must(msg.DoubleAck(ctx))
			w.taken = append(w.taken[:i], w.taken[i+1:]...)
		}
	case 8: // a failure, and maybe a dead letter
		code := []errors.Code{errors.CodeServerError, errors.CodeAvatarNotFound}[a.A%2]
		_, err := w.js.PublishMsg(ctx, &nats.Msg{Subject: w.names.Errors(string(code.Class()), string(code)), Header: nats.Header{"ce-subject": {"job1"}}, Data: []byte(`{}`)})
		must(err)
		if a.B%2 == 0 {
			_, err = w.js.Publish(ctx, w.names.DLQ(string(code.Class()), string(code)), []byte(`{}`))
			must(err)
		}
	case 9: // a worker publishes itself, or goes
		key := fleet.Key("w" + strconv.Itoa(a.A%3))
		if a.B%4 == 0 {
			must(w.h.Fleet.Delete(ctx, key))
			return
		}
		data, err := json.Marshal(fleet.Presence{WorkerID: "w" + strconv.Itoa(a.A%3), Queues: map[string]int{queue: 1}, Running: a.B})
		must(err)
		_, err = w.h.Fleet.Put(ctx, key, data)
		must(err)
	case 10: // a circuit changes, a queue is paused
		state := []string{circuit.Open, circuit.Closed}[a.A%2]
		_, err := w.h.Fleet.Put(ctx, circuit.Prefix+"app"+strconv.Itoa(a.B%2), fmt.Appendf(nil, `{"app_id":"app%d","state":%q,"code":"creditsExhausted"}`, a.B%2, state))
		must(err)
		if a.B%3 == 0 {
			_, err = w.js.PauseConsumer(ctx, w.names.JobsStream(), "vip", time.Now().Add(time.Duration(a.A)*time.Hour))
			must(err)
		}
	case 11: // a session limit's key, a lease
		worker := "w" + strconv.Itoa(a.A%2)
		if a.B%3 == 0 {
			must(w.h.State.Delete(ctx, "lease."+worker))
			return
		}
		_, err := w.h.State.Put(ctx, "lease."+worker, []byte(`{}`))
		must(err)
		_, err = w.h.State.Put(ctx, "limit.app_id/app"+strconv.Itoa(a.A%2)+"."+strconv.Itoa(a.B%3), fmt.Appendf(nil, `{"worker_id":%q,"job_id":"j%d"}`, worker, a.B))
		must(err)
	case 12: // a record is removed, a job that waits is deleted
		if len(w.records) > 0 && a.A%2 == 0 {
			must(w.h.State.Purge(ctx, w.records[a.B%len(w.records)]))
		}
		info, err := w.h.Jobs.Info(ctx)
		must(err)
		if a.A%3 == 0 && info.State.Msgs > 0 && info.State.LastSeq > 0 {
			// It may be gone already.
			if err := w.h.Jobs.DeleteMsg(ctx, info.State.LastSeq); err != nil && !errors.As(err, new(*jetstream.APIError)) {
				t.Fatal(err)
			}
		}
	}
}

func (w *world) record(id string, run int, queue string, meta *jetstream.MsgMetadata, state lifecycle.State, a action) lifecycle.Record {
	at := time.Now().Add(time.Duration(a.B) * time.Minute).UTC()
	r := lifecycle.Record{
		JobID: id, Run: run, StreamSeq: meta.Sequence.Stream, State: state, Queue: queue, AppID: "app" + strconv.Itoa(a.A%3), AvatarID: "x",
		Labels: map[string]string{"customer": fmt.Sprintf("c<%d>", a.B%4), "é": strconv.Itoa(a.A)}, Attempt: a.A % 5, WorkerID: "w1",
		PublishedAt: meta.Timestamp.UTC(), StartedAt: meta.Timestamp.Add(-time.Duration(a.B) * time.Hour).UTC(), SessionTime: time.Duration(a.A) * time.Minute,
	}
	switch state {
	case lifecycle.StateRetrying, lifecycle.StateHeld:
		r.NextAttemptAt, r.LastError, r.HeldCode = &at, &event.Error{Code: errors.CodeServerError}, errors.CodeCreditsExhausted
	case lifecycle.StateDeadLettered:
		r.LastError = &event.Error{Code: errors.CodeAvatarNotFound}
	}
	if state.Final() {
		r.Outcome = state
	}
	return r
}

// queries ask for everything that a list can be asked for.
func queries() []status.Query {
	list := []status.Query{{}, {Limit: 3}, {Order: status.ByRunning, Limit: 4}, {Order: status.ByCost}, {DefaultApp: "app1", Filter: status.Filter{Apps: []string{"app1"}}}}
	for _, state := range status.States() {
		list = append(list, status.Query{Filter: status.Filter{States: []lifecycle.State{state}}, Limit: 5})
	}
	return append(list,
		status.Query{Filter: status.Filter{States: []lifecycle.State{status.StateWaiting, lifecycle.StateHeld}, Queues: []string{"vip", "unserved"}}},
		status.Query{Filter: status.Filter{Labels: map[string]string{"customer": "c<1>"}}},
		status.Query{Filter: status.Filter{Labels: map[string]string{"customer": "c<1>", "é": "3"}}},
		status.Query{Filter: status.Filter{Codes: []errors.Code{errors.CodeCreditsExhausted, errors.CodeAvatarNotFound}, Avatars: []string{"x"}}},
		status.Query{Filter: status.Filter{Before: time.Now()}},
		status.Query{Filter: status.Filter{After: time.Now().Add(-time.Second), Before: time.Now().Add(-time.Millisecond)}},
	)
}

type reader interface {
	Jobs(ctx context.Context, q status.Query) (status.List, error)
	Fleet(ctx context.Context) (*status.Fleet, error)
	Workers(ctx context.Context) ([]status.Worker, error)
	Failures(ctx context.Context) (status.Failures, error)
	Limits(ctx context.Context) ([]status.Limit, error)
}

// answers are what a reader says, but for what only the time changes.
func answers(t *testing.T, r reader, qs []status.Query) (texts []string) {
	t.Helper()
	say := func(what string, v any, err error) {
		t.Helper()
		data, jsonErr := json.Marshal(v)
		if err := errors.Join(err, jsonErr); err != nil {
			t.Fatalf("%T: %s: %v", r, what, err)
		}
		texts = append(texts, what+" "+string(data))
	}
	for _, q := range qs {
		list, err := r.Jobs(t.Context(), q)
		for i := range list.Rows {
			list.Rows[i].AgeMS, list.Rows[i].RunningMS, list.Rows[i].SessionMS = 0, 0, 0
		}
		list.Waiting.Looked, list.Waiting.Of = 0, 0 // a Store stops once it has found enough
		say(fmt.Sprintf("%+v", q), list, err)
	}
	f, err := r.Fleet(t.Context())
	if f != nil {
		f.At, f.Storage = time.Time{}, nil
	}
	say("fleet", f, err)
	workers, err := r.Workers(t.Context())
	say("workers", workers, err)
	failures, err := r.Failures(t.Context())
	say("failures", failures, err)
	limits, err := r.Limits(t.Context())
	say("limits", limits, err)
	return texts
}

// sameAnswers compares what a model and a store say. The server counts a queue's jobs a
// moment after it has acknowledged them, so they agree soon, not at once.
func sameAnswers(t *testing.T, js jetstream.JetStream, names topology.Names, m *status.Model, after any) {
	t.Helper()
	qs := queries()
	for deadline := time.Now().Add(natstest.Patience); ; {
		refresh(t, m)
		want, got := answers(t, status.NewStore(js, names, nil, time.Minute), qs), answers(t, m, qs)
		differs := slices.IndexFunc(want, func(text string) bool { return !slices.Contains(got, text) })
		switch {
		case differs < 0:
			return
		case time.Now().After(deadline):
			t.Fatalf("after %+v\nthe model says %s\nthe store says %s", after, got[differs], want[differs])
		}
	}
}

func newWorld(t *testing.T, js jetstream.JetStream, names topology.Names) *world {
	t.Helper()
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default", "vip"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, js: js, names: names, h: h}
}

func TestModelAnswersAsTheStoreDoes(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	actions := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) action {
		n := rapid.IntRange(0, 1000)
		return action{n.Draw(t, "kind"), n.Draw(t, "a"), n.Draw(t, "b")}
	}), 40, 60)
	runs := 2
	if os.Getenv("AVATAR_LONG") != "" {
		runs = 100
	}
	for run := range runs {
		names := topology.Names{Prefix: "run" + strconv.Itoa(run)}
		w := newWorld(t, js, names)
		m := follow(t, js, names, time.Hour)
		var done []action
		for i, a := range actions.Example(run) {
			w.do(a)
			done = append(done, a)
			// A message removed from the middle of a queue is missed after some polls.
			if a.Kind%13 == 12 {
				refresh(t, m)
				refresh(t, m)
			}
			if i%6 == 5 {
				sameAnswers(t, js, names, m, done)
			}
		}
	}
}

func TestModelReadsAgainWhatWasMadeAgain(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	for i := range 5 {
		put(t, h, lifecycle.Record{JobID: fmt.Sprint("old", i), Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateCompleted, PublishedAt: ago(time.Hour)})
	}
	submit(t, js, "default", "waits", `{}`, nil)
	m := follow(t, js, names, time.Hour)
	sameAnswers(t, js, names, m, "the start")
	for _, stream := range []string{"KV_" + names.StateBucket(), names.JobsStream(), "KV_" + names.FleetBucket(), names.EventsStream()} {
		if err := js.DeleteStream(t.Context(), stream); err != nil {
			t.Fatal(err)
		}
		if stream == names.JobsStream() { // it says so, and goes on
			if err := m.Refresh(t.Context()); err == nil || m.Freshness().Error == "" {
				t.Errorf("%v, %+v without the jobs stream", err, m.Freshness())
			}
		}
		settings := topology.DefaultSettings()
		settings.Queues = []string{"default"}
		var err error
		if h, _, err = topology.Ensure(t.Context(), js, names, settings); err != nil {
			t.Fatal(err)
		}
		put(t, h, lifecycle.Record{JobID: "new", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateCompleted, PublishedAt: ago(time.Hour)})
		sameAnswers(t, js, names, m, stream+" was made again")
	}
	if err := h.Jobs.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	state, err := js.Stream(t.Context(), "KV_"+names.StateBucket())
	if err != nil {
		t.Fatal(err)
	}
	if err := state.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	sameAnswers(t, js, names, m, "all was purged")
}

func TestModelGoesOnWhereItWasOnceNATSIsBack(t *testing.T) {
	t.Parallel()
	o := natsserver.Options{Port: natstest.Port(t), StoreDir: t.TempDir()}
	server := natstest.StartWith(t, o)
	nc := natstest.ConnectURL(t, server.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, js, names)
	put(t, w.h, lifecycle.Record{JobID: "before", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateCompleted})
	m := follow(t, js, names, 20*time.Millisecond)
	refresh(t, m)
	before := m.Freshness()
	if err := server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	within(t, m, "the outage", func(f status.Freshness) bool { return f.Error != "" })
	if list, err := m.Jobs(t.Context(), status.Query{}); err != nil || len(list.Rows) != 1 {
		t.Errorf("%d jobs, %v while NATS is away", len(list.Rows), err)
	}
	natstest.StartWith(t, o)
	within(t, m, "the return", func(f status.Freshness) bool { return f.Error == "" && f.At.After(before.At) })
	put(t, w.h, lifecycle.Record{JobID: "after", Run: 1, StreamSeq: 2, Queue: "default", State: lifecycle.StateCompleted})
	sameAnswers(t, js, names, m, "NATS was away")
}

// within waits for a state of a model's freshness, as a page does.
func within(t *testing.T, m *status.Model, what string, is func(status.Freshness) bool) {
	t.Helper()
	deadline := time.After(natstest.Patience)
	for {
		f := m.Freshness()
		if is(f) {
			return
		}
		select {
		case <-m.Changed(f.Version):
		case <-deadline:
			t.Fatalf("%s is not noticed: %+v", what, f)
		}
	}
}

func TestModelSignalsEachChangeOnce(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	m := follow(t, js, names, 10*time.Millisecond)
	refresh(t, m)
	refresh(t, m)
	quiet := m.Freshness()
	refresh(t, m)
	if f := m.Freshness(); f.Version != quiet.Version || !f.Loaded {
		t.Errorf("from version %d to %d, and nothing changed", quiet.Version, f.Version)
	}
	put(t, h, lifecycle.Record{JobID: "j", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateRunning})
	select {
	case <-m.Changed(quiet.Version):
	case <-time.After(natstest.Patience):
		t.Fatal("the change is not signalled")
	}
	if list, err := m.Jobs(t.Context(), status.Query{}); err != nil || len(list.Rows) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	counts, err := m.Counts(t.Context())
	if err != nil || counts["default"][lifecycle.StateRunning] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
}

func TestModelThatIsNotLoadedSaysWhy(t *testing.T) {
	js := natstest.JetStream(t)
	m := follow(t, js, names, time.Hour)
	if _, err := m.Fleet(t.Context()); err == nil {
		t.Error("there is no stream, and no error")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	idle := status.NewModel(status.NewStore(js, names, nil, 0), 0)
	if _, err := idle.Jobs(ended, status.Query{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
