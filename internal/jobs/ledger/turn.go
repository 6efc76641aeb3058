package ledger

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// turnKey is the key in the bucket of job records that names the worker which adds
// usage records to the counters. No job id has a dot.
const turnKey = "totals.worker"

// addEvery is how long usage records are gathered before they are added to the
// counters.
const addEvery = time.Second

// turn is the value of turnKey.
type turn struct {
	WorkerID string `json:"worker_id"`
}

// AdderOptions configure what adds usage records to the counters. All are required.
type AdderOptions struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Labels []string      // by which days and months are added up, sorted
	Window time.Duration // for which a lease lasts
	Worker func() string // the id of the worker's lease; "" while it has none
	// LeaseValid reports whether the lease of a worker is valid.
	LeaseValid func(ctx context.Context, workerID string) (bool, error)
	// Added is called with whether records could be added.
	Added func(ok bool)
	Log   zerolog.Logger
}

// NewAdder returns what adds usage records to the counters, in one worker of the
// fleet for as long as its lease is valid. It needs a Ledger.
func (w *Writer) NewAdder(o AdderOptions) *usage.Adder {
	return usage.NewAdder(usage.AdderOptions{
		JS: o.JS, Names: o.Names, Labels: o.Labels, Every: addEvery, TurnEvery: o.Window / 2, Own: w.o.Ledger.Own,
		Turn: func(ctx context.Context) (bool, error) { return takeTurn(ctx, w.o.Bucket, o.Worker(), o.LeaseValid) },
		Result: func(err error) {
			o.Added(err == nil)
			if err != nil {
				o.Log.Warn().Err(err).Msg("can't add usage records to the counters; trying again. Sums are right all the same: they read what is missing from the records")
			}
		},
		Foreign: func(err error) {
			o.Log.Warn().Err(err).Msg("ignoring a message in the stream of usage records that is not one")
		},
	})
}

// takeTurn reports whether it is the worker with that id that adds, and makes it the
// one if the lease of the one before is no longer valid. Without an id it is
// usage.ErrNotYet.
func takeTurn(ctx context.Context, bucket Bucket, own string, leaseValid func(context.Context, string) (bool, error)) (bool, error) {
	if own == "" {
		return false, usage.ErrNotYet
	}
	var now turn
	revision, err := bucket.Get(ctx, turnKey, &now)
	if err != nil || now.WorkerID == own {
		return err == nil, err
	}
	if now.WorkerID != "" {
		if valid, err := leaseValid(ctx, now.WorkerID); valid || err != nil {
			return false, err
		}
	}
	_, err = bucket.Put(ctx, turnKey, turn{own}, revision)
	if errors.Is(err, kv.ErrConflict) {
		return false, nil // another worker was quicker
	}
	return err == nil, err
}
