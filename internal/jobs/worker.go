package jobs

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"avatarworker/internal/errors"
)

// Names are the subjects that the worker needs, those of its events among them.
type Names interface {
	Subjects
	DLQ(class, code string) string
	AllControl() string
	AllErrors() string
	WorkerSubject(workerID string) string
}

// Options are what a Worker is made of. All fields are required but where they
// say otherwise.
type Options struct {
	NC    *nats.Conn
	JS    jetstream.JetStream
	Names Names

	Jobs   jetstream.Stream   // the jobs stream
	Events jetstream.Stream   // the events stream
	State  jetstream.KeyValue // job records
	Fleet  jetstream.KeyValue // what workers share
	// Consumer gives the consumer of a queue, made again if it was deleted.
	Consumer func(ctx context.Context, queue string) (jetstream.Consumer, error)

	Name        string // of the worker
	ID          string // its name and start: no two starts have the same
	Version     string
	Queues      []Queue
	Concurrency int           // sessions at a time
	AckWait     time.Duration // the lease
	Drain       time.Duration // how long sessions may go on after a drain begins
	// SettleTimeout bounds writing what became of a job, and what a session has
	// reached. 0: 30 s.
	SettleTimeout time.Duration
	// AlonePatience is how long a job that has to run alone keeps new ones away
	// at its first delivery; later ones wait longer. 0: 30 s.
	AlonePatience time.Duration

	DefaultApp    string
	DefaultRegion string
	KnownApp      func(app string) bool // has credentials
	MaxSessions   map[string]int        // by app, over the fleet; absent: no limit
	SlotsStream   string
	SlotsPrefix   string // subject prefix of the slot tokens
	Retry         RetryPolicy
	Circuit       CircuitConfig
	Alerts        AlertConfig
	Table         *errors.Table

	Runner      Runner
	DeadLetters DeadLetters
	Observer    Observer
	Tracer      trace.Tracer
	Logger      zerolog.Logger
	Now         func() time.Time
	Random      func() float64 // in [0, 1)
}

// Worker pulls jobs, runs each as one session and settles it.
type Worker struct {
	o     Options
	log   zerolog.Logger
	store *Store
	// refresh is the age at which a record without an outcome is written again,
	// before its bucket forgets it; 0: it never does.
	refresh   time.Duration
	publisher *Publisher
	leases    *Leases
	circuits  *Circuits
	slots     *Slots
	fleet     *fleet
	alerts    *Alerts
	asks      *asker
	gate      *gate
	leftovers *semaphore.Weighted // jobs whose place is another's already
	pull      *puller
	told      chan Event // alerts about circuits, on their way out

	base     context.Context // of work: outlives the signal
	fetching context.Context // ends when the worker is told to stop
	drained  context.Context // ends when the drain time is up
	giveBack context.CancelCauseFunc
	tasks    sync.WaitGroup

	hands   sync.WaitGroup // goroutines that process deliveries
	next    chan *task     // to one that rests
	resting atomic.Int32
	rest    chan struct{} // closed when there is nothing more to process

	mu       sync.Mutex
	draining bool
	// drainTimer cancels what outlives the drain time; nil before the drain.
	drainTimer *time.Timer
	busy       int
	running    map[string]*task
	health     map[string]error // by queue
}

// storeTimeout is one round trip to a bucket; a node's election takes longer
// and is waited out by trying again.
const storeTimeout = 2 * time.Second

// errDrained is the cause with which sessions end that outlive the drain time.
var errDrained = errors.New("the worker stops and the drain time is up")

// New prepares a worker; Run starts it.
func New(ctx context.Context, o Options) (*Worker, error) {
	if o.SettleTimeout == 0 {
		o.SettleTimeout = settleTimeout
	}
	if o.AlonePatience == 0 {
		o.AlonePatience = alonePatience
	}
	w := &Worker{
		o: o, log: o.Logger,
		publisher: NewPublisher(o.JS, o.Names, o.Name, o.Logger),
		asks:      &asker{nc: o.NC, subject: o.Names.WorkerSubject},
		gate:      newGate(o.Concurrency),
		leftovers: semaphore.NewWeighted(int64(o.Concurrency)),
		told:      make(chan Event, 64),
		next:      make(chan *task),
		rest:      make(chan struct{}),
		running:   make(map[string]*task),
		health:    make(map[string]error),
	}
	var err error
	if w.store, err = NewStore(o.JS, o.State, storeTimeout); err != nil {
		return nil, err
	}
	status, err := o.State.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", o.State.Bucket(), err)
	}
	w.refresh = status.TTL() / 2
	shared, err := NewStore(o.JS, o.Fleet, storeTimeout)
	if err != nil {
		return nil, err
	}
	w.slots, err = newSlots(ctx, SlotsConfig{
		JS: o.JS, Stream: o.SlotsStream, Prefix: o.SlotsPrefix, Limits: o.MaxSessions,
		Concurrency: o.Concurrency, Window: o.AckWait, Worker: o.ID, Random: o.Random,
	}, shared, w.asks, o.Logger)
	if err != nil {
		return nil, err
	}
	o.AckWait = w.slots.window // its consumers may have a shorter one
	w.o.AckWait = o.AckWait
	w.circuits = NewCircuits(shared, o.Circuit, o.ID, o.Now, o.Random, w.circuitChanged)
	w.fleet = newFleet(o.Fleet, shared, w.circuits, w.presence(), o.AckWait, o.Now, o.Logger)
	w.fleet.busy = w.inHand
	w.asks.heard = w.fleet.heardOf
	w.alerts = &Alerts{
		js: o.JS, stream: o.Events.CachedInfo().Config.Name, errors: o.Names.AllErrors(), config: o.Alerts, codes: w.alerting(),
		store: shared, told: w.wasTold, publish: w.publisher.publish, worker: o.Name, log: o.Logger,
		raised: func(code errors.Code) { o.Observer.Alerted(AlertRecurring, code) },
	}
	if w.leases, err = NewLeases(o.NC, o.AckWait, o.Observer.LeaseExtended, o.Logger); err != nil {
		return nil, err
	}
	w.leases.Heard(time.Now())
	w.fleet.heard = w.leases.Heard
	w.slots.leases, w.slots.peers = w.leases, w.fleet.size
	w.pull = newPuller(o.Queues, o.Concurrency, o.AckWait, w.handle, o.Logger, o.Consumer, w.setHealth)
	return w, nil
}

func (w *Worker) presence() Presence {
	queues := make(map[string]int, len(w.o.Queues))
	for _, q := range w.o.Queues {
		queues[q.Name] = q.Weight
	}
	return Presence{
		Worker: w.o.Name, WorkerID: w.o.ID, Version: w.o.Version, StartedAt: w.o.Now().UTC(),
		Queues: queues, Slots: w.o.Concurrency,
	}
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
// returns when everything is settled.
func (w *Worker) Run(ctx context.Context) error {
	w.base, w.fetching = context.WithoutCancel(ctx), ctx
	w.drained, w.giveBack = context.WithCancelCause(w.base)
	defer w.giveBack(nil)
	w.count(0) // until the first job nobody else says that all places are free
	answering, err := answers(w.o.NC, w.o.Names.WorkerSubject(w.o.ID), w.hasJob, w.slots.holds)
	if err != nil {
		return err
	}
	control, err := w.serveControl(ctx)
	if err != nil {
		return errors.Join(err, answering.Unsubscribe())
	}
	background, stop := context.WithCancel(w.base)
	var others sync.WaitGroup
	others.Go(func() { w.fleet.run(background) })
	others.Go(func() { w.alerts.run(background) })
	others.Go(func() { w.tell(background) })

	ending := make(chan struct{})
	context.AfterFunc(ctx, func() { defer close(ending); w.stopTaking() })
	w.pull.run(ctx)
	<-ending
	w.drain()
	close(w.rest)
	w.hands.Wait()

	control.close()
	stop()
	others.Wait()
	w.leases.Close()
	if err := answering.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		return err
	}
	return nil
}

// stopTaking marks the worker as draining: what still arrives is handed back,
// and the drain time runs.
func (w *Worker) stopTaking() {
	w.mu.Lock()
	w.draining = true
	w.drainTimer = time.AfterFunc(w.o.Drain, func() { w.giveBack(errDrained) })
	w.mu.Unlock()
	w.fleet.drain()
	w.log.Info().Dur("drain_timeout", w.o.Drain).Int("running", w.Running()).Msg("draining: no new jobs; sessions may finish")
}

func (w *Worker) isDraining() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.draining
}

// drain waits for the sessions; they are cancelled when the time is up.
func (w *Worker) drain() {
	w.tasks.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drainTimer.Stop()
}

// Reconnected is to be called when the connection to NATS is back.
func (w *Worker) Reconnected() {
	w.asks.reconnected(time.Now())
	w.fleet.tell() // leases depend on having been heard
}

// Ready says why the worker is not able to take jobs; nil: it is.
func (w *Worker) Ready() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.draining {
		return errors.New("draining")
	}
	for queue, err := range w.health {
		if err != nil {
			return fmt.Errorf("queue %s is not being served: %w", queue, err)
		}
	}
	return nil
}

// Running tells how many jobs are in hand.
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

// hasJob answers other workers.
func (w *Worker) hasJob(jobID string) bool { return w.task(jobID) != nil }

func (w *Worker) task(jobID string) *task {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running[jobID]
}

// register makes the task the one that has the job here; false: another has it.
func (w *Worker) register(t *task) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running[t.id.ID] != nil {
		return false
	}
	w.running[t.id.ID] = t
	return true
}

func (w *Worker) deregister(t *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running[t.id.ID] == t {
		delete(w.running, t.id.ID)
	}
}

func lastToken(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }
