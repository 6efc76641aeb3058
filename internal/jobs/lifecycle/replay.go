package lifecycle

import (
	"context"
	"fmt"
	"time"

	"avatarworker/internal/kv"
)

// Claim says which dead letter a run of a job is replayed from. It is written
// before the job is published. So a replay that is repeated finds its own run,
// also when its message has been run and is gone, and another letter of the same
// job takes another run.
type Claim struct {
	Run      int       `json:"run"`
	Letter   uint64    `json:"dead_letter"`
	StoredAt time.Time `json:"stored_at"` // of the letter
	// StreamSeq is the sequence of the published job in the jobs stream; 0: it
	// may not have been published.
	StreamSeq uint64 `json:"stream_seq,omitempty"`
	// At is when it was replayed, and Corrected the digest of the letter's own bytes
	// where another job is published in their place. Until StreamSeq is known they say
	// what was meant.
	At        time.Time `json:"at,omitzero"`
	Corrected string    `json:"corrected,omitempty"`
}

// Claims are those of one job id, oldest first.
type Claims struct {
	Claims []Claim `json:"claims"`
}

// ClaimPrefix precedes a job id in the bucket of records, in the key of its claims. No
// job id has a dot.
const ClaimPrefix = "replay."

// LaterRun returns the claim of the job's last replay, if that is of a later run than
// the record's: the run waits, or is published in a moment. Run 0: there is none.
func (r *Record) LaterRun(ctx context.Context, store *kv.Store) (Claim, error) {
	var all Claims
	if _, err := store.Get(ctx, ClaimPrefix+r.JobID, &all); err != nil {
		return Claim{}, fmt.Errorf("replays of job %s: %w", r.JobID, err)
	}
	var last Claim
	for _, c := range all.Claims {
		if c.Run > max(r.Run, last.Run) {
			last = c
		}
	}
	return last, nil
}
