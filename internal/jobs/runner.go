package jobs

import (
	"context"
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// Attempt is one try to run a job, as the worker hands it to a Runner.
type Attempt struct {
	Job        *jobspec.Job
	AppID      string // the job's, or the configuration's default
	Region     string // the job's, or the configuration's default
	Session    int    // session number: rises with each take-over within a run
	Number     int    // attempt number, from 1
	Checkpoint int    // utterances already delivered: start with the next
	// LiveSeq is the sequence of the last live audio message that belongs to a
	// delivered utterance; 0 before the first.
	LiveSeq uint64
	// LiveBegun is the sequence of the first live audio message of the
	// utterance that the last session had begun and not finished; 0: none.
	LiveBegun uint64
	// Recorded is what earlier sessions have stored of the recording; nil:
	// nothing, or no recording is wanted.
	Recorded *event.Recorded
	// PreviousSession is the session number that the record named before this
	// take-over; 0 if there was none. Frames stored by it may be ahead of
	// Checkpoint.
	PreviousSession int
	Progress        Progress
	Control         *Control
}

// Progress is how a Runner reports to the worker while an attempt runs. Its
// methods are called from one goroutine at a time.
type Progress interface {
	// Connected is called when the backend confirmed the session.
	Connected(connectionID, region string)
	// FirstFrame is called for the session's first frame (in egress: when its
	// first utterance was spoken): the backend works.
	FirstFrame()
	// Speaking is called before an utterance's first speech is sent; the first
	// utterance is 1, and liveBegun the sequence of its first message if it is
	// live. An error means the same as one of Delivered. It may be called while
	// FirstFrame is.
	Speaking(ctx context.Context, utterance int, liveBegun uint64) error
	// Delivered moves the checkpoint: the utterance's frames are stored and
	// acknowledged. An error means that the job is no longer this worker's, or that
	// the checkpoint could not be written; the Runner closes the session and
	// returns it.
	Delivered(ctx context.Context, u event.Utterance) error
}

// Report is what a Runner says of an attempt, also of one that failed.
type Report struct {
	ConnectionID string
	Region       string        // the region that served
	Connected    time.Duration // connected time: what is billed
	Recording    string        // object name, for output object
	Frames       int
	Bytes        int64
}

// Runner runs one attempt of a job. It returns when the session is closed,
// whatever the error; the error is an *errors.Error unless ctx was cancelled,
// and then context.Cause(ctx) is in its chain.
type Runner interface {
	Run(ctx context.Context, a *Attempt) (Report, error)
	// Finish does what follows from an outcome, idempotently, also for a job
	// whose worker died: it makes the recording visible, or removes what there is
	// of it.
	Finish(ctx context.Context, job *jobspec.Job, f Finished) error
}

// Finished says how a job ended.
type Finished struct {
	Outcome    lifecycle.State
	Session    int // the run's last session
	Utterances int // delivered
	Recorded   *event.Recorded
}

// DeadLetters keeps the jobs that are given up. Write returns when the letter
// is stored; writing the same letter again stores nothing new, also where it was
// removed since. Last is the sequence of the newest letter that there has been.
type DeadLetters interface {
	Last(ctx context.Context) (uint64, error)
	Write(ctx context.Context, d lifecycle.DeadLetter) error
}
