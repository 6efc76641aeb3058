package lifecycle

import (
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
)

// DeadLetter is a job that is given up, with its own bytes and headers.
type DeadLetter struct {
	Job      jobspec.Identity
	Header   map[string][]string // the job message's own
	Data     []byte
	Reason   string // permanent, attempts_exhausted, invalid_job, worker_lost, held_too_long
	Error    event.Error
	Crashes  int
	Attempts int
	FailedAt time.Time
	Worker   string

	// LettersBefore is the sequence of the newest letter before the outcome was
	// written: the job's own letter has a higher one, that of an earlier job with its
	// id has not.
	LettersBefore uint64
}
