// Package app is the composition root: it joins the other packages to a worker,
// starts it, and stops it in the opposite order.
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
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/session"
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
	// OnReady is told when the worker begins to take jobs; may be nil.
	OnReady func()
	// LookEvery is how often it is looked whether the streams and buckets are
	// still there; 0: 10s.
	LookEvery time.Duration
	// Spans takes the traces, whatever the OTEL_* variables say; nil: they say.
	Spans sdktrace.SpanExporter
}

// App is one worker with everything around it.
type App struct {
	o       Options
	c       *config.Config
	log     zerolog.Logger
	names   topology.Names
	name    string // of the worker
	id      string // its name and start
	metrics *telemetry.Metrics
	waiting *postponed
	pauses  pauses
	gather  prometheus.Gatherer
	admin   *admin.Server

	mu        sync.Mutex
	connected bool
	worker    *jobs.Worker
	starting  error // why there is no worker yet
	missing   error // what was deleted underneath the worker
	addr      net.Addr
	cleanups  []cleanup
}

// cleanup undoes one step of the start.
type cleanup struct {
	name string
	do   func(ctx context.Context) error
}

// stopTimeout bounds all clean-ups after the worker itself has drained.
const stopTimeout = 10 * time.Second

// New returns an App that has started nothing yet.
func New(o Options) (*App, error) {
	if err := o.Config.RequireApp(); err != nil {
		return nil, err
	}
	a := &App{o: o, c: o.Config, names: topology.Names{Prefix: o.Config.NATS.Prefix}, starting: errors.New("starting"), waiting: newPostponed()}
	a.name = workerName(a.c.Worker.Name)
	a.id = a.name + "-" + nuid.Next()[14:]
	a.log = o.Logger.With().Str("worker", a.name).Str("worker_id", a.id).Logger()
	registry := prometheus.NewRegistry()
	a.gather = registry
	a.metrics = telemetry.NewMetrics(registry,
		telemetry.Labels{Queues: queueNames(a.c), Apps: appIDs(a.c), Region: a.c.Backend.Region, Version: o.Version},
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

// ID is the worker's name and start.
func (a *App) ID() string { return a.id }

// AdminAddr is where the admin server listens; nil: it does not.
func (a *App) AdminAddr() net.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.addr
}

const (
	// maxUnacknowledged bounds the publishes that nobody waits for.
	maxUnacknowledged = 4096
	// maxAckWait is how long one of them counts as on its way: longer than an
	// election. Without a limit one whose acknowledgement was lost would count
	// for good, and in the end there would be no room for another.
	maxAckWait = 30 * time.Second
)

func publishLimits(ackWait time.Duration) []jetstream.JetStreamOpt {
	return []jetstream.JetStreamOpt{
		jetstream.WithPublishAsyncMaxPending(maxUnacknowledged),
		jetstream.WithPublishAsyncTimeout(ackWait),
	}
}

// Run works until ctx ends, then drains and stops. It outlives any outage of
// NATS; the error is one that only a person can mend.
func (a *App) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, a.stop(ctx)) }()
	if err := a.startAdmin(); err != nil {
		return err
	}
	nc, js, err := a.connect(ctx)
	if ctx.Err() != nil {
		return nil // told to stop before it began
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
		return nil // told to stop before it began
	}
	if err != nil {
		return err
	}
	a.started(worker)
	service, err := a.serveMicro(nc)
	if err != nil {
		a.log.Warn().Err(err).Msg("not registered as a NATS micro service; the worker works without")
	} else if service != nil {
		a.onStop("micro service", func(context.Context) error { return service.Stop() })
	}
	beside, stopBeside := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { a.watchQueues(beside, handles) })
	wg.Go(func() { a.newKeeper(js).run(beside) })
	defer wg.Wait()
	defer stopBeside()
	return worker.Run(ctx)
}

// tellStarted says that the worker takes jobs.
func (a *App) tellStarted() {
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

// Ready says why the worker is not ready to take jobs; nil: it is.
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
	err := worker.Ready()
	if err != nil && missing != nil {
		return fmt.Errorf("%w; %w", err, missing)
	}
	return errors.Join(err, missing)
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

func (a *App) notYet(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.starting = err
}

// connect waits until NATS is there.
func (a *App) connect(ctx context.Context) (*nats.Conn, jetstream.JetStream, error) {
	options, err := ConnOptions(a.c)
	if err != nil {
		return nil, nil, err
	}
	options.Name = "avatarworker " + a.id
	options.InProcess = a.o.InProcess
	options.Logger = a.log
	options.OnState = a.connectionChanged
	nc, js, err := natsconn.Open(ctx, options, publishLimits(maxAckWait)...)
	if err != nil {
		return nil, nil, err
	}
	a.onStop("NATS connection", func(ctx context.Context) error { return natsconn.Close(ctx, nc) })
	if err := natsconn.WaitConnected(ctx, nc); err != nil && ctx.Err() == nil {
		return nil, nil, err
	}
	return nc, js, nil
}

// ConnOptions says how to reach NATS under a configuration.
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
	err := a.patiently(ctx, "streams and buckets are not there yet", func() error {
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

// patiently tries until it works: a cluster that is starting has no JetStream
// yet, and NATS may go away while we start. Only what no waiting mends is an
// error; that ctx ended is none.
func (a *App) patiently(ctx context.Context, what string, try func() error) error {
	for last := ""; ; {
		err := try()
		switch {
		case err == nil, ctx.Err() != nil:
			return nil
		case final(err):
			return err
		}
		a.notYet(err)
		level := zerolog.WarnLevel
		if err.Error() == last {
			level = zerolog.DebugLevel // it was said
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

// final tells whether trying again is pointless.
func final(err error) bool {
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
	a.log.Warn().Strs("differences", list).Msg("what exists has other settings than the configuration; it is left as it is")
}

// Settings are the streams' and buckets' under a configuration.
func Settings(c *config.Config) topology.Settings {
	limit := func(l config.Limits) topology.Limit {
		return topology.Limit{MaxAge: l.MaxAge, MaxBytes: int64(l.MaxBytes)}
	}
	storage := jetstream.FileStorage
	if c.NATS.Storage == "memory" {
		storage = jetstream.MemoryStorage
	}
	return topology.Settings{
		Replicas: c.NATS.Replicas, Storage: storage, StateTTL: c.NATS.StateTTL, AckWait: c.Lease.AckWait,
		Queues: queueNames(c), JobsMaxBytes: int64(c.Streams.Jobs.MaxBytes),
		StateMaxBytes: int64(c.Streams.State.MaxBytes), FleetMaxBytes: int64(c.Streams.Fleet.MaxBytes),
		Events: limit(c.Streams.Events), Usage: limit(c.Streams.Usage), Totals: limit(c.Streams.Totals), DLQ: limit(c.Streams.DLQ), Frames: limit(c.Streams.Frames), Audio: limit(c.Streams.Audio),
		AudioFiles: limit(c.Streams.AudioFiles), Recordings: limit(c.Streams.Recordings),
	}
}

// newWorker joins the packages.
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
	c := a.c
	options := jobs.Options{
		NC: nc, JS: js, Names: a.names,
		Jobs: h.Jobs, Events: h.Events, State: h.State, Fleet: h.Fleet, Consumer: a.consumer(js),
		Name: a.name, ID: a.id, Version: a.o.Version, Queues: queues(c),
		Concurrency: c.Worker.Concurrency, AckWait: lease(h, c), Drain: c.Worker.DrainTimeout,
		AudioConvert: c.Audio.Convert, AudioMaxBytes: int64(c.Audio.MaxBytes),
		DefaultApp: c.App.ID, DefaultRegion: c.Backend.Region, KnownApp: a.knownApp, Apps: appIDs(c), MaxSessions: maxSessions(c),
		Started: a.tellStarted, Budgets: Budgets(c), CostLeast: int64(c.Cost.Minimum),
		Ledger: usage.NewLedger(ledgerOptions(c, js, a.names, h)),
		CheckKey: func(ctx context.Context, app string) error {
			return sessions.CheckKey(ctx, app, func() (string, error) { return a.apiKey(app) })
		},
		Retry:   lifecycle.RetryPolicy{MaxAttempts: c.Retry.MaxAttempts, Initial: c.Retry.Initial, Max: c.Retry.Max},
		Circuit: circuit.Config{Failures: c.Circuit.Failures, Cooldown: c.Circuit.Cooldown, MaxCooldown: c.Circuit.MaxCooldown},
		MaxHold: c.Circuit.MaxHold, PerApp: c.Backend.ConsoleURL != "" && c.Backend.IngressURL != "",
		Alerts: alert.Config{Threshold: c.Alerts.Threshold, Window: c.Alerts.Window},
		Table:  table, Runner: runner, DeadLetters: dlq.NewWriter(js, a.names),
		Observer: observer{a.metrics, a.waiting}, Tracer: tracer, Logger: a.log, Now: time.Now, Random: rand.Float64,
	}
	var worker *jobs.Worker
	err = a.patiently(ctx, "the worker can't be made yet", func() (err error) {
		worker, err = jobs.New(ctx, options)
		return err
	})
	return worker, err
}

// Table is the action table under a configuration.
func Table(c *config.Config) (*errors.Table, error) {
	policy := make(errors.Policy, len(c.Policy))
	for code, p := range c.Policy {
		policy[errors.Code(code)] = errors.Override{Action: errors.Action(p.Action), Attempts: p.Attempts, Alert: p.Alert}
	}
	return errors.NewTable(policy)
}

// consumer looks that a queue's consumer is there, and makes it again if it was
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
