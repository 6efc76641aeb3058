// Package app is the composition root: it joins the other packages to a worker,
// starts it, and stops it in the opposite order. It owns that order and the
// translation of the configuration into the options of the others. It decides
// nothing about a job, and must not know flags or the process around it.
package app

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"avatarworker/internal/admin"
	"avatarworker/internal/attempt"
	"avatarworker/internal/audio"
	"avatarworker/internal/config"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/key"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/session"
	"avatarworker/internal/storage"
	"avatarworker/internal/telemetry"
	"avatarworker/internal/topology"
)

// Options are what an App needs besides its configuration.
type Options struct {
	Config  *config.Config
	Logger  zerolog.Logger
	Version string
	// InProcess is the server to connect to in this process; nil: nats.url.
	InProcess nats.InProcessConnProvider
	// OnReady is called when the worker begins to take jobs; may be nil.
	OnReady func()
	// CheckEvery is how often the worker checks that its streams and buckets still
	// exist; 0: 10s.
	CheckEvery time.Duration
	// Spans takes the traces, whatever the OTEL_* variables say; nil: the variables
	// decide.
	Spans sdktrace.SpanExporter
	// Random draws the jitter of each wait, from [0, 1); nil: rand.Float64.
	Random func() float64
}

// App is one worker with everything around it.
type App struct {
	o       Options
	c       *config.Config
	log     zerolog.Logger
	names   topology.Names
	name    string // of the worker
	id      string // name with a suffix that is new at each start
	metrics *telemetry.Metrics
	waiting *postponed
	pauses  pauses
	gather  prometheus.Gatherer
	admin   *admin.Server

	mu        sync.Mutex
	connected bool
	worker    *jobs.Worker
	starting  error // why the worker has not started yet
	missing   error // what was deleted while the worker runs
	addr      net.Addr
	cleanups  []cleanup
}

// cleanup undoes one step of the start.
type cleanup struct {
	name string
	do   func(ctx context.Context) error
}

// stopTimeout bounds all clean-ups after the worker itself has drained.
const stopTimeout = 5 * time.Second

// New returns an App that has started nothing yet.
func New(o Options) (*App, error) {
	if err := o.Config.RequireApp(); err != nil {
		return nil, err
	}
	if o.Random == nil {
		o.Random = rand.Float64
	}
	a := &App{o: o, c: o.Config, names: topology.Names{Prefix: o.Config.NATS.Prefix}, starting: errors.New("starting"), waiting: newPostponed()}
	a.name = workerName(a.c.Worker.Name)
	a.id = a.name + "-" + nuid.Next()[14:]
	a.log = o.Logger.With().Str("worker", a.name).Str("worker_id", a.id).Logger()
	registry := prometheus.NewRegistry()
	a.gather = registry
	a.metrics = telemetry.NewMetrics(registry,
		telemetry.Labels{Queues: queueNames(a.c), Apps: appIDs(a.c), Outputs: jobspec.Outputs(), Region: a.c.Backend.Region, Version: o.Version},
		telemetry.Readings{
			Ready:   func() bool { return a.Ready() == nil },
			Waiting: func() (retrying, held int) { return a.waiting.count(time.Now()) },
		})
	return a, nil
}

func workerName(name string) string {
	if name != "" {
		return name
	}
	host, err := os.Hostname()
	if err != nil {
		return "worker"
	}
	return host
}

// AdminAddr is where the admin server listens, nil if it does not.
func (a *App) AdminAddr() net.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.addr
}

// Run works until ctx ends, then drains and stops. It survives any outage of
// NATS. It returns an error only for what a person has to correct.
func (a *App) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, a.stop(ctx)) }()
	if err := a.startAdmin(); err != nil {
		return err
	}
	nc, js, err := a.connect(ctx)
	if ctx.Err() != nil {
		return nil // stopped before it began
	}
	if err != nil {
		return err
	}
	handles, err := a.ensure(ctx, js)
	if err != nil || ctx.Err() != nil {
		return err
	}
	worker, err := a.newWorker(ctx, nc, js, handles)
	if worker == nil && ctx.Err() != nil {
		return nil // stopped before it began
	}
	if err != nil {
		return err
	}
	a.started(worker)
	service, err := a.serveMicro(nc)
	if err != nil {
		a.log.Warn().Err(err).Msg("could not register as a NATS micro service; the worker runs without it")
	} else if service != nil {
		a.onStop("micro service", func(context.Context) error { return service.Stop() })
	}
	working, drain := context.WithCancel(ctx)
	defer drain()
	if err := a.serveDrain(nc, drain); err != nil {
		a.log.Warn().Err(err).Msg("could not subscribe to requests to drain; the worker runs, but can't be drained by request")
	}
	beside, stopBeside := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { a.watchQueues(beside, js, handles) })
	wg.Go(func() { a.newWatchdog(js, handles).run(beside) })
	defer wg.Wait()
	defer stopBeside()
	return worker.Run(working)
}

// reportStarted logs that the worker takes jobs, and calls OnReady.
func (a *App) reportStarted() {
	a.log.Info().Strs("queues", queueNames(a.c)).Int("concurrency", a.c.Worker.Concurrency).
		Str("version", a.o.Version).Msg("worker started")
	if a.o.OnReady != nil {
		a.o.OnReady()
	}
}

func (a *App) onStop(name string, do func(ctx context.Context) error) {
	a.cleanups = append(a.cleanups, cleanup{name, do})
}

// stop undoes the start, last step first.
func (a *App) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	var faults []error
	for i := len(a.cleanups) - 1; i >= 0; i-- {
		if err := a.cleanups[i].do(ctx); err != nil {
			faults = append(faults, fmt.Errorf("stop %s: %w", a.cleanups[i].name, err))
		}
	}
	a.cleanups = nil
	if len(faults) > 0 {
		a.log.Warn().Err(errors.Join(faults...)).Msg("not everything stopped cleanly")
	} else {
		a.log.Info().Msg("worker stopped")
	}
	return nil
}

func (a *App) startAdmin() error {
	if a.c.Admin.Addr == "" {
		return nil
	}
	a.admin = admin.New(admin.Options{
		Addr: a.c.Admin.Addr, Gatherer: a.gather, Ready: a.Ready, Note: a.pauses.String, Hosts: a.c.Admin.Hosts, PProf: a.c.Admin.PProf, Logger: a.log,
	})
	addr, err := a.admin.Start()
	if err != nil {
		return err // it names admin.addr
	}
	a.mu.Lock()
	a.addr = addr
	a.mu.Unlock()
	a.log.Info().Stringer("addr", addr).Msg("admin server listens")
	a.onStop("admin server", a.admin.Stop)
	return nil
}

// Ready returns nil if the worker is ready to take jobs, and otherwise why not.
func (a *App) Ready() error {
	a.mu.Lock()
	connected, worker, starting, missing := a.connected, a.worker, a.starting, a.missing
	a.mu.Unlock()
	switch {
	case !connected:
		return errors.New("not connected to NATS")
	case worker == nil:
		return starting
	}
	return errors.Join(worker.Ready(), missing)
}

func (a *App) started(w *jobs.Worker) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.worker = w
}

func (a *App) setMissing(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.missing = err
}

func (a *App) setStarting(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.starting = err
}

// connect waits until NATS can be reached.
func (a *App) connect(ctx context.Context) (*nats.Conn, jetstream.JetStream, error) {
	options, err := ConnOptions(a.c)
	if err != nil {
		return nil, nil, err
	}
	options.Name = "avatarworker " + a.id
	options.InProcess = a.o.InProcess
	options.Logger = a.log
	options.OnState = a.connectionChanged
	nc, js, err := natsconn.Open(ctx, options)
	if err != nil {
		return nil, nil, err
	}
	a.onStop("NATS connection", func(ctx context.Context) error { return natsconn.Close(ctx, nc) })
	if err := natsconn.WaitConnected(ctx, nc); err != nil && ctx.Err() == nil {
		return nil, nil, err
	}
	return nc, js, nil
}

// ConnOptions returns how to reach NATS under a configuration.
func ConnOptions(c *config.Config) (natsconn.Options, error) {
	password, token, err := c.NATS.Login()
	if err != nil {
		return natsconn.Options{}, err
	}
	o := natsconn.Options{
		URLs: c.NATS.URL, Creds: c.NATS.Creds, NKey: c.NATS.NKey, Context: c.NATS.Context,
		User: c.NATS.User, Password: password, Token: token,
		TLS:    natsconn.TLS{Cert: c.NATS.TLS.Cert, Key: c.NATS.TLS.Key, CA: c.NATS.TLS.CA},
		Domain: c.NATS.Domain, APIPrefix: c.NATS.APIPrefix, InboxPrefix: c.NATS.InboxPrefix, TLSFirst: c.NATS.TLSFirst,
	}
	if o.Context != "" && c.Source("nats.url") == "" {
		o.URLs = "" // the context's own servers
	}
	return o, nil
}

func (a *App) connectionChanged(connected bool) {
	a.mu.Lock()
	a.connected = connected
	worker := a.worker
	a.mu.Unlock()
	a.metrics.SetNATSConnected(connected)
	if connected && worker != nil {
		worker.Reconnected()
	}
}

// ensure opens streams and buckets.
func (a *App) ensure(ctx context.Context, js jetstream.JetStream) (topology.Handles, error) {
	var handles topology.Handles
	err := a.retryUntilDone(ctx, "could not open the streams and buckets", func() error {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		opened, differences, err := topology.Ensure(ctx, js, a.names, Settings(a.c))
		if err == nil {
			handles = opened
			a.reportDifferences(differences)
		}
		return err
	})
	return handles, err
}

// retryUntilDone calls try until it succeeds: a cluster that is starting has no
// JetStream yet, and NATS may go away during the start. It returns an error only
// where trying again is pointless, and nil if ctx ends.
func (a *App) retryUntilDone(ctx context.Context, what string, try func() error) error {
	for last := ""; ; {
		err := try()
		switch {
		case err == nil, ctx.Err() != nil:
			return nil
		case permanent(err):
			return err
		}
		a.setStarting(err)
		level := zerolog.WarnLevel
		if err.Error() == last {
			level = zerolog.DebugLevel // it was logged before
		}
		last = err.Error()
		a.log.WithLevel(level).Err(err).Msg(what + "; trying again")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// permanent reports whether trying again is pointless.
func permanent(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.Code < 500
	}
	return errors.Is(err, topology.ErrUnusable) || errors.Is(err, topology.ErrServer) || errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrConnectionClosed)
}

func (a *App) reportDifferences(differences []topology.Difference) {
	if len(differences) == 0 {
		return
	}
	list := make([]string, len(differences))
	for i, d := range differences {
		list[i] = d.String()
	}
	a.log.Warn().Strs("differences", list).Msg("existing streams, consumers or buckets differ from the configuration; they are left unchanged")
}

// Settings returns the settings of streams and buckets under a configuration.
func Settings(c *config.Config) topology.Settings {
	limit := func(l config.Limits) topology.Limit {
		return topology.Limit{MaxAge: l.MaxAge, MaxBytes: int64(l.MaxBytes)}
	}
	storage := jetstream.FileStorage
	if c.NATS.Storage == "memory" {
		storage = jetstream.MemoryStorage
	}
	return topology.Settings{
		Replicas: c.NATS.Replicas, Placement: placement(c.NATS.Placement), Storage: storage, StateTTL: c.NATS.StateTTL, AckWait: c.Lease.AckWait,
		Queues: queueNames(c), JobsMaxBytes: int64(c.Streams.Jobs.MaxBytes),
		StateMaxBytes: int64(c.Streams.State.MaxBytes), FleetMaxBytes: int64(c.Streams.Fleet.MaxBytes),
		Events: limit(c.Streams.Events), Usage: limit(c.Streams.Usage), Totals: limit(c.Streams.Totals), DLQ: limit(c.Streams.DLQ), Frames: limit(c.Streams.Frames), Audio: limit(c.Streams.Audio),
		AudioFiles: limit(c.Streams.AudioFiles), Recordings: limit(c.Streams.Recordings),
	}
}

func placement(p config.Placement) *jetstream.Placement {
	if p.Cluster == "" && len(p.Tags) == 0 {
		return nil
	}
	return &jetstream.Placement{Cluster: p.Cluster, Tags: p.Tags}
}

// newWorker joins the other packages to a worker.
func (a *App) newWorker(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, h topology.Handles) (*jobs.Worker, error) {
	table, err := Table(a.c)
	if err != nil {
		return nil, err
	}
	tracing, stopTracing, err := telemetry.NewTracing(ctx, telemetry.Service{Name: "avatarworker", Version: a.o.Version, Instance: a.id, Exporter: a.o.Spans})
	if err != nil {
		return nil, err
	}
	a.onStop("traces", stopTracing)
	tracer := tracing.Tracer("avatarworker")
	sessions := session.New(a.sessionOptions(tracer))
	a.onStop("sessions", func(context.Context) error { return sessions.Close() })
	console, ingress := sessions.Proxies()
	a.log.Info().Str("console_proxy", console).Str("ingress_proxy", ingress).Msg("proxies on the way to the backend")
	speech := audio.New(a.audioOptions(js))
	a.onStop("audio", func(context.Context) error { speech.Close(); return nil })
	runner := attempt.New(attempt.Options{
		JS: js, Names: a.names, Sessions: sessions, Audio: speech,
		APIKey: a.apiKey, MaxSession: a.c.Backend.MaxSession, Logger: a.log,
	})
	stores := storage.New(storage.Options{JS: js, Names: a.names, Speech: speech})
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	var watch sync.WaitGroup
	watch.Go(func() { stores.Watch(watching) })
	a.onStop("storage", func(context.Context) error { stopWatching(); watch.Wait(); return nil })
	c := a.c
	options := jobs.Options{
		Stores: jobs.Stores{
			NC: nc, JS: js, Names: a.names,
			Jobs: h.Jobs, Events: h.Events, State: h.State, Fleet: h.Fleet, Consumer: a.consumer(js),
		},
		Profile: jobs.Profile{
			Name: a.name, ID: a.id, Version: a.o.Version, Queues: queues(c),
			Concurrency: c.Worker.Concurrency, AckWait: lease(h, c), Drain: c.Worker.DrainTimeout,
			AudioConvert: c.Audio.Convert, AudioMaxBytes: int64(c.Audio.MaxBytes),
		},
		Accounts: jobs.Accounts{
			DefaultApp: c.App.ID, DefaultRegion: c.Backend.Region, KnownApp: a.knownApp, Apps: appIDs(c), MaxSessions: maxSessions(c), Limits: sessionLimits(c),
			Storage: stores, Budgets: Budgets(c), CostLeast: int64(c.Cost.Minimum),
			Ledger: func(now func() time.Time) ledger.Ledger {
				return usage.NewLedger(ledgerOptions(c, js, a.names, h, now, stores.InvalidateLedger))
			},
			Totals: h.Totals != nil, TotalLabels: c.TotalLabels(),
			CheckKey: func(ctx context.Context, app string) error {
				err := sessions.CheckKey(ctx, app, func() (string, error) { return a.apiKey(app) })
				if err != nil && !key.Refuses(err) {
					a.log.Warn().Str("app_id", app).Err(err).Msg("the API key could not be checked; jobs of the app are tried")
				}
				return err
			},
		},
		Policy: jobs.Policy{
			Retry:   lifecycle.RetryPolicy{MaxAttempts: c.Retry.MaxAttempts, Initial: c.Retry.Initial, Max: c.Retry.Max},
			Circuit: circuit.Config{Failures: c.Circuit.Failures, Cooldown: c.Circuit.Cooldown, MaxCooldown: c.Circuit.MaxCooldown},
			MaxHold: c.Circuit.MaxHold, PerApp: c.Backend.ConsoleURL != "" && c.Backend.IngressURL != "",
			Alerts: alert.Config{Threshold: c.Alerts.Threshold, Window: c.Alerts.Window},
			Table:  table,
		},
		Parts: jobs.Parts{
			Started: a.reportStarted, Runner: runner, DeadLetters: dlq.NewWriter(js, a.names),
			Observer: observer{a.metrics, a.waiting}, Tracer: tracer, Logger: a.log, Now: failpoint.Now, Random: a.o.Random,
		},
	}
	var worker *jobs.Worker
	err = a.retryUntilDone(ctx, "could not create the worker", func() (err error) {
		worker, err = jobs.New(ctx, options)
		return err
	})
	return worker, err
}

// Table returns the action table under a configuration.
func Table(c *config.Config) (*errors.Table, error) {
	policy := make(errors.Policy, len(c.Policy))
	for code, p := range c.Policy {
		policy[errors.Code(code)] = errors.Override{Action: errors.Action(p.Action), Attempts: p.Attempts, Alert: p.Alert}
	}
	return errors.NewTable(policy)
}

// consumer returns a function that makes a queue's consumer again if it was
// deleted.
func (a *App) consumer(js jetstream.JetStream) func(context.Context, string) error {
	return func(ctx context.Context, queue string) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		stream, err := js.Stream(ctx, a.names.JobsStream())
		if err != nil {
			return fmt.Errorf("stream %s: %w", a.names.JobsStream(), err)
		}
		_, _, err = topology.EnsureConsumer(ctx, stream, a.names, Settings(a.c), queue)
		return err
	}
}
