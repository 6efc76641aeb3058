package jobs

import (
	"context"
	"sync"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

// errSuperseded: another worker has taken the job over.
var errSuperseded = errors.New("another worker has taken the job over")

// recordHandle owns the record of one job while a delivery of it is processed:
// the record as last read or written, its revision, and the lock for both.
type recordHandle struct {
	store *kv.Store
	jobID string
	now   func() time.Time // by the server's clock
	// cancelSeen is called when a write finds that the job is to be cancelled.
	cancelSeen func()

	writing sync.Mutex // held from reading the record to having written it

	mu       sync.Mutex        // guards what follows, never held while waiting
	record   *lifecycle.Record // nil: there is none
	revision uint64
}

// current returns the record as last read or written; nil: there is none. It is
// not to be changed.
func (h *recordHandle) current() *lifecycle.Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.record
}

func (h *recordHandle) set(r *lifecycle.Record, revision uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.record, h.revision = r, revision
}

// load reads the job's record; nil: there is none.
func (h *recordHandle) load(ctx context.Context) (*lifecycle.Record, error) {
	record := new(lifecycle.Record)
	revision, err := h.store.Get(ctx, h.jobID, record)
	if err != nil {
		return nil, err
	}
	if revision == 0 {
		record = nil
	}
	h.set(record, revision)
	return record, nil
}

// put writes next in place of the record that was read last.
func (h *recordHandle) put(ctx context.Context, next *lifecycle.Record) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	return h.write(ctx, next)
}

// write is put for a caller that holds h.writing.
func (h *recordHandle) write(ctx context.Context, next *lifecycle.Record) error {
	next.UpdatedAt = h.now()
	h.mu.Lock()
	revision := h.revision
	h.mu.Unlock()
	revision, err := h.store.Put(ctx, h.jobID, next, revision)
	if err != nil {
		return err
	}
	h.set(next, revision)
	return nil
}

// updateLocal changes the record in memory: the next write takes the change
// along.
func (h *recordHandle) updateLocal(f func(*lifecycle.Record)) {
	h.writing.Lock()
	defer h.writing.Unlock()
	next := h.current().Clone()
	f(next)
	h.mu.Lock()
	h.record = next
	h.mu.Unlock()
}

// putFenced writes next although others may have written meanwhile, as long as
// the job is still this session's: a request to cancel is kept. errSuperseded:
// it is another session's now.
func (h *recordHandle) putFenced(ctx context.Context, next *lifecycle.Record) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	return h.overwrite(ctx, next)
}

// change applies f to the record of a session that runs, and writes it.
func (h *recordHandle) change(ctx context.Context, f func(*lifecycle.Record)) error {
	h.writing.Lock()
	defer h.writing.Unlock()
	next := h.current().Clone()
	f(next)
	return h.overwrite(ctx, next)
}

// overwrite is putFenced for a caller that holds h.writing.
func (h *recordHandle) overwrite(ctx context.Context, next *lifecycle.Record) error {
	asked := next.CancelRequested
	for stale := 0; ; {
		err := h.write(ctx, next)
		if err == nil && next.CancelRequested && !asked {
			h.cancelSeen() // now that what was reached is written
		}
		if !errors.Is(err, kv.ErrConflict) {
			return err
		}
		var now lifecycle.Record
		revision, err := h.store.Get(ctx, h.jobID, &now)
		if err != nil {
			return err
		}
		if now.Run != next.Run || now.Session != next.Session || now.WorkerID != next.WorkerID || now.State.Final() || now.State == lifecycle.StateReleased {
			return errSuperseded
		}
		next.CancelRequested = next.CancelRequested || now.CancelRequested
		if h.newer(revision) {
			continue
		}
		// A leader that was just elected may answer before it has everything.
		if stale++; stale > kv.MaxStale {
			return kv.ErrConflict
		}
		if err := retry.Pause(ctx, kv.RetryPause, kv.ErrConflict); err != nil {
			return err
		}
	}
}

// newer takes over a revision that was read after a conflict, and reports
// whether it is newer than the one that conflicted.
func (h *recordHandle) newer(revision uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if revision <= h.revision {
		return false
	}
	h.revision = revision
	return true
}
