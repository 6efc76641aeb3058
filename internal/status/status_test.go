package status_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var names = topology.Names{}

func setup(t *testing.T) (jetstream.JetStream, topology.Handles) {
	t.Helper()
	js := natstest.JetStream(t)
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	return js, h
}

func put(t *testing.T, h topology.Handles, r lifecycle.Record) {
	t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.State.Put(t.Context(), r.JobID, data); err != nil {
		t.Fatal(err)
	}
}

// deliver publishes n jobs and takes them, as a worker does.
func deliver(t *testing.T, js jetstream.JetStream, h topology.Handles, n int) {
	t.Helper()
	for i := range n {
		if _, err := js.Publish(t.Context(), names.Jobs("default"), fmt.Appendf(nil, "%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	messages, err := h.Consumers["default"].Fetch(n)
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for range messages.Messages() {
		taken++
	}
	if err := messages.Error(); err != nil || taken != n {
		t.Fatalf("%d of %d taken: %v", taken, n, err)
	}
}

func TestStatesAreCountedAmongManyRecordsOfJobsThatEnded(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	put(t, h, lifecycle.Record{JobID: "early", StreamSeq: 1, Queue: "default", State: lifecycle.StateHeld})
	for i := range 3000 {
		put(t, h, lifecycle.Record{JobID: fmt.Sprint("done", i), StreamSeq: 2, Queue: "default", State: lifecycle.StateCompleted})
	}
	put(t, h, lifecycle.Record{JobID: "r1", StreamSeq: 3, Queue: "default", State: lifecycle.StateRunning})
	put(t, h, lifecycle.Record{JobID: "r2", StreamSeq: 4, Queue: "default", State: lifecycle.StateRetrying})
	put(t, h, lifecycle.Record{JobID: "cancelled-before-it-came", Queue: "default", State: lifecycle.StateReleased})
	deliver(t, js, h, 3)
	f, err := status.NewStore(js, names, nil, time.Minute).Fleet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	q := f.Queues[0]
	if !f.CountedAll || q.Taken != 3 || q.Waiting != 0 || q.Running != 1 || q.Retrying != 1 || q.Held != 1 || q.Released != 0 {
		t.Errorf("all %t, got %+v", f.CountedAll, q)
	}
}

func TestCountingThatTakesTooLongSaysSo(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	put(t, h, lifecycle.Record{JobID: "r1", StreamSeq: 1, Queue: "default", State: lifecycle.StateRunning})
	deliver(t, js, h, 1)
	f, err := status.NewStore(js, names, nil, time.Nanosecond).Fleet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f.CountedAll || f.Queues[0].Taken != 1 {
		t.Errorf("all %t, got %+v", f.CountedAll, f.Queues)
	}
}

func TestDrainingWorkersServeNothing(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	for id, p := range map[string]fleet.Presence{
		"up":       {},
		"draining": {Draining: true},
	} {
		p.WorkerID, p.Queues = id, map[string]int{"default": 1}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Fleet.Put(t.Context(), "worker."+id, data); err != nil {
			t.Fatal(err)
		}
	}
	f, err := status.NewStore(js, names, nil, 0).Fleet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Workers) != 2 || f.Queues[0].Served != 1 || len(f.Warnings) != 0 {
		t.Errorf("workers %+v, queues %+v, warnings %q", f.Workers, f.Queues, f.Warnings)
	}
}

func TestUnknownJobIsAnErrorOfItsOwn(t *testing.T) {
	t.Parallel()
	js, _ := setup(t)
	if _, err := status.NewStore(js, names, nil, 0).Job(t.Context(), "absent"); !errors.Is(err, status.ErrNoJob) {
		t.Errorf("got %v", err)
	}
}

func TestMessageOfAnotherClientIsStillAnEvent(t *testing.T) {
	t.Parallel()
	at := time.Unix(1, 0)
	e := status.NewEvent("avatar.events.x.y", nil, []byte("no JSON"), 1, at)
	if string(e.Data) != `"no JSON"` || !e.Time.Equal(at) {
		t.Errorf("got %+v", e)
	}
}

func TestOneFaultOfManyCircuitsIsOneWarning(t *testing.T) {
	t.Parallel()
	js, h := setup(t)
	for key, c := range map[string]circuit.Circuit{
		"circuit.a.us-west":      {App: "a", Region: "us-west", State: "open", Code: errors.CodeCreditsExhausted},
		"circuit.a.ap-northeast": {App: "a", Region: "ap-northeast", State: "open", Code: errors.CodeCreditsExhausted},
		"circuit.b.us-west":      {App: "b", Region: "us-west", State: "open", Code: errors.CodeConnectionFailed},
		"circuit.c._":            {App: "c", State: "open", Code: errors.CodeConnectionFailed}, // of all its regions
	} {
		data, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Fleet.Put(t.Context(), key, data); err != nil {
			t.Fatal(err)
		}
	}
	f, err := status.NewStore(js, names, nil, 0).Fleet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Circuits) != 4 || len(f.Warnings) != 2 {
		t.Fatalf("circuits %+v, warnings %q", f.Circuits, f.Warnings)
	}
	said := strings.Join(f.Warnings, "\n")
	for _, app := range []string{"app a in us-west", "app a in ap-northeast", "app b in us-west, app c:"} {
		if strings.Count(said, app) != 1 {
			t.Errorf("%q is not said once in:\n%s", app, said)
		}
	}
}
