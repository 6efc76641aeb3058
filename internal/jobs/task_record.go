package jobs

import (
	"context"

	"avatarworker/internal/errors"
)

// next is a copy of r to be changed and written; a new record where there is
// none.
func (t *task) next(r *Record) *Record {
	if r != nil {
		return r.clone()
	}
	next := &Record{CreatedAt: t.w.o.Now().UTC(), JobID: t.id.ID, Run: t.id.Run, StreamSeq: t.id.StreamSeq, Queue: t.id.Queue}
	if t.job != nil {
		next.identify(t.job, t.w.limits())
	}
	return next
}

// put writes next in place of the record that was read last.
func (t *task) put(ctx context.Context, next *Record) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	return t.write(ctx, next)
}

// write is put for who holds t.writing.
func (t *task) write(ctx context.Context, next *Record) error {
	next.UpdatedAt = t.w.o.Now().UTC()
	t.mu.Lock()
	revision := t.revision
	t.mu.Unlock()
	revision, err := t.w.store.Put(ctx, t.id.ID, next, revision)
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.record, t.revision = next, revision
	t.mu.Unlock()
	return nil
}

// note changes the record in memory: the next write takes the change along.
func (t *task) note(f func(*Record)) {
	t.writing.Lock()
	defer t.writing.Unlock()
	next := t.current().clone()
	f(next)
	t.mu.Lock()
	t.record = next
	t.mu.Unlock()
}

// keep writes next although others may have written meanwhile, as long as the
// job is still this worker's: a wish to cancel is kept. errSuperseded: it is
// somebody else's now.
func (t *task) keep(ctx context.Context, next *Record) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	return t.overwrite(ctx, next)
}

// overwrite is keep for who holds t.writing.
func (t *task) overwrite(ctx context.Context, next *Record) error {
	wished := next.CancelRequested
	for stale := 0; ; {
		err := t.write(ctx, next)
		if err == nil && next.CancelRequested && !wished {
			t.end(errCancelled) // now that what was reached is written down
		}
		if !errors.Is(err, ErrConflict) {
			return err
		}
		var now Record
		revision, err := t.w.store.Get(ctx, t.id.ID, &now)
		if err != nil {
			return err
		}
		if now.Run != next.Run || now.Session != next.Session || now.WorkerID != next.WorkerID || now.State.Final() || now.State == StateReleased {
			return errSuperseded
		}
		next.CancelRequested = next.CancelRequested || now.CancelRequested
		if t.newer(revision) {
			continue
		}
		// A leader that was elected just now may answer before it has all.
		if stale++; stale > maxStale {
			return ErrConflict
		}
		if err := pause(ctx, storePause, ErrConflict); err != nil {
			return err
		}
	}
}

// newer takes a revision over that was read after a conflict; false: it is not
// newer than what conflicted.
func (t *task) newer(revision uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if revision <= t.revision {
		return false
	}
	t.revision = revision
	return true
}

// change applies f to the record of a session that runs.
func (t *task) change(ctx context.Context, f func(*Record)) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	next := t.current().clone()
	f(next)
	err := t.overwrite(ctx, next)
	if errors.Is(err, errSuperseded) {
		t.end(errSuperseded)
	}
	return err
}

// load reads the job's record; nil: there is none.
func (t *task) load(ctx context.Context) (*Record, error) {
	record := new(Record)
	revision, err := t.w.store.Get(ctx, t.id.ID, record)
	if err != nil {
		return nil, err
	}
	if revision == 0 {
		record = nil
	}
	t.mu.Lock()
	t.record, t.revision = record, revision
	t.mu.Unlock()
	return record, nil
}
