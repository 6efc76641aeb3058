package ui_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
	"avatarworker/internal/ui"
)

var names = topology.Names{}

// stored is a fleet's streams without workers, and a Store that follows them.
func stored(t *testing.T) (*ui.Store, jetstream.JetStream, topology.Handles) {
	t.Helper()
	js := natstest.JetStream(t)
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default"}
	h, _, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	s := ui.NewStore(ui.StoreOptions{
		NC: js.Conn(), JS: js, Names: names, DefaultApp: "shop", Log: zerolog.Nop(),
		Limits: map[string]int{"app_id shop": 3, "label.room": 1, "app_id idle": 2},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return s, js, h
}

// A model goes on with what it knew; on a page that would look as if all were well.
func TestWithoutNATSTheStoreSaysSo(t *testing.T) {
	server := natstest.Start(t)
	js, err := jetstream.New(natstest.ConnectURL(t, server.ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	model := status.NewModel(status.NewStore(js, names, nil, 0), time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); model.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	if err := model.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := ui.NewStore(ui.StoreOptions{NC: js.Conn(), JS: js, Names: names, Log: zerolog.Nop(), Statuses: model})
	ask := func() error {
		_, err := s.Fleet(t.Context())
		_, err2 := s.Jobs(t.Context(), status.Query{})
		if (err == nil) != (err2 == nil) {
			t.Errorf("the fleet: %v, the jobs: %v", err, err2)
		}
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	lost := js.Conn().StatusChanged(nats.RECONNECTING, nats.CLOSED)
	if err := server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	<-lost
	if err := ask(); err == nil || !strings.Contains(err.Error(), "NATS can't be reached") {
		t.Errorf("without NATS: %v", err)
	}
}

func TestTheStoreReadsAndChangesWhatNATSKeeps(t *testing.T) {
	s, js, h := stored(t)
	ctx := t.Context()
	publish := func(id, body string) {
		t.Helper()
		msg := nats.NewMsg(names.Jobs("default"))
		msg.Header.Set("Nats-Msg-Id", id)
		msg.Data = []byte(body)
		if _, err := js.PublishMsg(ctx, msg); err != nil {
			t.Fatal(err)
		}
	}
	publish("w1", `{"avatar_id":"a","audio":{"url":"https://h/x"}}`)
	for key, value := range map[string]any{
		"done":                   lifecycle.Record{JobID: "done", Run: 1, StreamSeq: 90, State: lifecycle.StateCompleted, Queue: "default", AppID: "shop", PublishedAt: time.Now(), SessionTime: 7 * time.Second},
		"limit.app_id/shop.1":    map[string]string{"worker_id": "host-1", "job_id": "j"},
		"limit.app_id/shop.2":    map[string]string{"worker_id": "", "job_id": ""},
		"limit.label/room/=2E.1": map[string]string{"worker_id": "host-1", "job_id": "j"},
	} {
		data, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.State.Put(ctx, key, data); err != nil {
			t.Fatal(err)
		}
	}
	f, err := s.Fleet(ctx)
	if err != nil || len(f.Queues) != 1 || f.Queues[0].Waiting != 1 {
		t.Errorf("fleet %+v, %v", f, err)
	}
	limits, err := s.Limits(ctx)
	if got := fmt.Sprint(limits); err != nil || got != "[{app_id idle 0 2} {app_id shop 1 3} {label.room . 1 1}]" {
		t.Errorf("limits %s, %v", got, err)
	}
	if sum, err := s.Spend(ctx); err != nil || sum.Credits != 2 || sum.Connected != 7*time.Second || sum.AtLeast {
		t.Errorf("spend %+v, %v", sum, err)
	}
	list, err := s.Jobs(ctx, status.Query{Limit: 10})
	if err != nil || len(list.Rows) != 2 {
		t.Errorf("jobs %+v, %v", list, err)
	}
	if j, err := s.Job(ctx, "w1"); err != nil || j.Waiting == nil {
		t.Errorf("job %+v, %v", j, err)
	}
	if _, err := s.Job(ctx, "none"); !errors.Is(err, status.ErrNoJob) {
		t.Errorf("an unknown job: %v", err)
	}
	for id, want := range map[string]string{"w1": "requested", "done": "finished", "none": "unknown"} {
		if d, err := s.Cancel(ctx, id); err != nil || d.Status != want || d.OK != (want == "requested") {
			t.Errorf("cancel %s: %+v, %v", id, d, err)
		}
	}
	if _, err := s.Pause(ctx, "default", time.Hour); err != nil {
		t.Fatal(err)
	}
	if f, err := s.Fleet(ctx); err != nil || f.Queues[0].PausedUntil.IsZero() {
		t.Errorf("a paused queue: %+v, %v", f.Queues, err)
	}
	if was, err := s.Resume(ctx, "default"); err != nil || !was {
		t.Errorf("resume: %t, %v", was, err)
	}
	if _, err := s.Pause(ctx, "none", time.Hour); err == nil {
		t.Error("a queue that is not there was paused")
	}
	if err := s.CloseCircuit(ctx, "shop", ""); err == nil {
		t.Error("a circuit that is not open was closed")
	}
	if _, _, err := s.Recordings(ctx, 10); err != nil {
		t.Errorf("recordings: %v", err)
	}
}

func TestTheStoreListsLettersAndReplaysThem(t *testing.T) {
	s, js, _ := stored(t)
	writer := dlq.NewWriter(js, names)
	for i := range 3 {
		id := fmt.Sprintf("d%d", i)
		if err := writer.Write(t.Context(), lifecycle.DeadLetter{
			Job: jobspec.Identity{ID: id, Run: 1, Queue: "default", Subject: "avatar.jobs.default", StreamSeq: 1}, Data: []byte(`{"avatar_id":"a","audio":{"url":"https://h/x"}}`),
			Reason: lifecycle.ReasonPermanent, Attempts: 1, FailedAt: time.Now(), Worker: "host", Error: event.Error{JobID: id, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig},
		}); err != nil {
			t.Fatal(err)
		}
	}
	list, more, err := s.Letters(t.Context(), dlq.Filter{Newest: true}, 2)
	if err != nil || !more || len(list) != 2 || list[0].JobID != "d2" {
		t.Fatalf("%+v, %t, %v", list, more, err)
	}
	settings := func(dlq.Letter) ([]byte, error) {
		return []byte(`{"avatar_id":"b","audio":{"url":"https://h/x"}}`), nil
	}
	r, err := s.Replay(t.Context(), list[0].Seq, dlq.ReplayOptions{Correct: settings})
	if err != nil || r.Status != dlq.StatusReplayed || r.Run != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := s.Remove(t.Context(), list[1].Seq); err != nil {
		t.Error(err)
	}
	if _, err := s.Letter(t.Context(), list[0].Seq); !errors.Is(err, dlq.ErrNoLetter) {
		t.Errorf("a letter that was replayed: %v", err)
	}
}

func TestFailuresAreCountedAndAlertsListedAsTheyCome(t *testing.T) {
	s, js, _ := stored(t)
	publish := func(subject string) {
		t.Helper()
		if _, err := js.Publish(t.Context(), subject, []byte(`{}`)); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		publish(names.Errors("server", "serverError"))
	}
	publish(names.Errors("config", "avatarNotFound"))
	for deadline := time.Now().Add(20 * time.Second); ; {
		changed := s.Changed()
		f := s.Failures(time.Now().Add(-time.Hour), time.Now(), 60)
		if len(f.Codes) == 2 && f.Codes[0].Total == 3 && f.Codes[0].Code == "serverError" && f.Codes[0].Counts[59]+f.Codes[0].Counts[58] == 3 && f.Complete {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", f)
		}
		select {
		case <-changed:
		case <-time.After(200 * time.Millisecond):
		}
	}
	for i := range 4 {
		publish(names.Alerts("recurring", fmt.Sprint("code", i)))
	}
	list, more, err := s.Alerts(t.Context(), 3)
	if err != nil || !more || len(list) != 3 || list[0].Subject != names.Alerts("recurring", "code3") {
		t.Errorf("%+v, %t, %v", list, more, err)
	}
}

func TestManyViewersCostOneRead(t *testing.T) {
	js := natstest.JetStream(t)
	reads := &counting{}
	s := ui.NewStore(ui.StoreOptions{NC: js.Conn(), JS: js, Names: names, Statuses: reads, Log: zerolog.Nop()})
	natstest.Together(50, func(int) {
		if _, err := s.Fleet(t.Context()); err != nil {
			t.Error(err)
		}
	})
	if n := reads.n.Load(); n != 1 {
		t.Errorf("%d reads", n)
	}
}

// counting is a read model that counts how often it is asked.
type counting struct {
	status.Store

	n atomic.Int64
}

func (c *counting) Fleet(context.Context) (*status.Fleet, error) {
	c.n.Add(1)
	return &status.Fleet{}, nil
}
