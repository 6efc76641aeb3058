package jobs

import (
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// Observer is told what happens, for metrics. Its methods are quick and may be
// called from any goroutine.
type Observer interface {
	JobDone(queue string, outcome lifecycle.State)
	// AttemptDone is told of every attempt; code "" is one that succeeded.
	AttemptDone(code errors.Code, class errors.Class, phase errors.Phase)
	// TakenOver: why: new, retry, held, released or crash.
	TakenOver(why string)
	// FirstStarted is told of a job's first session: how long after the job was
	// published it starts.
	FirstStarted(queue string, wait time.Duration)
	SessionOpened(app string)
	SessionClosed(app string, connected time.Duration)
	Utterance(u event.Utterance)
	// Used is told of each session that the ledger has taken.
	Used(app, queue string, connected time.Duration, credits int64)
	// TotalsAdded is told whether usage records could be added to the counters.
	TotalsAdded(ok bool)
	FramesOut(output string, frames int, bytes int64)
	LeaseExtended(ok bool)
	SlotsBusy(busy, all int)
	// Postponed is told of a job handed back for a while: retrying or held.
	Postponed(jobID string, state lifecycle.State, wait time.Duration)
	CircuitOpen(app, region string, open bool)
	DeadLettered(code errors.Code)
	Alerted(kind string, code errors.Code)
}
