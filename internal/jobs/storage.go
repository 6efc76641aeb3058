package jobs

import (
	"context"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

// ErrStorage is in the chain of a Runner's error if a store of our own, and not
// the backend, kept the session from going on. It does not count as a failure of the job.
var ErrStorage = errors.New("the worker's own storage failed")

// Storage checks the streams and buckets that jobs read from and write to.
// Its methods may be called from several goroutines.
type Storage interface {
	// Reserve keeps space for what the job has left to store. An error says why a
	// store can't do for the job what it needs: the job is held. The error is an
	// *errors.Error with code invalidJob where that never changes. done is the
	// number of utterances that are stored already.
	Reserve(ctx context.Context, job *jobspec.Job, done int) error
	// Started is called when a session of the job starts, Ended when it is closed;
	// err is the Runner's.
	Started(job *jobspec.Job)
	Ended(job *jobspec.Job, err error)
	// Err returns what the worker can't do at the moment because a store fails;
	// nil: nothing.
	Err() error
}

// endless is storage that takes everything.
type endless struct{}

func (endless) Reserve(context.Context, *jobspec.Job, int) error { return nil }
func (endless) Started(*jobspec.Job)                             {}
func (endless) Ended(*jobspec.Job, error)                        {}
func (endless) Err() error                                       { return nil }
