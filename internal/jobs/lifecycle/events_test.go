package lifecycle

import (
	"strings"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/topology"
)

func TestTheLastEventHasTheStateAndIsTheSameAgain(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for state, kind := range map[State]string{
		StateRetrying: event.TypeRetrying, StateHeld: event.TypeHeld, StateReleased: event.TypeReleased,
		StateCompleted: event.TypeCompleted, StateCancelled: event.TypeCancelled, StateExpired: event.TypeExpired,
		StateDeadLettered: event.TypeDeadLettered,
	} {
		r := &Record{
			JobID: "j", Run: 2, Session: 3, State: state, UpdatedAt: at, NextAttemptAt: &at,
			LastError: &event.Error{Code: errors.CodeInternal, Class: errors.ClassTransient},
		}
		first := Events{Names: topology.Names{}, Worker: "a", WorkerID: "a-1"}.Last(r)
		again := Events{Names: topology.Names{}, Worker: "b", WorkerID: "b-1"}.Last(r)
		if !strings.HasPrefix(first.ID, "j.run2.s3."+kind) || !strings.Contains(first.Subject(topology.Names{}), "."+kind+".") || !first.Time.Equal(at) {
			t.Errorf("%s: %+v", state, first)
		}
		if first.ID != again.ID || !first.Time.Equal(again.Time) {
			t.Errorf("%s: %s at %s, and by another worker %s at %s", state, first.ID, first.Time, again.ID, again.Time)
		}
	}
}
