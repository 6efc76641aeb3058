package limit

import (
	"context"
	"math/rand/v2"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

// ErrBusy means that enough jobs wait for a limit already; the caller should
// return the job to the queue.
var ErrBusy = errors.New("all sessions that a limit allows are taken")

// cooldown is how long a key stays taken after its session was closed: the
// backend may count a session slightly longer than it takes to close it.
const cooldown = 50 * time.Millisecond

// Acquire waits until it holds one key of each limit that applies to the job, or
// waiting ends. Call release after the session is closed. It returns ErrBusy if
// enough jobs wait already. A job without limits does not wait.
func (l *Limits) Acquire(waiting context.Context, job Job) (release func(), err error) {
	bounds := l.limitsOf(job)
	if len(bounds) == 0 {
		return func() {}, nil
	}
	if release, _, _ = l.tryAcquire(waiting, bounds, job); release != nil {
		return release, nil
	}
	if !l.enqueue(bounds) {
		return nil, ErrBusy
	}
	defer l.dequeue(bounds)
	timer := time.NewTimer(l.o.CheckInterval)
	defer timer.Stop()
	for {
		release, full, changed := l.tryAcquire(waiting, bounds, job)
		if release != nil {
			return release, nil
		}
		select {
		case <-waiting.Done():
			return nil, context.Cause(waiting)
		case <-changed:
		case <-timer.C:
			l.freeExpired(waiting, full.name)
			timer.Reset(l.o.CheckInterval)
		}
	}
}

// tryAcquire takes one key of each limit without waiting. If it can't, it returns
// the limit that is full, and a channel that is closed when that changes.
func (l *Limits) tryAcquire(ctx context.Context, bounds []jobLimit, job Job) (release func(), full jobLimit, changed <-chan struct{}) {
	held := make([]limitKey, 0, len(bounds))
	for _, b := range bounds {
		// Get the channel first, so that a change during the attempt is noticed.
		changed = l.change(b.name)
		p, ok := l.acquireOne(ctx, b, job)
		if !ok {
			// Other jobs could use the keys while this one waits.
			l.release(held, 0)
			return nil, b, changed
		}
		held = append(held, p)
	}
	return func() { l.release(held, cooldown) }, jobLimit{}, nil
}

// acquireOne takes a free key of the limit for this worker. It returns false if
// none is free.
func (l *Limits) acquireOne(ctx context.Context, b jobLimit, job Job) (limitKey, bool) {
	worker := l.o.Worker()
	if worker == "" {
		return limitKey{}, false
	}
	for range b.max {
		h := holder{WorkerID: worker, JobID: job.ID}
		p, before, ok := l.reserve(b, h)
		if !ok {
			return limitKey{}, false
		}
		revision, err := l.o.Store.Put(ctx, p.key(), h, before.revision)
		switch {
		case err == nil:
			h.revision = revision
			failpoint.Here("limit_taken")
			l.setHeld(p, h)
			return p, true
		case !errors.Is(err, kv.ErrConflict):
			l.wg.Go(func() { l.undo(p, h, before.revision) })
			return limitKey{}, false
		}
		l.set(p, before)
		l.refresh(ctx, p, before.revision)
	}
	return limitKey{}, false
}

// reserve picks a free key, so that no other job of this worker tries the same
// one. before is the key's previous holder: a worker whose lease is gone, or
// nothing.
func (l *Limits) reserve(b jobLimit, h holder) (p limitKey, before holder, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.keysOf(b.name)
	if !l.listed || keys.busy >= b.max {
		return limitKey{}, holder{}, false
	}
	first := rand.IntN(b.max) // so that workers rarely try the same key
	for i := range b.max {
		n := (first+i)%b.max + 1
		if before = keys.holders[n]; before.WorkerID == "" {
			h.revision, h.writing = before.revision, true
			keys.set(n, h)
			return limitKey{b.name, n}, before, true
		}
	}
	return limitKey{}, holder{}, false
}

// refresh reads a key that is no longer as it was at a revision: another worker has
// taken or removed it.
func (l *Limits) refresh(ctx context.Context, p limitKey, before uint64) {
	var h holder
	switch revision, err := l.o.Store.Get(ctx, p.key(), &h); {
	case err != nil:
	case revision == 0:
		l.setRemoved(p, before)
	default:
		h.revision = revision
		l.update(p, h)
	}
}

// undo removes a key whose write was not answered in time. It may have landed, or may
// still land: then the key would be this worker's for as long as its lease is valid.
func (l *Limits) undo(p limitKey, h holder, before uint64) {
	revision, err := l.o.Store.Put(l.releaseCtx, p.key(), h, before)
	switch {
	case err == nil:
		h.revision = revision
	case errors.Is(err, kv.ErrConflict): // remove finds out whose it is
		h.revision = before
	default:
		l.warnTaken(p, err)
		return
	}
	l.setHeld(p, h)
	l.remove(p)
}

// release frees keys after the given delay.
func (l *Limits) release(held []limitKey, after time.Duration) {
	if len(held) == 0 {
		return
	}
	l.wg.Go(func() {
		if after > 0 && retry.Pause(l.releaseCtx, after, nil) != nil {
			return
		}
		for _, p := range held {
			l.remove(p)
		}
	})
}

func (l *Limits) remove(p limitKey) {
	l.writing.Lock()
	l.mu.Lock()
	h := l.held[p]
	delete(l.held, p)
	l.mu.Unlock()
	l.writing.Unlock()
	failpoint.Here("limit_removal")
	err := retry.Until(l.releaseCtx, retry.Backoff{Initial: kv.RetryPause / 10, Max: time.Second}, nil, func() error {
		err := l.o.Store.Remove(l.releaseCtx, p.key(), h.revision)
		if !errors.Is(err, kv.ErrConflict) {
			return err
		}
		// It is removed, another worker's, or written later than this worker knows.
		var now holder
		revision, readErr := l.o.Store.Get(l.releaseCtx, p.key(), &now)
		if readErr != nil {
			return readErr
		}
		if now.WorkerID != h.WorkerID || now.JobID != h.JobID {
			l.setRemoved(p, h.revision)
			if now.revision = revision; revision != 0 {
				l.update(p, now)
			}
			return nil
		}
		h.revision = revision
		return err
	})
	if err != nil {
		l.warnTaken(p, err)
		return
	}
	l.setRemoved(p, h.revision)
}

func (l *Limits) warnTaken(p limitKey, err error) {
	l.o.Log.Warn().Err(err).Str("key", p.key()).Msg("could not remove the key of a session limit; it is free once this worker's lease ends")
}

// enqueue counts one more waiting job, and returns false if there are too many. A
// limit gets at most half of MaxWaiting, so that jobs under other limits can wait
// too.
func (l *Limits) enqueue(bounds []jobLimit) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting >= max(1, l.o.MaxWaiting) {
		return false
	}
	for _, b := range bounds {
		if keys := l.keys[b.name]; keys != nil && keys.waiting >= max(1, min(b.max, l.o.MaxWaiting/2)) {
			return false
		}
	}
	l.waiting++
	for _, b := range bounds {
		l.keysOf(b.name).waiting++
	}
	return true
}

func (l *Limits) dequeue(bounds []jobLimit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
	for _, b := range bounds {
		l.keysOf(b.name).waiting--
		l.dropUnused(b.name)
	}
}

// freeExpired frees the limit's keys whose holders' leases are gone. One of the others
// it reads: the watch may have reported that a key was removed before this worker took
// note of who held it.
func (l *Limits) freeExpired(ctx context.Context, limit string) {
	valid := make(map[string]bool)
	read := false
	for n, h := range l.heldByOthers(limit) {
		alive, asked := valid[h.WorkerID]
		if !asked {
			var err error
			if alive, err = l.o.LeaseValid(ctx, h.WorkerID); err != nil {
				return
			}
			valid[h.WorkerID] = alive
		}
		switch p := (limitKey{limit, n}); {
		case !alive:
			l.markFree(p, h.revision)
		case !read:
			read = true
			l.refresh(ctx, p, h.revision)
		}
	}
}

// heldByOthers lists the limit's keys that other workers hold, or none if another
// job has just checked them.
func (l *Limits) heldByOthers(limit string) map[int]holder {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.keysOf(limit)
	if time.Since(keys.checkedAt) < l.o.CheckInterval/2 {
		return nil
	}
	keys.checkedAt = time.Now()
	list := make(map[int]holder, len(keys.holders))
	for n, h := range keys.holders {
		if _, ours := l.held[limitKey{limit, n}]; !ours && h.WorkerID != "" {
			list[n] = h
		}
	}
	return list
}
