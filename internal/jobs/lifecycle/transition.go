package lifecycle

import (
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/usage"
)

// UnstartedRecord returns the record by which a job is settled that is not started: a
// copy of from, or a new one if from is nil. job is nil if the message is not a
// valid job.
func UnstartedRecord(from *Record, id jobspec.Identity, job *jobspec.Job, d Defaults, now time.Time) *Record {
	next := &Record{CreatedAt: now, JobID: id.ID, Run: id.Run}
	if from != nil {
		next = from.Clone()
		next.dropStoredUsage()
	}
	if job != nil {
		next.identify(job, d)
	}
	next.StreamSeq, next.Queue = id.StreamSeq, id.Queue
	return next
}

// RequestCancel records that the job is to be cancelled.
func (r *Record) RequestCancel(now time.Time) { r.CancelRequested, r.UpdatedAt = true, now }

// Adopt returns a copy of the record for another message of the job.
func (r *Record) Adopt(seq uint64) *Record {
	next := r.Clone()
	next.StreamSeq = seq
	return next
}

// Begin records when a worker starts the job, after all its waits.
func (r *Record) Begin(now time.Time) { r.StartedAt = now }

// Connected records a session that the backend has confirmed.
func (r *Record) Connected(connectionID, region string, at time.Time) {
	r.ConfirmedAt = at
	r.ConnectionID = connectionID
	r.ConnectionIDs = event.Newest(append(r.ConnectionIDs, connectionID), event.MaxConnections)
	if region != "" {
		r.Region = region
	}
}

// Speak records that an utterance has started. liveBegun is the sequence of its
// first message if it is live.
func (r *Record) Speak(utterance int, liveBegun uint64) {
	r.Speaking, r.LiveBegun = utterance, liveBegun
}

// Closed adds what a session has used that the backend had confirmed. code says how
// it ended; see usage.Session.
func (r *Record) Closed(connected time.Duration, code string) {
	r.SessionTime += connected
	if !r.ConfirmedAt.IsZero() {
		// Whose session it was the record says as long as this one is its last.
		r.Usage = append(r.Usage, usage.Session{Session: r.Session, Connected: connected, OutcomeCode: code})
	}
}

// Lost adds the most that a session can have used whose worker is gone: from its
// confirm, or if that was not written from its start, until ended.
func (r *Record) Lost(ended time.Time) {
	from := r.ConfirmedAt
	if from.IsZero() {
		from = r.StartedAt
	}
	if from.IsZero() { // taken over by a worker of a version that kept neither
		from = r.UpdatedAt
	}
	lost := r.whole(usage.Session{Session: r.Session, Connected: max(ended.Sub(from), 0), OutcomeCode: string(errors.CodeWorkerLost)})
	lost.ConfirmedAt, lost.Estimated = from, true
	r.Usage = append(r.Usage, lost)
}

// whole returns a session of the record with what it leaves to the record.
func (r *Record) whole(s usage.Session) usage.Session {
	if s.Session != r.Session || s.WorkerID != "" {
		return s
	}
	s.Attempt, s.AppID, s.Region, s.WorkerID, s.ConnectionID = r.Attempt, r.AppID, r.Region, r.WorkerID, r.ConnectionID
	if s.ConfirmedAt.IsZero() {
		s.ConfirmedAt = r.ConfirmedAt
	}
	return s
}

// maxEstimates bounds the estimates that a record keeps for a correction.
const maxEstimates = 16

// dropStoredUsage drops the sessions that are in the ledger. If the state is not running,
// the record's effects are done, and their usage records are stored with them.
func (r *Record) dropStoredUsage() {
	var kept []usage.Session
	for _, s := range r.Usage {
		s = r.whole(s)
		s.Stored = s.Stored || r.State != StateRunning
		if s.Estimated || !s.Stored {
			kept = append(kept, s)
		}
	}
	for i := 0; len(kept) > maxEstimates && i < len(kept); {
		if kept[i].Stored {
			kept = append(kept[:i], kept[i+1:]...)
			continue
		}
		i++
	}
	r.Usage = kept
}

// UsageStored notes that the sessions are in the ledger.
func (r *Record) UsageStored() {
	for i := range r.Usage {
		r.Usage[i].Stored = true
	}
}

var noLabels = map[string]string{} // never written to

// UsageOf is the usage record of one of the job's sessions.
func (r *Record) UsageOf(s usage.Session, credits func(time.Duration) int64) usage.Record {
	s = r.whole(s)
	labels := r.Labels
	if labels == nil {
		labels = noLabels // no field of a record is null
	}
	return usage.Record{
		JobID: r.JobID, Run: r.Run, Session: s.Session, Attempt: s.Attempt, AppID: s.AppID, Queue: r.Queue, AvatarID: r.AvatarID,
		Labels: labels, Region: s.Region, WorkerID: s.WorkerID, ConnectionID: s.ConnectionID, ConfirmedAt: s.ConfirmedAt.UTC(),
		ConnectedMS: s.Connected.Milliseconds(), Credits: credits(s.Connected), OutcomeCode: s.OutcomeCode, Estimated: s.Estimated,
	}
}

// Estimate is the estimate of a session that the record keeps; nil: none.
func (r *Record) Estimate(session int) *usage.Session {
	for i := range r.Usage {
		if r.Usage[i].Session == session && r.Usage[i].Estimated {
			return &r.Usage[i]
		}
	}
	return nil
}

// SetRecording sets the name of the object with the frames; "" if the output is
// another.
func (r *Record) SetRecording(name string) { r.Recording = name }

// Fail records a failed attempt. refused means that the backend refused one
// session too many.
func (r *Record) Fail(e *event.Error, refused bool) {
	r.LastError, r.Unsettled = e, 0
	if refused {
		r.Refusals++
	} else {
		r.Refusals = 0
	}
}

// Retry makes the job wait for its next attempt, after one that failed with code.
func (r *Record) Retry(code errors.Code, at time.Time) {
	if r.Failures == nil {
		r.Failures = make(map[errors.Code]int)
	}
	r.Failures[code]++
	r.State, r.NextAttemptAt = StateRetrying, &at
}

// Hold makes a job wait whose attempt failed, without counting that attempt.
func (r *Record) Hold(now, until time.Time, reason, why string, code errors.Code) {
	r.endHold(now)
	r.State, r.NextAttemptAt, r.HeldSince = StateHeld, &until, &now
	r.HeldReason, r.HeldWhy, r.HeldCode = reason, why, code
	r.Holds++
}

// HoldBack makes a job wait that may not start.
func (r *Record) HoldBack(now, until time.Time, reason, why string, code errors.Code) {
	if r.State == StateRetrying {
		r.Attempt++ // the attempt that waits now; the last one is over
	}
	r.Refusals = 0
	r.Hold(now, until, reason, why, code)
}

// StaysHeld reports whether the job is held for that already, so that its hold goes
// on. Another budget, or the next period of one, is a hold of its own: people are told
// which budget to raise.
func (r *Record) StaysHeld(reason, why string) bool {
	return r.State == StateHeld && r.HeldReason == reason && (reason != HeldBudget || r.HeldWhy == why)
}

// MakeDue ends the wait of a job in backoff or held: an operator wants it to be
// tried now. A job that was held because its sessions settled nothing may have as
// many sessions again. It reports whether it changed anything.
func (r *Record) MakeDue(now time.Time) bool {
	due := r.NextAttemptAt != nil && !r.NextAttemptAt.After(now)
	unsettled := r.State == StateHeld && r.HeldReason == HeldUnsettled && r.Unsettled > 0
	if !r.Waits() || due && !unsettled {
		return false
	}
	r.NextAttemptAt, r.UpdatedAt = &now, now
	if unsettled {
		r.Unsettled = 0
	}
	return true
}

// ReleasedByFault is the reason of a job that a fault of the worker's own code ended.
const ReleasedByFault = "fault"

// Release records that no worker runs the job any more, and why. A session that was
// never opened does not count among those without a result, unless a fault ended it: a
// job that does that each time is to be held in the end.
func (r *Record) Release(reason string) {
	if r.ConfirmedAt.IsZero() && reason != ReleasedByFault {
		r.Unsettled = max(r.Unsettled-1, 0)
	}
	r.State, r.Reason = StateReleased, reason
}

// DeadLetterUnattempted records the dead letter of a job that ends without an attempt.
func (r *Record) DeadLetterUnattempted(reason string, e *event.Error) {
	r.Reason, r.NoAttempt, r.LastError = reason, true, e
}

// DeadLetter records why the job is given up after an attempt.
func (r *Record) DeadLetter(reason string) { r.Reason = reason }

// AfterLetters records the sequence of the newest dead letter before this job's.
func (r *Record) AfterLetters(seq uint64) { r.LettersBefore = seq }

// Conclude makes outcome the job's verdict.
func (r *Record) Conclude(now time.Time, outcome State) {
	r.endHold(now)
	r.Crashes = r.AllCrashes()
	r.State, r.Outcome = outcome, outcome
	r.NextAttemptAt, r.Unsettled = nil, 0
}
