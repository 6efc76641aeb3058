// Package operate changes jobs, queues, circuits and workers for operators. Each change
// is one compare-and-set, one call to the JetStream API or one request, so it is safe
// while workers and other operators change the same things, and it can be repeated. It
// owns the statuses that answer an operator. It must not know who asks: commands and
// pages use it alike.
package operate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

// storeTimeout bounds one round trip to a bucket.
const storeTimeout = 5 * time.Second

// Operator makes an operator's changes. It is safe for concurrent use.
type Operator struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names
	records *kv.Store
	state   jetstream.KeyValue
	jobs    jetstream.Stream
	status  *status.Store
	offset  time.Duration // the server's clock minus the local one
}

// Open opens the jobs stream and the bucket of records. If one does not exist, the
// error has jetstream.ErrStreamNotFound or jetstream.ErrBucketNotFound in its chain.
func Open(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, names topology.Names) (*Operator, error) {
	jobs, err := js.Stream(ctx, names.JobsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", names.JobsStream(), err)
	}
	state, err := js.KeyValue(ctx, names.StateBucket())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", names.StateBucket(), err)
	}
	o := &Operator{nc: nc, js: js, names: names, records: kv.NewStore(js, state, storeTimeout), state: state, jobs: jobs}
	o.status = status.NewStore(js, names, o.now, 0)
	if at := jobs.CachedInfo().TimeStamp; !at.IsZero() {
		o.offset = time.Until(at)
	}
	return o, nil
}

// WithBudgets sets what reads the budgets and how connected time is counted in credits, and
// returns the Operator. Without it no budget keeps a job from being delivered.
func (o *Operator) WithBudgets(b status.Budgets, t usage.Tariff) *Operator {
	o.status.WithTariff(t)
	if b != nil {
		o.status.WithBudgets(kept(b))
	}
	return o
}

// budgetsFor is how long budgets that were read are good for: a command that retries many
// jobs asks for each of them.
const budgetsFor = time.Second

// kept keeps what was read for budgetsFor.
func kept(read status.Budgets) status.Budgets {
	var (
		mu   sync.Mutex
		list []budget.Spending
		at   time.Time
	)
	return func(ctx context.Context) (_ []budget.Spending, err error) {
		mu.Lock()
		defer mu.Unlock()
		if at.IsZero() || time.Since(at) > budgetsFor {
			if list, err = read(ctx); err != nil {
				at = time.Time{}
				return nil, err
			}
			at = time.Now()
		}
		return list, nil
	}
}

// now is the time by the server's clock.
func (o *Operator) now() time.Time { return time.Now().Add(o.offset).UTC() }

// Circuits returns the operator of the fleet's circuits.
func (o *Operator) Circuits(ctx context.Context) (circuit.Operator, error) {
	bucket, err := o.js.KeyValue(ctx, o.names.FleetBucket())
	if err != nil {
		return circuit.Operator{}, fmt.Errorf("bucket %s: %w", o.names.FleetBucket(), err)
	}
	return circuit.Operator{Store: kv.NewStore(o.js, bucket, storeTimeout), Bucket: bucket, Now: o.now}, nil
}

// OpenCircuits lists the circuits of the app that are not closed, as
// circuit.Operator.NotClosed does.
func (o *Operator) OpenCircuits(ctx context.Context, app string, region *string) ([]circuit.Circuit, error) {
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return nil, err
	}
	return circuits.NotClosed(ctx, app, region)
}

// CloseCircuit closes a circuit, as circuit.Operator.Close does.
func (o *Operator) CloseCircuit(ctx context.Context, app, region string) (circuit.Circuit, error) {
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return circuit.Circuit{}, err
	}
	return circuits.Close(ctx, app, region)
}

// openCircuit returns the circuit that holds the app's jobs in that region, or nil if
// none does.
func (o *Operator) openCircuit(ctx context.Context, circuits circuit.Operator, app, region string) (*circuit.Circuit, error) {
	list, err := circuits.NotClosed(ctx, app, nil)
	if err != nil {
		return nil, fmt.Errorf("circuits of app %s: %w", app, err)
	}
	for _, c := range list {
		if c.App == app && (c.Region == region || c.Region == "") {
			return &c, nil
		}
	}
	return nil, nil //nolint:nilnil // none is open, which is not an error
}

// Paused returns the end of a queue's pause, or the zero time if it is not paused.
func (o *Operator) Paused(ctx context.Context, queue string) (time.Time, error) {
	consumer, err := o.jobs.Consumer(ctx, queue)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return time.Time{}, fmt.Errorf("queue %s: %w", queue, ErrNoQueue)
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("queue %s: %w", queue, err)
	}
	info := consumer.CachedInfo()
	if !info.Paused || info.Config.PauseUntil == nil {
		return time.Time{}, nil
	}
	return info.Config.PauseUntil.UTC(), nil
}

// ErrNoQueue is in the chain of an error about a queue that has no consumer, because no
// worker has served it yet.
var ErrNoQueue = errors.New("not found: no worker has served this queue yet; 'avatarworker queue ls' lists the queues")

// Forever is the length of a pause that ends only with Resume.
const Forever = 100 * 365 * 24 * time.Hour

// Pause stops the deliveries of a queue for that long, including those of jobs that wait
// for a retry. Running jobs go on. It returns the end of the pause. A queue that is paused
// already gets the new end.
func (o *Operator) Pause(ctx context.Context, queue string, d time.Duration) (time.Time, error) {
	until := o.now().Add(d)
	_, err := o.js.PauseConsumer(ctx, o.names.JobsStream(), queue, until)
	return until, queueError(queue, err)
}

// Resume ends a pause. It reports whether the queue was paused.
func (o *Operator) Resume(ctx context.Context, queue string) (was bool, err error) {
	until, err := o.Paused(ctx, queue)
	if err != nil || until.IsZero() {
		return false, err
	}
	_, err = o.js.ResumeConsumer(ctx, o.names.JobsStream(), queue)
	return true, queueError(queue, err)
}

func queueError(queue string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		return fmt.Errorf("queue %s: %w", queue, ErrNoQueue)
	default:
		return fmt.Errorf("queue %s: %w", queue, err)
	}
}
