package lifecycle

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

// NoteCancel records that a job is to be cancelled, and returns the job's state. It
// leaves the record of a job that has an outcome as it is, and creates one for a job that
// no worker has seen yet. now is the time by the server's clock.
func NoteCancel(ctx context.Context, store *kv.Store, jobID string, now time.Time) (State, error) {
	for {
		record := &Record{JobID: jobID, Run: 1, State: StateReleased, CreatedAt: now}
		revision, err := store.Get(ctx, jobID, record)
		if err != nil || record.State.Final() || record.CancelRequested {
			return record.State, err
		}
		record.RequestCancel(now)
		if _, err = store.Put(ctx, jobID, record, revision); !errors.Is(err, kv.ErrConflict) {
			return record.State, err
		}
	}
}
