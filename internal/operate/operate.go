// Package operate changes jobs, queues, circuits and workers on an operator's
// behalf. Each change is one compare-and-set, one call of the JetStream API or one
// request, so that it is safe beside workers and other operators, and may be
// repeated.
package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// storeTry bounds one round trip to a bucket.
const storeTry = 5 * time.Second

// Operator is what commands and pages use. It is safe for concurrent use.
type Operator struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names
	records *kv.Store
	state   jetstream.KeyValue
	jobs    jetstream.Stream
	offset  time.Duration // of the server's clock to this one's
}

// Open opens the jobs stream and the bucket of records. now is this machine's
// clock. The error of what is not there has jetstream.ErrStreamNotFound or
// jetstream.ErrBucketNotFound in its chain.
func Open(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, names topology.Names) (*Operator, error) {
	jobs, err := js.Stream(ctx, names.JobsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", names.JobsStream(), err)
	}
	state, err := js.KeyValue(ctx, names.StateBucket())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", names.StateBucket(), err)
	}
	o := &Operator{nc: nc, js: js, names: names, records: kv.NewStore(js, state, storeTry), state: state, jobs: jobs}
	if at := jobs.CachedInfo().TimeStamp; !at.IsZero() {
		o.offset = time.Until(at)
	}
	return o, nil
}

// now is the time by the server's clock.
func (o *Operator) now() time.Time { return time.Now().Add(o.offset).UTC() }

// Circuits returns what changes circuits.
func (o *Operator) Circuits(ctx context.Context) (circuit.Operator, error) {
	bucket, err := o.js.KeyValue(ctx, o.names.FleetBucket())
	if err != nil {
		return circuit.Operator{}, fmt.Errorf("bucket %s: %w", o.names.FleetBucket(), err)
	}
	return circuit.Operator{Store: kv.NewStore(o.js, bucket, storeTry), Bucket: bucket, Now: o.now}, nil
}

// openCircuit returns the circuit that the app's jobs wait for in that region; nil:
// they wait for none.
func (o *Operator) openCircuit(ctx context.Context, circuits circuit.Operator, app, region string) (*circuit.Circuit, error) {
	list, err := circuits.NotClosed(ctx, app, nil)
	if err != nil {
		return nil, fmt.Errorf("circuits of app %s: %w", app, err)
	}
	for _, c := range list {
		if c.Region == region || c.Region == "" {
			return &c, nil
		}
	}
	return nil, nil //nolint:nilnil // none is open, which is not an error
}

// Paused returns until when a queue is paused; the zero time: it is not.
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

// ErrNoQueue is in the chain of an error about a queue that no worker has served
// yet.
var ErrNoQueue = errors.New("there is no such queue: no worker has served it yet")

// Forever is how long a queue is paused that is paused until it is resumed.
const Forever = 100 * 365 * 24 * time.Hour

// Pause stops the deliveries of a queue, those of jobs that wait for a retry
// included, for that long. What runs goes on. It returns until when.
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
