package jobs

import "time"

// step is what to do with a delivery.
type step int

const (
	stepStart     step = iota // nobody has the job: run it
	stepDuplicate             // another message's job: acknowledge and drop
	stepFollow                // the outcome is there: repeat what follows from it
	stepWait                  // not yet: hand back with a delay
	stepAsk                   // somebody is said to run it: ask him
	stepContend               // another message's job, and on its way: a duplicate if that message is there
)

// decide looks at the record (nil: there is none) and at the message, and says
// what to do. It is pure: whoever acts on it does so by compare-and-set.
func decide(r *Record, id Identity, now time.Time) (step, time.Duration) {
	switch {
	case r == nil, r.StreamSeq == 0: // the latter was made by a cancel
		return stepStart, 0
	case id.Run < r.Run:
		return stepDuplicate, 0
	case id.Run > r.Run:
		if r.State.Final() {
			return stepStart, 0
		}
		return stepWait, waitForOutcome
	case r.StreamSeq != id.StreamSeq && !r.State.Final():
		return stepContend, 0
	case r.StreamSeq != id.StreamSeq:
		return stepDuplicate, 0
	case r.State.Final():
		return stepFollow, 0
	case r.State == StateRunning:
		return stepAsk, 0
	case r.CancelRequested:
		return stepStart, 0 // nothing to wait for: starting ends it
	case r.waits() && r.NextAttemptAt != nil && r.NextAttemptAt.After(now) && !fromAhead(r, now):
		return stepWait, r.NextAttemptAt.Sub(now)
	default:
		return stepStart, 0
	}
}

// fromAhead tells whether the clock of the worker that wrote the record is ahead
// of this one's. The times that it chose mean nothing here, and could put the
// job off for any time; the queue, which has the same delay from it, keeps to it
// by a clock of its own.
func fromAhead(r *Record, now time.Time) bool { return r.UpdatedAt.Sub(now) > clockLeeway }

// clockLeeway is how far the clocks of two workers may differ without notice: a
// job may wait that much longer than was planned.
const clockLeeway = 5 * time.Second

// waitForOutcome is how long a replay waits for the run before it.
const waitForOutcome = 5 * time.Second

// prior is the record that this run of the job goes on from: nil if there is
// none yet. crashed says that the worker that had the job is gone.
func prior(r *Record, id Identity, crashed bool, now time.Time) *Record {
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

// takeover is the record of a job that this worker makes its own. from is what
// prior gave.
func takeover(from *Record, job *Job, worker string, limits limits, now time.Time) *Record {
	next := &Record{CreatedAt: now}
	if from != nil {
		next = from.clone()
		next.endHold(now)
		if from.State == StateRetrying {
			next.Attempt++
		}
	}
	next.identify(job, limits)
	next.Attempt = max(next.Attempt, 1)
	next.Session++
	next.State = StateRunning
	next.WorkerID = worker
	next.NextAttemptAt = nil
	next.ConnectionID, next.Reason, next.HeldCode = "", "", ""
	if job.Resume() == OnRedeliveryRestart {
		next.Checkpoint, next.LiveSeq, next.LiveBegun, next.UtterancesDone, next.Utterances, next.Recorded = 0, 0, 0, 0, nil, nil
	}
	return next
}

// limits are what the configuration says where the job says nothing.
type limits struct {
	appID       string
	region      string
	maxAttempts int
}

// identify copies what the job says of itself.
func (r *Record) identify(job *Job, l limits) {
	r.JobID, r.Run, r.StreamSeq, r.Queue = job.ID, job.Run, job.StreamSeq, job.Queue
	r.AppID = orElse(job.GetAppId(), l.appID)
	r.AvatarID = job.GetAvatarId()
	r.Region = orElse(job.GetRegion(), l.region)
	r.MaxAttempts = l.maxAttempts
	if n := int(job.GetMaxAttempts()); n > 0 && n < l.maxAttempts {
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
