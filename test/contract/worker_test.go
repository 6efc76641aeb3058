package contract

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

func TestWhatAWorkerReallyPublishesIsAsTheSchemasSay(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	server := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, server))
	if err != nil {
		t.Fatal(err)
	}
	startWorker(ctx, t, server.ClientURL())
	names := topology.Names{}
	speech := map[string]any{"inline": base64.StdEncoding.EncodeToString(clip.WAV)}
	type sample struct {
		id   string
		job  map[string]any
		want string // the event that its end is awaited by
	}
	run := func(samples ...sample) {
		t.Helper()
		for _, c := range samples {
			c.job["id"] = c.id
			data, err := json.Marshal(c.job)
			if err != nil {
				t.Fatal(err)
			}
			if (validator(t).Job(data) == nil) == (c.id == "broken") {
				t.Errorf("job %s: the schema and the test disagree", c.id)
			}
			// A message that is not a valid job goes by its message id.
			if _, err := js.Publish(ctx, names.Jobs("default"), data, jetstream.WithMsgID(c.id)); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range samples {
			waitFor(ctx, t, js, names.Events(c.want, c.id))
		}
	}
	run(
		sample{"good", map[string]any{"avatar_id": "ok", "audio": speech, "labels": map[string]any{"a": "b"}}, "completed"},
		sample{"record", map[string]any{"avatar_id": "ok", "audio": speech, "output": map[string]any{"object": map[string]any{}}}, "completed"},
		sample{"flaky", map[string]any{"avatar_id": "flaky-serverError-1", "utterances": []any{speech, speech}}, "completed"},
		sample{"nobody", map[string]any{"avatar_id": "fail-avatarNotFound", "audio": speech}, "dead_lettered"},
		sample{"late", map[string]any{"avatar_id": "ok", "audio": speech, "deadline": "2020-01-01T00:00:00Z"}, "expired"},
		sample{"broken", map[string]any{"avatar_id": "ok"}, "dead_lettered"},
	)
	if _, err := js.Publish(ctx, names.Jobs("default"), []byte(`{"id":"good","avatar_id":"ok","audio":{"object":"a"}}`)); err != nil {
		t.Fatal(err)
	}
	waitFor(ctx, t, js, names.Events(event.TypeDuplicate, "good"))
	// Last: an open circuit holds the other jobs of its app.
	run(
		sample{"unpaid", map[string]any{"avatar_id": "fail-creditsExhausted", "audio": speech}, "held"},
		sample{"unpaid2", map[string]any{"avatar_id": "fail-creditsExhausted", "audio": speech, "app_id": "other"}, "held"},
	)

	v := validator(t)
	for _, name := range []string{names.EventsStream(), names.DLQStream(), names.FramesStream(), names.UsageStream()} {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		messages := stored(ctx, t, stream)
		if len(messages) == 0 {
			t.Errorf("%s is empty", name)
		}
		if err := v.CheckAll(messages); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// startWorker runs a worker against a simulated backend until the test ends.
func startWorker(ctx context.Context, t *testing.T, url string, changes ...func(*config.Config)) {
	t.Helper()
	backend := simulator.New(simulator.Options{Addr: "127.0.0.1:0"})
	if err := backend.Start(ctx); err != nil {
		t.Fatal(err)
	}
	c := config.Defaults()
	c.NATS.URL = url
	c.App.ID, c.App.APIKey = "app", "key-for-tests"
	c.Apps = map[string]*config.App{"other": {ID: "other", APIKey: "key-for-tests"}}
	c.Backend.ConsoleURL, c.Backend.IngressURL = backend.ConsoleURL(), backend.IngressURL()
	c.Retry.Initial, c.Retry.Max = 20*time.Millisecond, 50*time.Millisecond
	c.Worker.DrainTimeout = 0
	c.Alerts.Threshold = 1
	c.Admin.Addr = ""
	for _, change := range changes {
		change(c)
	}
	ready := make(chan struct{})
	a, err := app.New(app.Options{Config: c, Logger: zerolog.Nop(), OnReady: func() { close(ready) }})
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- a.Run(run) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("worker: %v", err)
		}
		backend.Stop()
	})
	select {
	case <-ready:
	case <-ctx.Done():
		t.Fatal("the worker is not ready")
	}
}

// waitFor waits until the events stream has a message on the subject.
func waitFor(ctx context.Context, t *testing.T, js jetstream.JetStream, subject string) {
	t.Helper()
	consumer, err := js.OrderedConsumer(ctx, topology.Names{}.EventsStream(), jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		t.Fatal(err)
	}
	for {
		if msg, err := consumer.Next(jetstream.FetchMaxWait(5 * time.Second)); err == nil && msg != nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("nothing on %s", subject)
		}
	}
}
