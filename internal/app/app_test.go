package app_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"avatarworker/internal/app"
	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/jobs"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fleet is a queue, a backend and the workers between them.
type fleet struct {
	t       *testing.T
	server  *natsserver.Server
	backend *simulator.Server
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, server: natstest.Start(t), names: topology.Names{Prefix: "avatar"}}
	f.backend = simulator.New(simulator.Options{Addr: "127.0.0.1:0"})
	if err := f.backend.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.backend.Stop)
	f.nc = natstest.Connect(t, f.server)
	js, err := jetstream.New(f.nc)
	if err != nil {
		t.Fatal(err)
	}
	f.js = js
	return f
}

// config is a worker's, made for tests: short waits, small streams.
func (f *fleet) config(change func(*config.Config)) *config.Config {
	c := config.Defaults()
	c.NATS.URL = f.server.ClientURL()
	c.App.ID, c.App.APIKey = "app", "key-for-tests"
	c.Backend.ConsoleURL, c.Backend.IngressURL = f.backend.ConsoleURL(), f.backend.IngressURL()
	c.Backend.StallTimeout, c.Backend.HandshakeTimeout = 2*time.Second, 2*time.Second
	c.Retry.Initial, c.Retry.Max = 50*time.Millisecond, 200*time.Millisecond
	c.Lease.AckWait = 3 * time.Second
	c.Audio.EgressMargin = 200 * time.Millisecond
	c.Admin.Addr = ""
	if change != nil {
		change(c)
	}
	return c
}

// worker starts a worker and returns when it takes jobs; stop drains it.
func (f *fleet) worker(change func(*config.Config)) (stop func()) {
	f.t.Helper()
	ready := make(chan struct{})
	a, err := app.New(app.Options{
		Config: f.config(change), Logger: zerolog.New(zerolog.NewTestWriter(f.t)), Version: "1.2.3",
		OnReady: func() { close(ready) },
	})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			f.t.Errorf("worker: %v", err)
		}
		ended <- nil
	}
	f.t.Cleanup(stop)
	select {
	case <-ready:
	case err := <-ended:
		f.t.Fatalf("the worker ended: %v", err)
	case <-time.After(20 * time.Second):
		f.t.Fatal("the worker did not become ready")
	}
	return stop
}

// publish publishes a job made of the clip and of extra fields.
func (f *fleet) publish(id, avatar string, extra map[string]any) {
	f.t.Helper()
	job := map[string]any{"id": id, "avatar_id": avatar}
	if extra["utterances"] == nil && extra["live"] == nil && extra["audio"] == nil {
		job["audio"] = map[string]any{"inline": base64.StdEncoding.EncodeToString(clip.WAV)}
	}
	for k, v := range extra {
		job[k] = v
	}
	data, err := json.Marshal(job)
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.js.Publish(f.t.Context(), f.names.Jobs("default"), data); err != nil {
		f.t.Fatal(err)
	}
}

// outcome waits for a job's outcome and returns its record.
func (f *fleet) outcome(id string) jobs.Record {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	kv, err := f.js.KeyValue(ctx, f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	watch, err := kv.Watch(ctx, id)
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() {
		if err := watch.Stop(); err != nil {
			f.t.Log(err)
		}
	}()
	var r jobs.Record
	for {
		select {
		case entry := <-watch.Updates():
			if entry == nil {
				continue
			}
			r = jobs.Record{}
			if err := json.Unmarshal(entry.Value(), &r); err != nil {
				f.t.Fatal(err)
			}
			if r.State.Final() {
				return r
			}
		case <-ctx.Done():
			f.t.Fatalf("job %s has no outcome; its record: %+v", id, r)
		}
	}
}

func TestJobsEndAsTheirAvatarsSay(t *testing.T) {
	f := newFleet(t)
	f.worker(nil)
	for _, c := range []struct {
		avatar string
		extra  map[string]any
		want   jobs.State
		code   string
	}{
		{"ok", nil, jobs.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"discard": map[string]any{}}}, jobs.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"object": map[string]any{"name": "rec"}}}, jobs.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"livekit": map[string]any{"url": "wss://example.com", "room_name": "r", "publisher_id": "p", "api_token": "good-token"}}}, jobs.StateCompleted, ""},
		{"flaky-connectionClosed-2", nil, jobs.StateCompleted, ""},
		{"fail-avatarNotFound", nil, jobs.StateDeadLettered, "avatarNotFound"},
		{"ok", map[string]any{"deadline": "2020-01-01T00:00:00Z"}, jobs.StateExpired, ""},
		{"ok", map[string]any{"audio": map[string]any{"inline": "AAAA", "sample_rate": 16000}}, jobs.StateDeadLettered, "invalidJob"},
	} {
		t.Run(fmt.Sprintf("%s_%s", c.avatar, c.want), func(t *testing.T) {
			id := fmt.Sprintf("job%d", time.Now().UnixNano())
			f.publish(id, c.avatar, c.extra)
			r := f.outcome(id)
			if r.State != c.want {
				t.Errorf("state %s, want %s: %+v", r.State, c.want, r.LastError)
			}
			if c.code != "" && (r.LastError == nil || string(r.LastError.Code) != c.code) {
				t.Errorf("last error %+v, want %s", r.LastError, c.code)
			}
		})
	}
}
