package budget

import (
	"context"
	"maps"
	"slices"
	"sync"
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

// set sets how many sessions a worker runs.
func (r *reservations) set(worker string, n int) {
	switch {
	case n == 0:
		delete(r.Running, worker)
	case r.Running == nil:
		r.Running = map[string]int{worker: n}
	default:
		r.Running[worker] = n
	}
}

// reservation is what a worker has reserved under a key.
type reservation struct{ key, worker string }

// sessions counts those that run under a reservation. It is locked while the key is
// changed here: other keys are not kept waiting.
type sessions struct {
	sync.Mutex

	run  int
	used int // by so many goroutines; guarded by Budgets.mu
}

// lock locks the sessions of a reservation; unlock is to be called once.
func (b *Budgets) lock(own reservation) (s *sessions, unlock func()) {
	b.mu.Lock()
	if s = b.reserved[own]; s == nil {
		s = &sessions{}
		b.reserved[own] = s
	}
	s.used++
	b.mu.Unlock()
	s.Lock()
	return s, func() {
		s.Unlock()
		b.mu.Lock()
		defer b.mu.Unlock()
		if s.used--; s.used == 0 && s.run == 0 {
			delete(b.reserved, own)
		}
	}
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

func (b *Budgets) reserve(ctx context.Context, name, key string, job Job, worker string) (refusal *Refusal, err error) {
	written := false
	for {
		var wrote bool
		refusal, wrote, err = b.tryReserve(ctx, name, key, job, worker)
		written = written || wrote
		if !errors.Is(err, kv.ErrConflict) {
			break
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
			break
		}
	}
	if written && (refusal != nil || err != nil) { // what was written may have landed
		b.wg.Go(func() { b.correct(name, worker, 0) })
	}
	return refusal, err
}

// tryReserve writes how many sessions of this worker run under a key, with one more. A
// write whose answer was lost may be a conflict, so it never counts up what it reads.
func (b *Budgets) tryReserve(ctx context.Context, name, key string, job Job, worker string) (refusal *Refusal, wrote bool, err error) {
	own, unlock := b.lock(reservation{name, worker})
	defer unlock()
	var r reservations
	revision, err := b.o.State.Get(ctx, name, &r)
	if err != nil {
		return nil, false, err
	}
	if err := b.followed(ctx, r.Upto); err != nil {
		return nil, false, err
	}
	r.set(worker, own.run)
	if b.refused(job, key, r) != nil && len(r.Running) > 0 {
		if err := b.dropLost(ctx, &r); err != nil {
			return nil, false, err
		}
	}
	if refusal := b.refused(job, key, r); refusal != nil {
		return refusal, false, nil
	}
	r.set(worker, own.run+1)
	if _, err = b.o.State.Put(ctx, name, r, revision); err == nil {
		own.run++
	}
	return nil, true, err
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

// giveBack removes a session's reservations.
func (b *Budgets) giveBack(names []string, worker string) {
	for _, name := range names {
		b.correct(name, worker, 1)
	}
}

// correct writes how many sessions this worker runs under a key, after so many of them
// have ended. If that can't be written, they count until the worker's lease is gone.
func (b *Budgets) correct(name, worker string, ended int) {
	err := retry.Until(b.life, retry.Backoff{Initial: kv.RetryPause / 10, Max: time.Second}, nil, func() error {
		return b.tryCorrect(name, worker, ended)
	})
	if err != nil {
		b.o.Log.Warn().Err(err).Str("key", name).Msg("could not give a budget's reservation back; it ends with this worker's lease")
	}
}

func (b *Budgets) tryCorrect(name, worker string, ended int) error {
	own, unlock := b.lock(reservation{name, worker})
	defer unlock()
	var r reservations
	revision, err := b.o.State.Get(b.life, name, &r)
	if err != nil {
		return err
	}
	left := own.run - ended
	// Without any its lease was lost meanwhile. A write that is on its way conflicts
	// with this one.
	if now := r.Running[worker]; now != 0 || ended == 0 {
		r.set(worker, min(left, now))
		r.Upto = max(r.Upto, b.o.Written())
		if _, err := b.o.State.Put(b.life, name, r, revision); err != nil {
			return err
		}
	}
	own.run = left
	return nil
}
