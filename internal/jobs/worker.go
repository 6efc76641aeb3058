package jobs

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fault"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/key"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/jobs/pace"
	"avatarworker/internal/jobs/pool"
	"avatarworker/internal/jobs/suspect"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
)

// Worker pulls jobs, runs each as one session and settles it.
type Worker struct {
	o     Options
	log   zerolog.Logger
	store *kv.Store // of job records
	// refresh is the age at which a record without an outcome is written again,
	// before its bucket forgets it; 0: it never does.
	refresh time.Duration
	parts
	lifetime
	places
	pool    *pool.Pool[*execution]
	faults  fault.Set
	crashed suspect.Jobs

	startedOnce sync.Once

	mu      sync.Mutex
	busy    int
	running map[string]*execution
	health  map[string]error // by queue
	paused  bool             // fetching is paused: see pauseFetching
}

// parts are what a worker is joined from.
type parts struct {
	publisher *event.Publisher
	kept      event.Kept
	lease     *lease.Manager
	circuits  *circuit.Circuits
	limits    *limit.Limits
	budgets   *budget.Budgets // nil: there are none
	totals    *usage.Adder    // nil: there are no counters
	fleet     *fleet.Fleet
	alerts    *alert.Counter
	outbox    *alert.Outbox
	ledger    *ledger.Writer
	keys      *key.Keys
	tooMany   circuit.TooMany
	pace      *pace.Pace
	pull      *fetch.Fetcher
}

// lifetime is what ends when: fetching at the signal, sessions when the drain time
// is up, and all other work when it is done.
type lifetime struct {
	base       context.Context // of work: ends handBackTimeout after drained
	fetching   context.Context // ends when the worker has to stop
	drained    context.Context // ends when the drain time is up
	giveBack   context.CancelCauseFunc
	executions sync.WaitGroup
	background sync.WaitGroup // writes that outlive their execution

	drainLock  sync.Mutex
	draining   bool
	drainTimer *time.Timer // cancels what outlives the drain time; nil before the drain
}

// storeTimeout is one round trip to a bucket; a node's election takes longer
// and is waited out by trying again.
const storeTimeout = 2 * time.Second

// circuitTimeout is Policy.Patience where it is not set.
const circuitTimeout = 10 * time.Second

// minWaiting is the least number of jobs outside its slots that a worker may check at a
// time only to hold them: each takes a few round trips to NATS.
const minWaiting = 16

// errDrained is the cause with which sessions end that outlive the drain time.
var errDrained = errors.New("the worker stops and the drain time is up")

// New prepares a worker; Run starts it.
func New(ctx context.Context, o Options) (*Worker, error) {
	o.SettleTimeout, o.Patience = cmp.Or(o.SettleTimeout, settleTimeout), cmp.Or(o.Patience, circuitTimeout)
	if o.InHand = cmp.Or(o.InHand, 2*o.Concurrency); o.InHand < o.Concurrency {
		return nil, fmt.Errorf("jobs: InHand is %d: at least %d, which is Concurrency", o.InHand, o.Concurrency)
	}
	if o.Storage == nil {
		o.Storage = endless{}
	}
	if err := budget.Check(o.Budgets); err != nil {
		return nil, err
	}
	for _, rule := range o.Limits {
		if err := rule.Check(); err != nil {
			return nil, err
		}
	}
	w := &Worker{
		o: o, log: o.Logger,
		parts:   parts{publisher: event.NewPublisher(o.NC, o.Names, o.Name, o.Logger), kept: event.Kept{Stream: o.Events, Names: o.Names}},
		places:  newPlaces(o.Concurrency, o.InHand-o.Concurrency),
		running: make(map[string]*execution),
		health:  make(map[string]error),
	}
	w.pool = pool.New(w.process)
	status, err := o.State.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", o.State.Bucket(), err)
	}
	w.refresh = status.TTL() / 2
	w.store = kv.NewStore(o.JS, o.State, storeTimeout)
	w.lease = lease.New(lease.Options{
		NC: o.NC, Store: kv.NewStore(o.JS, o.State, min(storeTimeout, o.AckWait/8)), ID: o.ID, Window: o.AckWait,
		Now: o.Now, Changed: w.leaseChanged, Renewed: o.Observer.LeaseExtended, Log: o.Logger,
	})
	w.limits = limit.New(limit.Options{
		Store: w.store, Worker: w.currentWorkerID, LeaseValid: w.lease.Valid, CheckInterval: o.AckWait / 4, RewriteInterval: w.refresh,
		Apps: o.MaxSessions, Rules: o.Limits, MaxWaiting: max(1, o.Concurrency/2), Log: o.Logger,
	})
	var records ledger.Ledger
	if o.Ledger != nil {
		records = o.Ledger(w.lease.Now)
	}
	w.ledger = ledger.New(ledger.Options{
		Ledger: records, Bucket: w.store, Causes: sessionCauses, Used: o.Observer.Used,
	})
	shared := kv.NewStore(o.JS, o.Fleet, storeTimeout)
	if len(o.Budgets) > 0 && records != nil {
		w.budgets = budget.New(budget.Options{
			Rules: o.Budgets, JS: o.JS, Names: o.Names, State: w.store, Fleet: shared, Least: o.CostLeast,
			Labels: o.TotalLabels, Worker: w.currentWorkerID, LeaseValid: w.lease.Valid, Written: records.Sequence, Now: w.now, Warned: w.alertBudget, Log: o.Logger,
		})
	}
	if o.Totals && records != nil {
		w.totals = w.ledger.NewAdder(ledger.AdderOptions{
			JS: o.JS, Names: o.Names, Labels: o.TotalLabels, Window: o.AckWait,
			Worker: w.currentWorkerID, LeaseValid: w.lease.Valid, Added: o.Observer.TotalsAdded, Log: o.Logger,
		})
	}
	w.fleet = fleet.New(fleet.Options{Store: shared, Self: w.presence(), Fill: w.fillPresence, Now: w.lease.Now, Log: o.Logger})
	w.circuits = circuit.New(circuit.Options{
		Store: shared, Config: o.Circuit, PerApp: o.PerApp, Leases: w.lease, Window: o.AckWait, Worker: w.currentWorkerID,
		Now: w.now, Random: o.Random, Timeout: o.Patience, Publish: w.announceCircuit, Changed: w.circuitChanged, Log: o.Logger,
	})
	w.pace = pace.New(o.Concurrency, func() int { return 1 + len(w.fleet.Others()) }, o.Random)
	w.keys = key.New(key.Options{Check: o.CheckKey, Apps: o.Apps, Others: w.othersHaveKey, Changed: w.keyChanged})
	w.alerts = alert.New(alert.Options{
		JS: o.JS, Stream: o.Events.CachedInfo().Config.Name, Errors: o.Names.AllErrors(), Config: o.Alerts, Codes: w.alerting(),
		Store: shared, Stored: w.kept.Has, Publish: w.publisher.PublishNew, Worker: o.Name, Now: w.now, Log: o.Logger,
		Raised: func(code errors.Code) { o.Observer.Alerted(event.AlertRecurring, code) },
	})
	w.outbox = alert.NewOutbox(alert.OutboxOptions{
		Stored: w.kept.Has, Publish: w.publisher.PublishNew, Raised: o.Observer.Alerted,
		Store: shared, Worker: o.Name, WorkerID: w.lastWorkerID, Now: w.now, Log: o.Logger,
	})
	w.pull = fetch.New(fetch.Options{
		JS: o.JS, Stream: o.Names.JobsStream(), Queues: o.Queues, Slots: o.Concurrency, Window: o.AckWait,
		Consumer: o.Consumer, Handle: w.handle, Health: w.setHealth, Log: o.Logger,
	})
	return w, nil
}

// now is the time by the clock of the server that keeps the records.
func (w *Worker) now() time.Time { return w.lease.Now().UTC() }

// lastWorkerID is the worker_id that the worker has at the moment, or had last.
func (w *Worker) lastWorkerID() string { return w.fleet.WorkerID() }

// currentWorkerID is the worker_id while the worker holds a lease; "": it has none.
func (w *Worker) currentWorkerID() string {
	if holder := w.lease.Current(); holder != nil {
		return holder.ID
	}
	return ""
}

func (w *Worker) presence() fleet.Presence {
	queues := make(map[string]int, len(w.o.Queues))
	for _, q := range w.o.Queues {
		queues[q.Name] = q.Weight
	}
	return fleet.Presence{
		Worker: w.o.Name, WorkerID: w.o.ID, Version: w.o.Version, StartedAt: w.o.Now().UTC(),
		Queues: queues, Slots: w.o.Concurrency, AudioConvert: w.o.AudioConvert, AudioMaxBytes: w.o.AudioMaxBytes,
	}
}

func (w *Worker) fillPresence(p *fleet.Presence) {
	p.Busy, p.RefusedKeys = w.inHand(), w.keys.RefusedApps()
	p.Keys = slices.DeleteFunc(slices.Clone(w.o.Apps), w.keys.Refused)
	p.NotReady = ""
	if err := w.Ready(); err != nil {
		p.NotReady = err.Error()
	}
}

func (w *Worker) othersHaveKey(app string) bool {
	return slices.ContainsFunc(w.fleet.Others(), func(p fleet.Presence) bool { return slices.Contains(p.Keys, app) })
}

func (w *Worker) alerting() func(errors.Code) bool {
	alert := make(map[errors.Code]bool)
	for _, row := range w.o.Table.Rows() {
		alert[row.Code] = row.Alert
	}
	return func(code errors.Code) bool { return alert[code] }
}

// Run works until ctx ends, then drains: it takes nothing new, lets sessions
// finish for the drain time and hands back what has not finished by then. It
// returns when everything is settled, or handBackTimeout after the drain time.
func (w *Worker) Run(ctx context.Context) error {
	base, endWork := context.WithCancel(context.WithoutCancel(ctx))
	w.base, w.fetching = base, ctx
	w.drained, w.giveBack = context.WithCancelCause(w.base)
	context.AfterFunc(w.drained, func() { time.AfterFunc(handBackTimeout, endWork) })
	defer w.giveBack(nil)
	w.count(0) // until the first job nothing else says that all slots are free
	w.pauseFetching()
	control, err := control.Serve(ctx, control.Options{
		NC: w.o.NC, Subject: w.o.Names.AllControl(), Jobs: controlled{w}, Valid: jobspec.ValidID, Log: w.log,
	})
	if err != nil {
		return err
	}
	background, stop := context.WithCancel(w.base)
	var others sync.WaitGroup
	others.Go(func() { w.fleet.Run(background) })
	others.Go(func() { w.limits.Run(background) })
	others.Go(func() { w.circuits.Run(background) })
	// These read what was stored since a time.
	others.Go(func() { w.lease.AwaitClock(background); w.alerts.Run(background) })
	if w.budgets != nil {
		others.Go(func() { w.lease.AwaitClock(background); w.budgets.Run(background) })
	}
	if w.totals != nil {
		others.Go(func() { w.totals.Run(background) })
	}
	others.Go(func() { w.outbox.Run(background) })
	if w.o.CheckKey != nil {
		w.keys.Start(ctx)
		others.Go(func() { w.keys.Run(background) })
	}
	w.lease.Start(w.drained)

	ending := make(chan struct{})
	context.AfterFunc(ctx, func() { defer close(ending); w.stopTaking() })
	w.pull.Run(ctx)
	<-ending
	w.drain()
	w.pool.Close()
	defer time.AfterFunc(handBackTimeout, endWork).Stop()
	w.background.Wait()

	stop()
	control.Close()
	others.Wait()
	w.lease.Stop() // last: until then what names this worker is its own
	return nil
}

// started reports, once, that the worker takes jobs.
func (w *Worker) started() {
	if w.o.Started != nil {
		w.startedOnce.Do(w.o.Started)
	}
}

// leaseChanged begins a new presence with each lease, and pauses fetching while there
// is none.
func (w *Worker) leaseChanged(holder *lease.Lease) {
	if holder != nil {
		w.fleet.Rename(w.base, holder.ID)
	}
	w.pauseFetching()
	if holder != nil {
		w.started()
	}
}

// keyChanged alerts when the backend refuses this worker's key of an app.
func (w *Worker) keyChanged(app string, refused error) {
	w.pauseFetching()
	w.fleet.Publish()
	if refused == nil {
		w.log.Info().Str("app_id", app).Msg("the backend accepts this worker's API key again")
		return
	}
	w.log.Error().Err(refused).Str("app_id", app).Msg("the backend refuses this worker's API key: it takes no jobs of the app")
	w.outbox.Alert(event.WorkerAlert{
		Kind: event.AlertWorkerKey, What: string(errors.Of(refused).Code), AppID: app,
		Message: "the backend refuses this worker's API key for app " + app + ", while other workers may have a good one: correct its key. It takes no jobs of the app until then",
	}, app)
}

// pauseFetching pauses the fetcher while no session could be started.
func (w *Worker) pauseFetching() {
	pause := w.lease.Current() == nil || w.keys.NoneLeft()
	w.mu.Lock()
	defer w.mu.Unlock()
	if pause != w.paused {
		w.paused = pause
		w.pull.Pause(pause)
	}
}

// stopTaking marks the worker as draining: what still arrives is handed back,
// and the drain time runs.
func (w *Worker) stopTaking() {
	w.drainLock.Lock()
	w.draining = true
	w.drainTimer = time.AfterFunc(w.o.Drain, func() { w.giveBack(errDrained) })
	w.drainLock.Unlock()
	w.fleet.Drain()
	w.log.Info().Stringer("drain_timeout", w.o.Drain).Int("running", w.Running()).Msg("draining: no new jobs; sessions may finish")
}

func (w *Worker) isDraining() bool {
	w.drainLock.Lock()
	defer w.drainLock.Unlock()
	return w.draining
}

// drain waits for the sessions; they are cancelled when the time is up.
func (w *Worker) drain() {
	w.executions.Wait()
	w.drainLock.Lock()
	defer w.drainLock.Unlock()
	w.drainTimer.Stop()
}

// Reconnected is to be called when the connection to NATS is back.
func (w *Worker) Reconnected() { w.fleet.Publish() }

// Ready says why the worker is not able to take jobs, or not all of them; nil: it
// is.
func (w *Worker) Ready() error {
	if err := w.fetchFault(); err != nil {
		return err
	}
	return errors.Join(w.lease.Ready(), w.keys.Err(), w.budgets.Err(), w.limits.Err(), w.faults.Err(), w.o.Storage.Err())
}

func (w *Worker) fetchFault() error {
	if w.isDraining() {
		return errors.New("draining")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for queue, err := range w.health {
		if err != nil {
			return fmt.Errorf("queue %s is not being served: %w", queue, err)
		}
	}
	return nil
}

// Running returns how many slots are in use. A job that has given up its slot is not
// counted.
func (w *Worker) Running() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.busy
}

func (w *Worker) setHealth(queue string, err error) {
	w.mu.Lock()
	before := w.health[queue]
	w.health[queue] = err
	w.mu.Unlock()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		w.log.Error().Err(err).Str("queue", queue).Msg("cannot fetch jobs; trying again every second")
	}
	if err == nil && before != nil {
		w.log.Info().Str("queue", queue).Msg("fetching jobs again")
	}
}

// execution is the one that runs the job here; nil: there is none.
func (w *Worker) execution(jobID string) *execution {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running[jobID]
}

// register makes the execution the one that has the job here, and reports false
// if another has it.
func (w *Worker) register(e *execution) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running[e.id.ID] != nil {
		return false
	}
	w.running[e.id.ID] = e
	return true
}

func (w *Worker) deregister(e *execution) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running[e.id.ID] == e {
		delete(w.running, e.id.ID)
	}
}

func (w *Worker) defaults() lifecycle.Defaults {
	return lifecycle.Defaults{AppID: w.o.DefaultApp, Region: w.o.DefaultRegion, MaxAttempts: w.o.Retry.MaxAttempts}
}
