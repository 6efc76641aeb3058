package jobs

import (
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// Observer counts what happens, for metrics. Its methods are quick and may be
// called from any goroutine.
type Observer interface {
	JobDone(queue string, outcome lifecycle.State)
	// AttemptDone is called after every attempt; code is "" if it succeeded.
	AttemptDone(code errors.Code, class errors.Class, phase errors.Phase)
	// TakenOver is called when this worker takes a job over; why is new, retry, held,
	// released or crash.
	TakenOver(why string)
	// FirstStarted is called when a job's first session starts; wait is the time since
	// the job was published.
	FirstStarted(queue string, wait time.Duration)
	SessionOpened(app string)
	SessionClosed(app string, connected time.Duration)
	Utterance(u event.Utterance)
	// Used is called for each session that was stored in the ledger.
	Used(app, queue string, connected time.Duration, credits int64)
	// TotalsAdded is called with whether usage records could be added to the counters.
	TotalsAdded(ok bool)
	FramesOut(output string, frames int, bytes int64)
	LeaseExtended(ok bool)
	SlotsBusy(busy, all int)
	// Postponed is called for a job that is handed back for a while: retrying or held.
	Postponed(jobID string, state lifecycle.State, wait time.Duration)
	CircuitOpen(app, region string, open bool)
	DeadLettered(code errors.Code)
	Alerted(kind string, code errors.Code)
}
