package jobs

import "time"

// claimStep is what to do with a delivery.
type claimStep int

const (
	claimStart     claimStep = iota // no worker has the job: run it
	claimDuplicate                  // another message's job: acknowledge and drop
	claimEffects                    // the outcome is there: repeat what follows from it
	claimWait                       // not yet: hand back with a delay
	claimRunning                    // a worker is said to run it: does its lease stand?
	claimContend                    // another message's job, and on its way: a duplicate if that message is there
)

const (
	// suspectAfter is the number of crashes after which a job is a suspect: its
	// worker runs it beside ordinary jobs, but beside no other suspect.
	suspectAfter = 3
	// minCrashLimit is the least number of crashes after which a job is given up.
	// Innocent jobs that were there when others crashed their workers stay below
	// it; see the property test.
	minCrashLimit = 5
	// suspectPause is how many ack waits a suspect stays away after a crash.
	suspectPause = 3
	// maxUnsettled is the number of sessions in a row that may settle nothing.
	maxUnsettled = 5
)

// crashLimit is the number of crashes after which a job is given up.
func crashLimit(maxAttempts int) int { return max(maxAttempts, minCrashLimit) }

// decide looks at the record (nil: there is none) and at the message, and says
// what to do. It is pure: its caller acts on it by compare-and-set.
func decide(r *Record, id Identity, now time.Time) (claimStep, time.Duration) {
	switch {
	case r == nil, r.StreamSeq == 0: // the latter was made by a cancel
		return claimStart, 0
	case id.Run < r.Run:
		return claimDuplicate, 0
	case id.Run > r.Run:
		if r.State.Final() {
			return claimStart, 0
		}
		return claimWait, waitForOutcome
	case r.StreamSeq != id.StreamSeq && !r.State.Final():
		return claimContend, 0
	case r.StreamSeq != id.StreamSeq:
		return claimDuplicate, 0
	case r.State.Final():
		return claimEffects, 0
	case r.State == StateRunning:
		return claimRunning, 0
	case r.CancelRequested:
		return claimStart, 0 // nothing to wait for: starting ends it
	case r.NextAttemptAt != nil && r.NextAttemptAt.After(now):
		return claimWait, r.NextAttemptAt.Sub(now)
	default:
		return claimStart, 0
	}
}

// waitForOutcome is how long a replay waits for the run before it.
const waitForOutcome = 5 * time.Second

// resumeFrom is the record that this run of the job goes on from: nil if there is
// none yet. crashed says that the worker that had the job is gone.
func resumeFrom(r *Record, id Identity, crashed bool, now time.Time) *Record {
	if r == nil || r.StreamSeq != 0 && r.Run != id.Run {
		return nil
	}
	next := r.clone()
	next.Run, next.StreamSeq = id.Run, id.StreamSeq
	if crashed {
		next.Crashes++
	}
	if r.State != StateHeld {
		next.endHold(now)
	}
	return next
}

// started is the record of a job that this worker makes its own. from is what
// resumeFrom returned.
func started(from *Record, job *Job, worker string, defaults defaults, now time.Time) *Record {
	next := &Record{CreatedAt: now}
	if from != nil {
		next = from.clone()
		next.endHold(now)
		if from.State == StateRetrying {
			next.Attempt++
		}
	}
	next.identify(job, defaults)
	next.Attempt = max(next.Attempt, 1)
	next.Session++
	next.Unsettled++
	next.State = StateRunning
	next.WorkerID = worker
	next.NextAttemptAt = nil
	next.ConnectionID, next.Reason = "", ""
	next.HeldCode, next.HeldReason, next.HeldWhy = "", "", ""
	if job.Resume() == OnRedeliveryRestart {
		next.Checkpoint, next.LiveSeq, next.LiveBegun, next.UtterancesDone, next.Utterances, next.Recorded = 0, 0, 0, 0, nil, nil
	}
	return next
}

// defaults are what the configuration says where the job says nothing.
type defaults struct {
	appID       string
	region      string
	maxAttempts int
}

// identify copies what the job says of itself.
func (r *Record) identify(job *Job, d defaults) {
	r.JobID, r.Run, r.StreamSeq, r.Queue = job.ID, job.Run, job.StreamSeq, job.Queue
	r.AppID = orElse(job.GetAppId(), d.appID)
	r.AvatarID = job.GetAvatarId()
	r.Region = orElse(job.GetRegion(), d.region)
	r.MaxAttempts = d.maxAttempts
	if n := int(job.GetMaxAttempts()); n > 0 && n < d.maxAttempts {
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
