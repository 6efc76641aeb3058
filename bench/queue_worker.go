package main

import (
	"context"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
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
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/topology"
)

// workerQueue is our worker with a session that does nothing. It logs, as in
// production, but to nowhere.
type workerQueue struct {
	nc     *nats.Conn
	names  topology.Names
	jobs   jetstream.Stream
	worker *jobs.Worker
	stopIt context.CancelFunc
	ended  sync.WaitGroup
	counts counter
}

func (r *workerQueue) start(ctx context.Context, p params) (answer, error) {
	nc, js, err := connect(p.NATS)
	if err != nil {
		return answer{}, err
	}
	settings := settings(p.Replicas)
	h, _, err := topology.Ensure(ctx, js, r.names, settings)
	if err != nil {
		return answer{}, err
	}
	table, err := errors.NewTable(nil)
	if err != nil {
		return answer{}, err
	}
	r.nc, r.jobs = nc, h.Jobs
	r.counts.reached = make(chan struct{}, 1)
	r.worker, err = jobs.New(ctx, jobs.Options{
		Stores: jobs.Stores{
			NC: nc, JS: js, Names: r.names, Jobs: h.Jobs, Events: h.Events, State: h.State, Fleet: h.Fleet,
			Consumer: func(ctx context.Context, queue string) error {
				_, _, err := topology.EnsureConsumer(ctx, h.Jobs, r.names, settings, queue)
				return err
			},
		},
		Profile: jobs.Profile{
			Name: "bench", ID: "bench-1", Version: "bench", Queues: []fetch.Queue{{Name: "default", Weight: 1}},
			Concurrency: p.Concurrency, InHand: p.InHand, AckWait: settings.AckWait, Drain: time.Minute,
		},
		Accounts: jobs.Accounts{DefaultApp: "app", DefaultRegion: "us-west", KnownApp: func(string) bool { return true }, Ledger: p.ledger(js, r.names), Totals: p.Ledger != ""},
		Policy: jobs.Policy{
			Retry:   lifecycle.RetryPolicy{MaxAttempts: 5, Initial: time.Second, Max: time.Minute},
			Circuit: circuit.Config{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 5 * time.Minute},
			MaxHold: 24 * time.Hour,
			Alerts:  alert.Config{Threshold: 5, Window: time.Minute},
			Table:   table,
		},
		Parts: jobs.Parts{
			Runner: p.runner(), DeadLetters: dlq.NewWriter(js, r.names),
			Observer: &r.counts, Tracer: noop.NewTracerProvider().Tracer(""),
			Logger: zerolog.New(io.Discard).Level(zerolog.InfoLevel), Now: time.Now, Random: rand.Float64,
		},
	})
	return answer{}, err
}

// do runs the worker until n jobs are settled.
func (r *workerQueue) do(ctx context.Context, c command) (answer, error) {
	r.counts.want.Store(int64(c.N))
	runCtx, cancel := context.WithCancel(ctx)
	r.stopIt = cancel
	begun := time.Now()
	var runErr error
	r.ended.Go(func() { runErr = r.worker.Run(runCtx) })
	select {
	case <-r.counts.reached:
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
	// The last jobs have their outcome; their acknowledgements follow.
	if err := emptied(ctx, r.jobs); err != nil {
		return answer{}, err
	}
	elapsed := time.Since(begun)
	cancel()
	r.ended.Wait()
	return answer{Elapsed: elapsed}, runErr
}

func (r *workerQueue) stop() {
	if r.stopIt != nil {
		r.stopIt()
		r.ended.Wait()
	}
	r.nc.Close()
}

// emptied waits until no message is left.
func emptied(ctx context.Context, stream jetstream.Stream) error {
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	for {
		info, err := stream.Info(ctx)
		if err != nil || info.State.Msgs == 0 {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ledger is the worker's, where the measurement asks for one.
func (p params) ledger(js jetstream.JetStream, names topology.Names) func(func() time.Time) ledger.Ledger {
	if p.Ledger == "" {
		return nil
	}
	return func(now func() time.Time) ledger.Ledger {
		return usage.NewLedger(usage.Options{JS: js, Names: names, Tariff: usage.Tariff{Minimum: 1}, Window: topology.UsageDuplicates, Now: now})
	}
}

// runner is a session that is over at once; where the ledger is compared, one that
// was confirmed before.
func (p params) runner() jobs.Runner {
	if p.Confirmed {
		return confirmed{}
	}
	return idle{}
}

// confirmed is a session that is over as soon as it is confirmed.
type confirmed struct{ idle }

func (confirmed) Run(_ context.Context, a *jobs.Attempt) (jobs.Report, error) {
	a.Progress.Connected("c", "us-west")
	return jobs.Report{ConnectionID: "c", Connected: time.Millisecond}, nil
}

// idle is a session that is over at once.
type idle struct{}

func (idle) Run(context.Context, *jobs.Attempt) (jobs.Report, error) { return jobs.Report{}, nil }

func (idle) Finish(context.Context, *jobspec.Job, jobs.Finished) error { return nil }

// counter observes outcomes, and nothing else.
type counter struct {
	want    atomic.Int64
	done    atomic.Int64
	reached chan struct{}
}

func (c *counter) JobDone(string, lifecycle.State) {
	if c.done.Add(1) == c.want.Load() {
		c.reached <- struct{}{}
	}
}

func (*counter) AttemptDone(errors.Code, errors.Class, errors.Phase) {}
func (*counter) TakenOver(string)                                    {}
func (*counter) FirstStarted(string, time.Duration)                  {}
func (*counter) SessionOpened(string)                                {}
func (*counter) SessionClosed(string, time.Duration)                 {}
func (*counter) TotalsAdded(bool)                                    {}
func (*counter) Used(string, string, time.Duration, int64)           {}
func (*counter) Utterance(event.Utterance)                           {}
func (*counter) FramesOut(string, int, int64)                        {}
func (*counter) LeaseExtended(bool)                                  {}
func (*counter) SlotsBusy(int, int)                                  {}
func (*counter) Postponed(string, lifecycle.State, time.Duration)    {}
func (*counter) CircuitOpen(string, string, bool)                    {}
func (*counter) DeadLettered(errors.Code)                            {}
func (*counter) Alerted(string, errors.Code)                         {}
