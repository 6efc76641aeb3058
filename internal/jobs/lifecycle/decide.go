package lifecycle

import (
	"time"

	"avatarworker/internal/jobs/jobspec"
)

// claimStep is what to do with a delivery.
type Step int

const (
	StepStart     Step = iota // no worker has the job: run it
	StepDuplicate             // another message's job: acknowledge and drop
	StepEffects               // the outcome is there: repeat what follows from it
	StepWait                  // not yet: hand back with a delay
	StepRunning               // a worker is said to run it: does its lease stand?
	StepContend               // another message's job, and on its way: a duplicate if that message is there
)

const (
	// SuspectAfter is the number of crashes after which a job is a suspect; see
	// Apart.
	SuspectAfter = 3
	// minCrashLimit is the least number of crashes after which a job is given up.
	// Innocent jobs that were there when others crashed their workers stay below
	// it; see the property test.
	minCrashLimit = 5
	// MaxUnsettled is the number of sessions in a row that may settle nothing.
	MaxUnsettled = 5
)

// Apart reports whether two jobs with so many crashes may run on one worker at a
// time. A suspect runs beside jobs that have never been there when a worker died,
// so that each job that kills its workers harms a suspect once at most.
func Apart(a, b int) bool { return max(a, b) < SuspectAfter || min(a, b) == 0 }

// CrashLimit is the number of crashes after which a job is given up.
func CrashLimit(maxAttempts int) int { return max(maxAttempts, minCrashLimit) }

// decide looks at the record (nil: there is none) and at the message, and says
// what to do. It is pure: its caller acts on it by compare-and-set.
func Decide(r *Record, id jobspec.Identity, now time.Time) (Step, time.Duration) {
	switch {
	case r == nil, r.StreamSeq == 0: // the latter was made by a cancel
		return StepStart, 0
	case id.Run < r.Run:
		return StepDuplicate, 0
	case id.Run > r.Run:
		if r.State.Final() {
			return StepStart, 0
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
		return StepStart, 0 // nothing to wait for: starting ends it
	case r.NextAttemptAt != nil && r.NextAttemptAt.After(now):
		return StepWait, r.NextAttemptAt.Sub(now)
	default:
		return StepStart, 0
	}
}

// waitForOutcome is how long a replay waits for the run before it.
const WaitForOutcome = 5 * time.Second

// resumeFrom is the record that this run of the job goes on from: nil if there is
// none yet. crashed says that the worker that had the job is gone.
func Resume(r *Record, id jobspec.Identity, crashed bool, now time.Time) *Record {
	if r == nil || r.StreamSeq != 0 && r.Run != id.Run {
		return nil
	}
	next := r.Clone()
	next.Run, next.StreamSeq = id.Run, id.StreamSeq
	if crashed {
		next.Crashes++
	}
	if r.State != StateHeld {
		next.EndHold(now)
	}
	return next
}

// started is the record of a job that this worker makes its own. from is what
// resumeFrom returned.
func Start(from *Record, job *jobspec.Job, worker string, defaults Defaults, now time.Time) *Record {
	next := &Record{CreatedAt: now}
	if from != nil {
		next = from.Clone()
		next.EndHold(now)
		if from.State == StateRetrying {
			next.Attempt++
		}
	}
	next.keepUsage()
	next.Identify(job, defaults)
	next.Attempt = max(next.Attempt, 1)
	next.Session++
	next.Unsettled++
	next.State = StateRunning
	next.WorkerID = worker
	next.NextAttemptAt = nil
	next.ConnectionID, next.Reason = "", ""
	next.TakenAt, next.ConfirmedAt = now, time.Time{}
	next.HeldCode, next.HeldReason, next.HeldWhy = "", "", ""
	if job.Resume() == jobspec.OnRedeliveryRestart {
		next.Checkpoint, next.LiveSeq, next.LiveBegun, next.UtterancesDone, next.Utterances, next.Recorded = 0, 0, 0, 0, nil, nil
	}
	return next
}

// defaults are what the configuration says where the job says nothing.
type Defaults struct {
	AppID       string
	Region      string
	MaxAttempts int
}

// identify copies what the job says of itself.
func (r *Record) Identify(job *jobspec.Job, d Defaults) {
	r.JobID, r.Run, r.StreamSeq, r.Queue = job.ID, job.Run, job.StreamSeq, job.Queue
	r.AppID = orElse(job.GetAppId(), d.AppID)
	r.AvatarID = job.GetAvatarId()
	r.Region = orElse(job.GetRegion(), d.Region)
	r.MaxAttempts = d.MaxAttempts
	if n := int(job.GetMaxAttempts()); n > 0 && n < d.MaxAttempts {
		r.MaxAttempts = n
	}
	r.Labels = job.GetLabels()
	r.PublishedAt = job.Published
}

func orElse(value, fallback string) string {
	if value == "" {
		return fallback
	}
	return value
}

// StartedAs says why the job had no session. was is its record as it was found,
// from what Resume made of it.
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
	default: // or its worker, which lives, handed it back
		return "released"
	}
}
