package operate

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/topology"
)

// Draining is a worker's answer to a request to drain.
type Draining struct {
	WorkerID string `json:"worker_id"`
	Running  int    `json:"running"` // jobs in hand
}

// ErrNoWorker is in the chain of an error about a worker that did not answer.
var ErrNoWorker = errors.New("no worker of this id answers")

// drainTime bounds the wait for the worker's answer.
const drainTime = 5 * time.Second

// Drain asks a worker to drain, as SIGTERM would. It is drained when Empty returns.
func (o *Operator) Drain(ctx context.Context, workerID string) (Draining, error) {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	msg, err := o.nc.RequestWithContext(ctx, o.names.WorkerDrain(workerID), nil)
	if err != nil {
		return Draining{}, fmt.Errorf("worker %s: %w: 'avatarworker status' lists the workers (%w)", workerID, ErrNoWorker, err)
	}
	var d Draining
	if err := json.Unmarshal(msg.Data, &d); err != nil || d.WorkerID == "" {
		return d, fmt.Errorf("worker %s: its answer is not one to a drain: %.200q", workerID, msg.Data)
	}
	return d, nil
}

// Empty returns when the worker has ended in good order, or its lease has run out:
// all it had is settled or handed back, or free for others.
func (o *Operator) Empty(ctx context.Context, workerID string) error {
	watcher, err := o.state.Watch(ctx, lease.Prefix+topology.Token(workerID))
	if err != nil {
		return fmt.Errorf("lease of worker %s: %w", workerID, err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	stands := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case entry, open := <-watcher.Updates():
			switch {
			case !open:
				return fmt.Errorf("lease of worker %s: the connection to NATS was lost", workerID)
			case entry == nil && !stands: // all there is
				return nil
			case entry != nil && entry.Operation() != jetstream.KeyValuePut:
				return nil
			case entry != nil:
				stands = true
			}
		}
	}
}
