package ui

import (
	"context"
	"time"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/status"
)

// Reader is what the pages read. All its methods are safe for concurrent use, and
// cheap enough to be called for each viewer.
type Reader interface {
	Fleet(ctx context.Context) (*status.Fleet, error)
	Jobs(ctx context.Context, q status.Query) (status.List, error)
	// Job returns an error with status.ErrNoJob in its chain for a job that is
	// unknown.
	Job(ctx context.Context, id string) (*status.Job, error)
	// Letters lists dead letters, at most limit; more reports whether there are
	// others.
	Letters(ctx context.Context, f dlq.Filter, limit int) (list []dlq.Entry, more bool, err error)
	// Letter returns an error with dlq.ErrNoLetter in its chain where there is none.
	Letter(ctx context.Context, seq uint64) (dlq.Letter, error)
	// Alerts lists the newest alerts, newest first.
	Alerts(ctx context.Context, limit int) (list []status.Event, more bool, err error)
	Limits(ctx context.Context) ([]Limit, error)
	// Recordings lists the newest recordings, newest first.
	Recordings(ctx context.Context, limit int) (list []Recording, more bool, err error)
	// Failures counts failed attempts by code since that time, in n intervals of
	// equal length that end at now.
	Failures(since, now time.Time, n int) Failures
	// Spend is what today's jobs cost so far; nil: it is not known.
	Spend(ctx context.Context) (*Spend, error)
	// Freshness says how current the answers are that are kept in memory.
	Freshness() Freshness
	// Changed returns a channel that is closed when something has changed, or may
	// have.
	Changed() <-chan struct{}
}

// Freshness is how current the state of the fleet is.
type Freshness struct {
	At time.Time // of what is shown; zero: nothing was read yet
	// Error is why nothing newer can be read; "": it can.
	Error string
}

// Limit is a session limit and how many sessions use it.
type Limit struct {
	Name string // "app_id a1", "label.room 12"
	Used int
	Max  int // 0: not in this configuration
}

// Recording is a recording in the bucket.
type Recording struct {
	Name     string
	JobID    string // "": not stored by a worker
	Bytes    uint64
	StoredAt time.Time
}

// Failures is how many attempts failed with each code, most frequent first.
type Failures struct {
	Codes []CodeCount
	// Complete is false while the events are still being read.
	Complete bool
}

// CodeCount is how often a code occurred in each interval, oldest first.
type CodeCount struct {
	Code   errors.Code
	Total  int
	Counts []int
}

// Spend is connected time and what it costs at least.
type Spend struct {
	Since     time.Time
	Connected time.Duration
	Credits   int64
	Jobs      int
	AtLeast   bool           // not all jobs were counted
	Ledger    *cost.Overview // where usage records are kept: the figures above are its day's
}

// Actor is what the pages change. Each change is safe beside workers and other
// operators, and may be repeated.
type Actor interface {
	// Cancel answers "cancelled", "requested", "finished" or "unknown".
	Cancel(ctx context.Context, jobID string) (Done, error)
	// Retry answers with a status of operate.Retried.
	Retry(ctx context.Context, jobID string, probe bool) (Done, error)
	Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (dlq.Result, error)
	Remove(ctx context.Context, seq uint64) error
	Pause(ctx context.Context, queue string, d time.Duration) (until time.Time, err error)
	Resume(ctx context.Context, queue string) (was bool, err error)
	// Probe lets one job through an open circuit; jobID is the one that was woken,
	// "": its next one.
	Probe(ctx context.Context, app, region string) (jobID string, err error)
	CloseCircuit(ctx context.Context, app, region string) error
	// Drain returns how many of the worker's slots are in use.
	Drain(ctx context.Context, workerID string) (running int, err error)
}

// Done is what became of one thing that was to be changed.
type Done struct {
	Status  string
	Message string
	OK      bool // it is as asked
}
