package operate_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace/noop"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/operate"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

// fleet is NATS with everything in it, and the workers of a test.
type fleet struct {
	t     *testing.T
	nc    *nats.Conn
	js    jetstream.JetStream
	names topology.Names
	h     topology.Handles
	set   topology.Settings
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	t.Parallel() // they mostly wait
	js := natstest.JetStream(t)
	f := &fleet{t: t, nc: js.Conn(), js: js, set: topology.DefaultSettings()}
	f.set.AckWait = natstest.Unhurried(2 * time.Second)
	var err error
	if f.h, _, err = topology.Ensure(t.Context(), js, f.names, f.set); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fleet) operator() *operate.Operator {
	f.t.Helper()
	o, err := operate.Open(f.t.Context(), f.nc, f.js, f.names)
	if err != nil {
		f.t.Fatal(err)
	}
	return o
}

// session runs an attempt of a job.
type session func(ctx context.Context, a *jobs.Attempt) error

func (s session) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	a.Progress.Connected(fmt.Sprintf("c-%s-%d", a.Job.ID, a.Session), "us-west")
	if err := s(ctx, a); err != nil {
		return jobs.Report{}, err
	}
	if err := a.Progress.Speaking(ctx, 1, 0); err != nil {
		return jobs.Report{}, err
	}
	a.Progress.FirstFrame()
	return jobs.Report{Connected: time.Millisecond}, a.Progress.Delivered(ctx, event.Utterance{ReqID: "r1", Frames: 1, Bytes: 1})
}

func (session) Finish(context.Context, *jobspec.Job, jobs.Finished) error { return nil }

// works is a session that succeeds.
func works(context.Context, *jobs.Attempt) error { return nil }

// failsFirst fails each job's first attempt.
func failsFirst(_ context.Context, a *jobs.Attempt) error {
	if a.Number == 1 {
		return errors.Newf(errors.CodeServerError, errors.PhaseRuntime, "scripted")
	}
	return nil
}

// start runs a worker, which drains when it is asked to, until the test ends. stop drains
// it too.
func (f *fleet) start(id string, s session) (stop func()) {
	f.t.Helper()
	table, err := errors.NewTable(nil)
	if err != nil {
		f.t.Fatal(err)
	}
	w, err := jobs.New(f.t.Context(), jobs.Options{
		Stores: jobs.Stores{
			NC: f.nc, JS: f.js, Names: f.names, Jobs: f.h.Jobs, Events: f.h.Events, State: f.h.State, Fleet: f.h.Fleet,
			Consumer: func(ctx context.Context, queue string) error {
				_, _, err := topology.EnsureConsumer(ctx, f.h.Jobs, f.names, f.set, queue)
				return err
			},
		},
		Profile: jobs.Profile{
			Name: id, ID: id, Version: "test", Queues: []fetch.Queue{{Name: "default", Weight: 1}}, Concurrency: 8, AckWait: f.set.AckWait, Drain: 10 * time.Second,
		},
		Accounts: jobs.Accounts{DefaultApp: "app", DefaultRegion: "us-west", KnownApp: func(string) bool { return true }},
		Policy: jobs.Policy{
			Retry:   lifecycle.RetryPolicy{MaxAttempts: 5, Initial: time.Hour, Max: time.Hour},
			Circuit: circuit.Config{Failures: 1000, Cooldown: time.Hour, MaxCooldown: time.Hour}, MaxHold: 24 * time.Hour,
			Alerts: alert.Config{Threshold: 1000, Window: time.Minute},
			Table:  table,
		},
		Parts: jobs.Parts{
			Runner: s, DeadLetters: dlq.NewWriter(f.js, f.names), Observer: observer{}, Tracer: noop.NewTracerProvider().Tracer(""),
			Logger: zerolog.New(io.Discard), Now: time.Now, Random: func() float64 { return .999 },
		},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.Run(ctx); err != nil {
			f.t.Errorf("worker %s: %v", id, err)
		}
	})
	sub, err := f.nc.Subscribe(f.names.AllWorkerDrains(), func(msg *nats.Msg) {
		if strings.Contains(msg.Subject, id) {
			cancel()
			data, _ := json.Marshal(operate.Draining{WorkerID: id}) // it can be encoded
			_ = msg.Respond(data)                                   // the test sees that it did not come
		}
	})
	if err != nil {
		f.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = sub.Unsubscribe() // the connection's end does it too
		cancel()
		running.Wait()
	})
	f.t.Cleanup(stop)
	return stop
}

const jobBody = `{"avatar_id":"a","audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000},"output":{"discard":{}}}`

func (f *fleet) submit(id string) {
	f.t.Helper()
	msg := &nats.Msg{Subject: f.names.Jobs("default"), Header: nats.Header{"Avatar-Job-Id": {id}}, Data: []byte(jobBody)}
	if _, err := f.js.PublishMsg(f.t.Context(), msg); err != nil {
		f.t.Fatal(err)
	}
}

// until waits until a job's record is as wanted.
func (f *fleet) until(id string, is func(lifecycle.Record) bool) lifecycle.Record {
	f.t.Helper()
	return natstest.Value(f.t, f.h.State, id, is)
}

func (f *fleet) state(id string, want lifecycle.State) lifecycle.Record {
	f.t.Helper()
	return f.until(id, func(r lifecycle.Record) bool { return r.State == want })
}

func (f *fleet) outcome(id string) lifecycle.Record {
	f.t.Helper()
	return f.until(id, func(r lifecycle.Record) bool { return r.State.Final() })
}

func (f *fleet) put(r lifecycle.Record) {
	f.t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.h.State.Put(f.t.Context(), r.JobID, data); err != nil {
		f.t.Fatal(err)
	}
}

// oneOutcomeEach waits until nothing is in the jobs stream, and checks that each job was
// told of one outcome.
func (f *fleet) oneOutcomeEach(ids []string) {
	f.t.Helper()
	outcomes := make(map[string][]string)
	consumer, err := f.h.Events.OrderedConsumer(f.t.Context(), jetstream.OrderedConsumerConfig{FilterSubjects: []string{f.names.AllEvents()}})
	if err != nil {
		f.t.Fatal(err)
	}
	for done := 0; done < len(ids); {
		msg, err := consumer.Next(jetstream.FetchMaxWait(30 * time.Second))
		if err != nil {
			f.t.Fatalf("%d of %d outcomes were published: %v: %v", done, len(ids), outcomes, err)
		}
		id := msg.Headers().Get("ce-subject")
		switch kind := strings.TrimPrefix(msg.Headers().Get("ce-type"), "avatar.job."); kind {
		case "completed", "cancelled", "dead_lettered", "expired":
			if len(outcomes[id]) == 0 {
				done++
			}
			outcomes[id] = append(outcomes[id], kind)
		}
	}
	for _, id := range ids {
		if got := outcomes[id]; len(got) != 1 || got[0] != string(f.outcome(id).Outcome) {
			f.t.Errorf("job %s was published as %q, its record says %s", id, got, f.outcome(id).Outcome)
		}
	}
}

type observer struct{}

func (observer) JobDone(string, lifecycle.State)                     {}
func (observer) AttemptDone(errors.Code, errors.Class, errors.Phase) {}
func (observer) TakenOver(string)                                    {}
func (observer) FirstStarted(string, time.Duration)                  {}
func (observer) SessionOpened(string)                                {}
func (observer) SessionClosed(string, time.Duration)                 {}
func (observer) Utterance(event.Utterance)                           {}
func (observer) FramesOut(string, int, int64)                        {}
func (observer) LeaseExtended(bool)                                  {}
func (observer) SlotsBusy(int, int)                                  {}
func (observer) Postponed(string, lifecycle.State, time.Duration)    {}
func (observer) CircuitOpen(string, string, bool)                    {}
func (observer) DeadLettered(errors.Code)                            {}
func (observer) Alerted(string, errors.Code)                         {}
func (observer) Used(string, string, time.Duration, int64)           {}
func (observer) TotalsAdded(bool)                                    {}
