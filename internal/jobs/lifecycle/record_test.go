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
