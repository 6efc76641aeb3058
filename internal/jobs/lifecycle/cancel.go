package lifecycle

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

// NoteCancel records that a job is to be cancelled, and returns its record. It leaves
// the record of a job that has an outcome as it is, and creates one for a job that no
// worker has seen yet.
func NoteCancel(ctx context.Context, store *kv.Store, jobID string) (*Record, error) {
	for {
		now := time.Now().UTC()
		record := &Record{JobID: jobID, Run: 1, State: StateReleased, CreatedAt: now}
		revision, err := store.Get(ctx, jobID, record)
		if err != nil || record.State.Final() || record.CancelRequested {
			return record, err
		}
		record.RequestCancel(now)
		if _, err = store.Put(ctx, jobID, record, revision); !errors.Is(err, kv.ErrConflict) {
			return record, err
		}
	}
}
