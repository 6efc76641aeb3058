package jobs

import (
	"context"
	"encoding/json"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

const (
	// presenceKept is when a worker that said nothing is taken off the list.
	presenceKept = 30 * presenceFresh
	// presenceMark is how long the mark of a worker that left is kept, for those
	// who watch.
	presenceMark = time.Minute
)

// peer is another worker.
type peer struct {
	Presence
	revision uint64
	stored   time.Time // by the server's clock
	seen     time.Time // the same moment by this process's; zero: not known yet
}

// age is the time since the peer last told of itself.
func (p peer) age() time.Duration {
	if p.seen.IsZero() {
		return 0
	}
	return time.Since(p.seen)
}

func (p peer) fresh() bool { return p.age() < presenceFresh }

// serverClock tells the age of what was stored before this worker listened,
// without any worker's wall clock: from the time that the server gave to what
// this one stored itself.
type serverClock struct {
	stored time.Time // by the server
	seen   time.Time // here
}

// seenAt is the moment, here, at which the server's clock showed stored: now at
// the latest. Zero: not known yet.
func (c serverClock) seenAt(stored, now time.Time) time.Time {
	if c.seen.IsZero() {
		return time.Time{}
	}
	at := c.seen.Add(stored.Sub(c.stored))
	if at.After(now) {
		return now
	}
	return at
}

// heardOf tells whether there was news of the worker within a lease's window. A
// worker holds no lease for longer than that after its last news was stored (see
// Leases), so from then on it may be taken for lost; before, it may only be cut
// off. Waiting costs the jobs of one that died a third of a window at most: the
// server delivers them again a window after their last extension. Of a worker
// that is not on the list this one could have heard only since it began.
func (f *fleet) heardOf(ctx context.Context, workerID string) bool {
	select {
	case <-f.synced:
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	silent := time.Since(f.begun)
	if other, ok := f.others[presenceKey(workerID)]; ok {
		silent = other.age()
	}
	return silent < f.window
}

func (f *fleet) learnPresence(key string, entry jetstream.KeyValueEntry, news bool) {
	next := peer{revision: entry.Revision(), stored: entry.Created()}
	gone := entry.Operation() != jetstream.KeyValuePut || json.Unmarshal(entry.Value(), &next.Presence) != nil
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case gone:
		delete(f.others, key)
		return
	case f.others[key].revision == next.revision: // told again by a new watch
		return
	case news:
		next.seen = time.Now()
	default:
		next.seen = f.clock.seenAt(next.stored, time.Now())
	}
	f.others[key] = next
}

// sync takes in more of what is needed to tell who was there at the start, and
// how long ago.
func (f *fleet) sync(learn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	learn()
	for key, other := range f.others {
		if other.seen.IsZero() {
			other.seen = f.clock.seenAt(other.stored, time.Now())
			f.others[key] = other
		}
	}
	if !f.listed || f.clock.seen.IsZero() {
		return
	}
	select {
	case <-f.synced:
	default:
		close(f.synced)
	}
}

// sweep takes workers off the list that died long ago. Whoever sees it first
// does it for all.
func (f *fleet) sweep(ctx context.Context) {
	for key, revision := range f.longSilent() {
		err := f.strike(ctx, key, jetstream.LastRevision(revision))
		if err != nil && !conflicts(err) {
			f.log.Debug().Err(err).Str("key", key).Msg("could not sweep a worker that is gone; trying again")
			return
		}
		f.mu.Lock()
		if f.others[key].revision == revision {
			delete(f.others, key)
		}
		f.mu.Unlock()
	}
}

func (f *fleet) longSilent() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	var silent map[string]uint64
	for key, other := range f.others {
		if other.age() > presenceKept {
			if silent == nil {
				silent = make(map[string]uint64)
			}
			silent[key] = other.revision
		}
	}
	return silent
}

// strike takes a worker off the list. The mark that this leaves goes away by
// itself, where the bucket can do that: one made by others may not.
func (f *fleet) strike(ctx context.Context, key string, opts ...jetstream.KVDeleteOpt) error {
	ctx, cancel := context.WithTimeout(ctx, f.store.timeout)
	defer cancel()
	err := f.kv.Purge(ctx, key, append(opts, jetstream.PurgeTTL(presenceMark))...)
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == codeMessageTTLDisabled {
		return f.kv.Purge(ctx, key, opts...)
	}
	return err
}

// codeMessageTTLDisabled is the server's answer where messages have no life of
// their own.
const codeMessageTTLDisabled = 10166
