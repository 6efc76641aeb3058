package lifecycle

import (
	"cmp"
	"time"

	"avatarworker/internal/jobs/jobspec"
)

// Step is what to do with a delivery.
type Step int

const (
	StepProceed   Step = iota // no worker runs the job: start it, or end it if it may not start
	StepDuplicate             // another message's job: acknowledge and drop
	StepEffects               // the outcome is recorded: repeat its effects
	StepWait                  // not yet: nak with a delay
	StepRunning               // the record names a worker: check whether its lease is valid
	StepContend               // another message's job without outcome: a duplicate if that message exists
)

const (
	// minCrashLimit is the minimum number of crashes after which a job is given
	// up. Jobs that merely ran on a worker when another job crashed it stay below
	// it; see the property test.
	minCrashLimit = 5
	// MaxUnsettled is the number of sessions in a row that may settle nothing.
	MaxUnsettled = 5
)

// CrashLimit is the number of crashes after which a job is given up.
func CrashLimit(maxAttempts int) int { return max(maxAttempts, minCrashLimit) }

// Decide returns what to do with a message, given the job's record (nil: there is
// none). It is pure; the caller acts on it by compare-and-set.
func Decide(r *Record, id jobspec.Identity, now time.Time) (Step, time.Duration) {
	switch {
	case r == nil, r.StreamSeq == 0: // the latter was created by a cancel
		return StepProceed, 0
	case id.Run < r.Run:
		return StepDuplicate, 0
	case id.Run > r.Run:
		if r.State.Final() {
			return StepProceed, 0
		}
		return StepWait, WaitForOutcome
	case r.StreamSeq != id.StreamSeq && !r.State.Final():
		return StepContend, 0
	case r.StreamSeq != id.StreamSeq:
		return StepDuplicate, 0
	case r.State.Final():
		return StepEffects, 0
	case r.State == StateRunning:
		return StepRunning, 0
	case r.CancelRequested:
		return StepProceed, 0 // don't wait: starting it ends it
	case r.NextAttemptAt != nil && r.NextAttemptAt.After(now):
		return StepWait, r.NextAttemptAt.Sub(now)
	default:
		return StepProceed, 0
	}
}

// WaitForOutcome is how long a replay waits for the previous run.
const WaitForOutcome = 5 * time.Second

// ContinueFrom returns the record that this run of the job continues from, or nil if
// there is none. crashed means that the job's previous worker is gone.
func ContinueFrom(r *Record, id jobspec.Identity, crashed bool, now time.Time) *Record {
	if r == nil {
		return nil
	}
	if r.StreamSeq != 0 && r.Run != id.Run {
		if id.Run > r.CancelThrough {
			return nil
		}
		// As a cancel leaves the record of a job that no worker has seen.
		return &Record{JobID: id.ID, Run: id.Run, StreamSeq: id.StreamSeq, State: StateReleased, CancelRequested: true, CancelThrough: r.CancelThrough, CreatedAt: now}
	}
	next := r.Clone()
	next.Run, next.StreamSeq = id.Run, id.StreamSeq
	if crashed {
		next.Crashes++
	}
	if r.State != StateHeld {
		next.endHold(now)
	}
	return next
}

// Start returns the record of a job that this worker takes. from is the result of
// ContinueFrom.
func Start(from *Record, job *jobspec.Job, worker string, defaults Defaults, now time.Time) *Record {
	next := &Record{CreatedAt: now}
	if from != nil {
		next = from.Clone()
		next.endHold(now)
		if from.State == StateRetrying {
			next.Attempt++
		}
	}
	next.dropStoredUsage()
	next.identify(job, defaults)
	next.Attempt = max(next.Attempt, 1)
	next.Session++
	next.Unsettled++
	next.State = StateRunning
	next.WorkerID = worker
	next.NextAttemptAt = nil
	next.ConnectionID, next.Reason = "", ""
	next.ConfirmedAt = time.Time{}
	next.HeldCode, next.HeldReason, next.HeldWhy = "", "", ""
	if job.RedeliveryPolicy() == jobspec.OnRedeliveryRestart {
		next.Checkpoint, next.LiveSeq, next.LiveBegun, next.UtterancesDone, next.Utterances, next.Recorded = 0, 0, 0, 0, nil, nil
	}
	return next
}

// Defaults are the configured values for what a job does not set.
type Defaults struct {
	AppID       string
	Region      string
	MaxAttempts int
}

// identify copies the job's own fields into the record.
func (r *Record) identify(job *jobspec.Job, d Defaults) {
	r.JobID, r.Run, r.StreamSeq, r.Queue = job.ID, job.Run, job.StreamSeq, job.Queue
	r.AppID = cmp.Or(job.GetAppId(), d.AppID)
	r.AvatarID = job.GetAvatarId()
	r.Region = cmp.Or(job.GetRegion(), d.Region)
	r.MaxAttempts = d.MaxAttempts
	if n := int(job.GetMaxAttempts()); n > 0 && n < d.MaxAttempts {
		r.MaxAttempts = n
	}
	r.Labels = job.GetLabels()
	r.PublishedAt = job.Published
}

// StartedAs returns why the job had no running session. was is its record as it
// was found, from the result of ContinueFrom.
func StartedAs(was, from *Record) string {
	switch {
	case from == nil || from.Session == 0:
		return "new"
	case from.State == StateRetrying:
		return "retry"
	case from.State == StateHeld:
		return "held"
	case from.Crashes > was.Crashes:
		return "crash"
	default: // or its worker, still alive, returned it
		return "released"
	}
}
