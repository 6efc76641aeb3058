package budget

import (
	"context"
	"maps"
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// reservations is the value of a key: the sessions that workers run under it.
type reservations struct {
	Running map[string]int `json:"running"`
	// Upto is the sequence of the usage record up to which everything is recorded
	// that sessions no longer in Running have cost.
	Upto uint64 `json:"upto"`
}

func (r reservations) all() (n int64) {
	for _, running := range r.Running {
		n += int64(running)
	}
	return n
}

// Reserve reserves one session under each budget of the job. release is to be called
// once, after what the session cost is in the ledger. A refusal is not an error.
func (b *Budgets) Reserve(ctx context.Context, job Job) (release func(), refusal *Refusal, err error) {
	if b == nil {
		return func() {}, nil, nil
	}
	worker := b.o.Worker()
	var held []string
	release = func() {
		if len(held) > 0 {
			b.wg.Go(func() { b.giveBack(held, worker) })
		}
	}
	for _, key := range b.keys() {
		value, ok := job.Value(key)
		if !ok {
			continue
		}
		name := Prefix + topology.Token(key) + "." + topology.Token(value)
		refusal, err := b.reserve(ctx, name, key, job, worker)
		switch {
		case err != nil:
			release()
			return nil, nil, err
		case refusal != nil: // at once: another job may start on what this one does not need
			b.giveBack(held, worker)
			return nil, refusal, nil
		}
		held = append(held, name)
	}
	return release, nil, nil
}

// keys lists what budgets are for, once each.
func (b *Budgets) keys() []string {
	var keys []string
	for _, r := range b.o.Rules {
		if !slices.Contains(keys, r.Key) {
			keys = append(keys, r.Key)
		}
	}
	return keys
}

// followTimeout bounds the wait for the usage records that others have written.
const followTimeout = 5 * time.Second

// followPause is the wait after which it is checked whether such records exist.
const followPause = 200 * time.Millisecond

func (b *Budgets) reserve(ctx context.Context, name, key string, job Job, worker string) (*Refusal, error) {
	for {
		refusal, err := b.tryReserve(ctx, name, key, job, worker)
		if !errors.Is(err, kv.ErrConflict) {
			return refusal, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

func (b *Budgets) tryReserve(ctx context.Context, name, key string, job Job, worker string) (*Refusal, error) {
	b.writing.Lock()
	defer b.writing.Unlock()
	var r reservations
	revision, err := b.o.State.Get(ctx, name, &r)
	if err != nil {
		return nil, err
	}
	if err := b.followed(ctx, r.Upto); err != nil {
		return nil, err
	}
	if b.refused(job, key, r) != nil && len(r.Running) > 0 {
		if err := b.dropLost(ctx, &r); err != nil {
			return nil, err
		}
	}
	if refusal := b.refused(job, key, r); refusal != nil {
		return refusal, nil
	}
	if r.Running == nil {
		r.Running = make(map[string]int)
	}
	r.Running[worker]++
	_, err = b.o.State.Put(ctx, name, r, revision)
	return nil, err
}

func (b *Budgets) refused(job Job, key string, r reservations) *Refusal {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.refusal(job, key, r.all())
}

// dropLost drops the reservations of workers whose lease is gone.
func (b *Budgets) dropLost(ctx context.Context, r *reservations) error {
	for _, worker := range slices.Sorted(maps.Keys(r.Running)) {
		valid, err := b.o.LeaseValid(ctx, worker)
		if err != nil {
			return err
		}
		if !valid {
			delete(r.Running, worker)
		}
	}
	return nil
}

// followed waits until what was set is known, and the usage records have been followed
// to a sequence.
func (b *Budgets) followed(ctx context.Context, seq uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, followTimeout, errBehind)
	defer cancel()
	look := time.NewTimer(followPause)
	defer look.Stop()
	for {
		b.mu.Lock()
		known, upto, changed, fault := b.known(), b.seq, b.changed, b.fault
		b.mu.Unlock()
		switch {
		case known && upto >= seq:
			return nil
		case fault != nil:
			return fault
		}
		select {
		case <-changed:
		case <-look.C:
			if known && b.remade(ctx, seq) {
				return nil
			}
			look.Reset(followPause)
		case <-ctx.Done():
			b.unknown(context.Cause(ctx))
			return context.Cause(ctx)
		}
	}
}

// remade reports whether the stream of usage records has no such sequence any more, and
// everything in it has been followed.
func (b *Budgets) remade(ctx context.Context, seq uint64) bool {
	stream, err := b.o.JS.Stream(ctx, b.o.Names.UsageStream())
	if err != nil {
		return false
	}
	last := stream.CachedInfo().State.LastSeq
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.listed && last < seq && b.seq >= last
}

var errBehind = errors.New("what budgets have left is not known: the usage records could not be read in time")

// giveBack removes a session's reservations. If that can't be written, they count until
// the worker's lease is gone.
func (b *Budgets) giveBack(names []string, worker string) {
	for _, name := range names {
		err := retry.Until(b.life, retry.Backoff{Initial: kv.RetryPause / 10, Max: time.Second}, nil, func() error {
			b.writing.Lock()
			defer b.writing.Unlock()
			var r reservations
			revision, err := b.o.State.Get(b.life, name, &r)
			if err != nil || r.Running[worker] == 0 { // its lease was lost meanwhile
				return err
			}
			if r.Running[worker]--; r.Running[worker] == 0 {
				delete(r.Running, worker)
			}
			r.Upto = max(r.Upto, b.o.Written())
			_, err = b.o.State.Put(b.life, name, r, revision)
			return err
		})
		if err != nil {
			b.o.Log.Warn().Err(err).Str("key", name).Msg("could not give a budget's reservation back; it ends with this worker's lease")
		}
	}
}
