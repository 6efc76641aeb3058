package permissions_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/simulator"
)

func TestWorkerNeedsJustItsPermissions(t *testing.T) {
	t.Parallel()
	t.Run("all", func(t *testing.T) { t.Parallel(); withAll(t, "worker", worker) })
	for _, p := range lines(t, "worker") {
		t.Run("without "+p.kind+" "+p.subject, func(t *testing.T) { t.Parallel(); withOneLess(t, "worker", p, worker) })
	}
}

// worker starts one where nothing is there yet, and another where jobs of every
// kind wait already.
func worker(ctx context.Context, t *testing.T, url string, refused *refusals) error {
	backend := simulator.New(simulator.Options{Addr: "127.0.0.1:0"})
	if err := backend.Start(ctx); err != nil {
		return err
	}
	defer backend.Stop()
	run := func(ctx context.Context, work func(ctx context.Context) error) error {
		return runWorker(ctx, url, backend, refused, work)
	}
	admin := connect(t, url, "admin", nil)
	return firstOf(ctx,
		func(ctx context.Context) error {
			return must(run(ctx, func(context.Context) error { return nil }), "first start")
		},
		func(ctx context.Context) error { return publishAll(ctx, admin) },
		func(ctx context.Context) error {
			return must(run(ctx, func(ctx context.Context) error { return watchAll(ctx, admin) }), "run the jobs")
		},
	)
}

// runWorker runs a worker, in a process of its own, until work is done. Without
// a permission that it needs a worker tries for long what it is not allowed;
// a process can be ended.
func runWorker(ctx context.Context, url string, backend *simulator.Server, refused *refusals, work func(ctx context.Context) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	log := &learner{refused: refused, ready: make(chan struct{})}
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), envURL+"="+url, envConsole+"="+backend.ConsoleURL(), envIngress+"="+backend.IngressURL())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	select {
	case <-log.ready:
		err = work(ctx)
	case err := <-ended:
		return fmt.Errorf("the worker ended: %w", firstError(err, context.Cause(ctx)))
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil {
		err = cmd.Process.Signal(syscall.SIGTERM)
	} else {
		stop()
	}
	return firstError(err, <-ended)
}

func firstError(first, second error) error {
	if first != nil {
		return first
	}
	return second
}

// Environment of a worker's process.
const (
	envURL     = "PERMISSIONS_TEST_NATS_URL"
	envConsole = "PERMISSIONS_TEST_CONSOLE_URL"
	envIngress = "PERMISSIONS_TEST_INGRESS_URL"
	readyText  = "ready for jobs"
)

// beWorker is the whole life of a worker's process.
func beWorker(url string) error {
	c := config.Defaults()
	c.NATS.URL, c.NATS.User, c.NATS.Password, c.NATS.InboxPrefix = url, "worker", password, "_INBOX_worker"
	c.App.ID, c.App.APIKey, c.App.MaxSessions = "app", "key-for-tests", 8
	c.Backend.ConsoleURL, c.Backend.IngressURL = os.Getenv(envConsole), os.Getenv(envIngress)
	c.Retry.Initial, c.Retry.Max = 50*time.Millisecond, 100*time.Millisecond
	c.Lease.AckWait = 2 * time.Second
	c.Alerts.Threshold = 1
	c.Budgets = []config.Budget{{Key: "app_id", Credits: 1000, Per: "day", Warn: 0.8}}
	c.Admin.Addr = ""
	c.Worker.Concurrency, c.Worker.DrainTimeout = 16, 0
	log := zerolog.New(os.Stdout)
	a, err := app.New(app.Options{
		Config: c, Logger: log, Version: "1.2.3", OnReady: func() { log.Info().Msg(readyText) },
	})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return a.Run(ctx)
}

// learner reads refusals out of the worker's log: an operator has no more.
type learner struct {
	refused *refusals
	ready   chan struct{}
	line    []byte // the last line, as far as it came
}

func (l *learner) Write(data []byte) (int, error) {
	l.line = append(l.line, data...)
	for {
		line, rest, whole := bytes.Cut(l.line, []byte("\n"))
		if !whole {
			return len(data), nil
		}
		l.line = rest
		if bytes.Contains(line, []byte(readyText)) {
			close(l.ready)
		}
		l.refused.learn(strings.ReplaceAll(string(line), `\"`, `"`))
	}
}

// waitingJobs are jobs that between them need everything. Their outcomes are
// waited for.
func waitingJobs() map[string]map[string]any {
	speech := map[string]any{"inline": base64.StdEncoding.EncodeToString(clip.WAV)}
	live := map[string]any{"sample_rate": 16000, "max_silence": "1s"}
	return map[string]map[string]any{
		"frames":  {"avatar_id": "ok", "audio": speech},
		"file":    {"avatar_id": "ok", "audio": map[string]any{"object": "hello.wav"}, "output": map[string]any{"object": map[string]any{}}},
		"flaky":   {"avatar_id": "flaky-connectionClosed-1", "utterances": []any{speech, speech}},
		"live":    {"avatar_id": "drop-1", "live": live, "max_attempts": 2},
		"failing": {"avatar_id": "fail-serverError", "audio": speech, "max_attempts": 1, "output": map[string]any{"object": map[string]any{}}},
		"lost":    {"avatar_id": "ok", "audio": speech},
		"late":    {"avatar_id": "ok", "audio": speech},
	}
}

// publishAll publishes them before the worker is there, with what they need.
func publishAll(ctx context.Context, admin client) error {
	files, err := admin.js.ObjectStore(ctx, names.AudioFilesBucket())
	if err != nil {
		return err
	}
	if _, err := files.PutBytes(ctx, "hello.wav", clip.WAV); err != nil {
		return err
	}
	kv, err := admin.js.KeyValue(ctx, names.StateBucket())
	if err != nil {
		return err
	}
	for range 2 {
		// More than a frame's worth, so that the connection drops within.
		for chunk := range slices.Chunk(bytes.Repeat(clip.WAV[44:len(clip.WAV)&^1], 4), 32<<10) {
			if _, err := admin.js.Publish(ctx, names.Audio("live"), chunk); err != nil {
				return err
			}
		}
	}
	if err := spend(ctx, admin); err != nil {
		return err
	}
	for id, job := range waitingJobs() {
		job["id"] = id
		data, err := json.Marshal(job)
		if err != nil {
			return err
		}
		ack, err := admin.js.Publish(ctx, names.Jobs("default"), data)
		if err != nil {
			return err
		}
		if id == "late" { // what its session used was not written to the ledger for long
			record, err := json.Marshal(lifecycle.Record{
				JobID: id, Run: 1, StreamSeq: ack.Sequence, State: lifecycle.StateReleased, Session: 1, Attempt: 1, MaxAttempts: 5, WorkerID: "gone",
				Queue: "default", AppID: "app", AvatarID: "ok", Reason: "drain", CreatedAt: time.Now(), UpdatedAt: time.Now(),
				Usage: []usage.Session{{Session: 1, Attempt: 1, AppID: "app", ConnectionID: "c", ConfirmedAt: time.Now().Add(-4 * time.Hour), OutcomeCode: usage.CodeReleased}},
			})
			if err != nil {
				return err
			}
			if _, err := kv.Put(ctx, id, record); err != nil {
				return err
			}
		}
		if id == "lost" { // another worker is said to run it; it is not there any more
			record, err := json.Marshal(lifecycle.Record{JobID: id, Run: 1, StreamSeq: ack.Sequence, State: lifecycle.StateRunning, Session: 1, Attempt: 1, MaxAttempts: 5, WorkerID: "gone"})
			if err != nil {
				return err
			}
			if _, err := kv.Put(ctx, id, record); err != nil {
				return err
			}
		}
	}
	return nil
}

// spend has something in the counters that budgets begin with.
func spend(ctx context.Context, admin client) error {
	l := usage.NewLedger(usage.Options{JS: admin.js, Names: names, Window: time.Hour, Now: time.Now})
	_, err := l.Store(ctx, usage.Record{JobID: "before", Run: 1, Session: 1, AppID: "app", Queue: "default", ConfirmedAt: time.Now(), Credits: 1})
	if err != nil {
		return err
	}
	counters, err := usage.OpenCounters(ctx, admin.js, names, nil)
	if err != nil {
		return err
	}
	return counters.CatchUp(ctx, func(error) {})
}

// watchAll waits for the jobs' outcomes and the alert, and asks the worker.
func watchAll(ctx context.Context, admin client) error {
	return firstOf(ctx,
		func(ctx context.Context) error { return must(interrupted(ctx, admin), "interrupt") },
		func(ctx context.Context) error { return must(answered(ctx, admin), "ask the worker") },
		func(ctx context.Context) error {
			var wg sync.WaitGroup
			errs := make(chan error, len(waitingJobs())+1)
			for id := range waitingJobs() {
				wg.Go(func() { errs <- outcome(ctx, admin, id) })
			}
			wg.Go(func() { errs <- firstMessage(ctx, admin, names.Alerts("recurring", "serverError")) })
			wg.Wait()
			close(errs)
			for err := range errs {
				if err != nil {
					return err
				}
			}
			return nil
		},
	)
}

// interrupted interrupts a live job in the middle of its speech.
func interrupted(ctx context.Context, admin client) error {
	const id = "talk"
	sub, err := admin.nc.SubscribeSync(names.Frames(id))
	if err != nil {
		return err
	}
	for range 8 {
		if _, err := admin.js.Publish(ctx, names.Audio(id), bytes.Repeat([]byte{1, 0}, 16000)); err != nil {
			return err
		}
	}
	job := fmt.Sprintf(`{"id":%q,"avatar_id":"slow-20","live":{"sample_rate":16000,"max_silence":"1s"}}`, id)
	if _, err := admin.js.Publish(ctx, names.Jobs("default"), []byte(job)); err != nil {
		return err
	}
	defer func() { _ = sub.Unsubscribe() }() // the connection is closed soon
	for {
		if _, err := sub.NextMsgWithContext(ctx); err != nil {
			return err
		}
		msg, err := admin.nc.RequestWithContext(ctx, names.Control(id), []byte(`{"op":"interrupt"}`))
		if err != nil {
			return err
		}
		var reply control.Reply
		if err := json.Unmarshal(msg.Data, &reply); err != nil {
			return err
		}
		switch reply.Status {
		case control.StatusInterrupted:
			return outcome(ctx, admin, id)
		case control.StatusNotRunning: // its worker lost its lease just then: the next session speaks on
		default:
			return fmt.Errorf("the answer is %s", msg.Data)
		}
	}
}

// answered finds the worker as `nats micro` does, and asks for its state.
func answered(ctx context.Context, admin client) error {
	msg, err := admin.nc.RequestWithContext(ctx, "$SRV.INFO.avatarworker", nil)
	if err != nil {
		return err
	}
	var info struct {
		Endpoints []struct {
			Subject string `json:"subject"`
		} `json:"endpoints"`
	}
	if err := json.Unmarshal(msg.Data, &info); err != nil {
		return err
	}
	if len(info.Endpoints) != 1 {
		return fmt.Errorf("endpoints: %s", msg.Data)
	}
	_, err = admin.nc.RequestWithContext(ctx, info.Endpoints[0].Subject, nil)
	return err
}

func outcome(ctx context.Context, admin client, id string) error {
	kv, err := admin.js.KeyValue(ctx, names.StateBucket())
	if err != nil {
		return err
	}
	watch, err := kv.Watch(ctx, id)
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the watch ends with its connection at the latest
	for {
		select {
		case entry := <-watch.Updates():
			var r lifecycle.Record
			if entry != nil && json.Unmarshal(entry.Value(), &r) == nil && r.State.Final() {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("job %s has no outcome: %w", id, context.Cause(ctx))
		}
	}
}

// firstMessage waits for a message in the events stream.
func firstMessage(ctx context.Context, admin client, subject string) error {
	consumer, err := admin.js.OrderedConsumer(ctx, names.EventsStream(), jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		msg, err := consumer.Next(jetstream.FetchMaxWait(time.Second))
		if err == nil && msg != nil {
			return nil
		}
	}
	return fmt.Errorf("nothing on %s: %w", subject, context.Cause(ctx))
}
