package lifecycle

import (
	"context"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

// NoteCancel records that a job is to be cancelled, and returns the job's state. It
// creates the record of a job that no worker has seen yet. If the job has an outcome
// and was replayed, the record says that the run that waits is to be cancelled, and the
// state is StateReleased; without such a run the record is left as it is. now is the time
// by the server's clock.
func NoteCancel(ctx context.Context, store *kv.Store, jobID string, now time.Time) (State, error) {
	for {
		record := &Record{JobID: jobID, Run: 1, State: StateReleased, CreatedAt: now}
		revision, err := store.Get(ctx, jobID, record)
		if err != nil {
			return record.State, err
		}
		state, noted := record.State, record.CancelRequested
		if state.Final() {
			later, err := record.LaterRun(ctx, store)
			if err != nil || later.Run == 0 {
				return state, err
			}
			state, noted = StateReleased, record.CancelThrough >= later.Run
			record.CancelThrough = later.Run
		} else {
			record.RequestCancel(now)
		}
		if noted {
			return state, nil
		}
		if _, err = store.Put(ctx, jobID, record, revision); !errors.Is(err, kv.ErrConflict) {
			return state, err
		}
	}
}
