package operate

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/topology"
)

// Draining is a worker's reply to a request to drain.
type Draining struct {
	WorkerID string `json:"worker_id"`
	Running  int    `json:"running"` // slots in use
}

// ErrNoWorker is in the chain of an error about a worker that did not reply.
var ErrNoWorker = errors.New("no worker of this id or name answers")

// drainTimeout bounds the wait for the worker's reply.
const drainTimeout = 5 * time.Second

// Drain asks a worker to drain, as SIGTERM does. The worker has drained when Empty
// returns. If no worker replies, the error has ErrNoWorker in its chain.
func (o *Operator) Drain(ctx context.Context, workerID string) (Draining, error) {
	asking, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	msg, err := o.nc.RequestWithContext(asking, o.names.WorkerDrain(workerID), nil)
	switch {
	case err == nil:
	case ctx.Err() == nil && (errors.Is(err, nats.ErrNoResponders) || errors.Is(err, context.DeadlineExceeded)):
		return Draining{}, fmt.Errorf("worker %s: %w: 'avatarworker status' lists the workers", workerID, ErrNoWorker)
	default:
		return Draining{}, fmt.Errorf("worker %s: %w", workerID, err)
	}
	var d Draining
	if err := json.Unmarshal(msg.Data, &d); err != nil || d.WorkerID == "" {
		return d, fmt.Errorf("worker %s: its reply is not one to a drain: %.200q", workerID, msg.Data)
	}
	return d, nil
}

// Empty returns when the worker's lease is gone: it has ended and settled or handed back
// its jobs, or the lease has expired and other workers may take them.
func (o *Operator) Empty(ctx context.Context, workerID string) error {
	watcher, err := o.state.Watch(ctx, lease.Prefix+topology.Token(workerID))
	if err != nil {
		return fmt.Errorf("lease of worker %s: %w", workerID, err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	seen := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case entry, open := <-watcher.Updates():
			switch {
			case !open:
				return fmt.Errorf("lease of worker %s: the connection to NATS was lost", workerID)
			case entry == nil && !seen: // all there is
				return nil
			case entry != nil && entry.Operation() != jetstream.KeyValuePut:
				return nil
			case entry != nil:
				seen = true
			}
		}
	}
}
