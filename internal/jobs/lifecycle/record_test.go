package lifecycle

import (
	"testing"
	"time"

	"avatarworker/internal/jobs/event"
)

func TestARecordThatNoWorkerCanHaveWrittenIsRefused(t *testing.T) {
	at, e := time.Unix(1000, 0), &event.Error{}
	for name, r := range map[string]*Record{
		"no state":                   {},
		"another state":              {State: "resting"},
		"held without a time":        {State: StateHeld},
		"retrying without a time":    {State: StateRetrying, LastError: e},
		"retrying without an error":  {State: StateRetrying, NextAttemptAt: &at},
		"dead letter without reason": {State: StateDeadLettered},
	} {
		if r.check() == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for _, r := range []*Record{
		{State: StateRunning}, {State: StateReleased}, {State: StateCompleted}, {State: StateExpired}, {State: StateCancelled},
		{State: StateHeld, NextAttemptAt: &at}, {State: StateRetrying, NextAttemptAt: &at, LastError: e}, {State: StateDeadLettered, LastError: e},
	} {
		if err := r.check(); err != nil {
			t.Errorf("%s: %v", r.State, err)
		}
	}
}

// With restart, each session speaks the utterances again, and that is paid for again: it
// does not count as progress.
func TestOnlyAnUtteranceThatIsKeptEndsTheRowOfSessionsWithoutAResult(t *testing.T) {
	for keeps, want := range map[bool]int{true: 0, false: 4} {
		r := &Record{Unsettled: 4}
		r.Delivered(event.Utterance{}, keeps)
		if r.Unsettled != want {
			t.Errorf("kept: %v: %d sessions without a result, want %d", keeps, r.Unsettled, want)
		}
	}
}

func TestASessionThatWasNeverOpenedCountsOnlyAfterAFaultOfTheWorker(t *testing.T) {
	for reason, want := range map[string]int{"lease_lost": 0, "unrecorded": 0, "drain": 0, ReleasedByFault: 1} {
		r := &Record{Unsettled: 1}
		r.Release(reason)
		if r.Unsettled != want || r.State != StateReleased || r.Reason != reason {
			t.Errorf("%s, not opened: %d sessions without a result, want %d", reason, r.Unsettled, want)
		}
		r = &Record{Unsettled: 1, ConfirmedAt: time.Now()}
		if r.Release(reason); r.Unsettled != 1 {
			t.Errorf("%s, opened: %d sessions without a result, want 1", reason, r.Unsettled)
		}
	}
}
