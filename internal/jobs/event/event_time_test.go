package event

import (
	"testing"
	"time"

	"avatarworker/internal/errors"
)

func TestAnErrorEventIsNotToBeTriedAgainBeforeItHappened(t *testing.T) {
	job := eventFields()
	for _, tc := range []struct{ asked, want time.Duration }{{-time.Hour, 0}, {-time.Millisecond, 0}, {0, 0}, {time.Second, time.Second}} {
		ev := NewError(job, Failure{Err: &errors.Error{}, RetryAt: job.Time.Add(tc.asked)})
		if ev.RetryAt == nil || !ev.RetryAt.Equal(job.Time.Add(tc.want)) {
			t.Errorf("%s after it happened: %v, happened %v", tc.asked, ev.RetryAt, ev.Time)
		}
	}
	if ev := NewError(job, Failure{Err: &errors.Error{}}); ev.RetryAt != nil {
		t.Errorf("not tried again, and said to be at %v", ev.RetryAt)
	}
}
