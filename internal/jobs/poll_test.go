package jobs

import (
	"testing"
	"time"

	"avatarworker/internal/jobs/lease"
)

// A lease counts from before the request that brought its message.
func TestRequestNeverWaitsForMuchOfALease(t *testing.T) {
	for _, window := range []time.Duration{time.Second, 2 * time.Second, 30 * time.Second, time.Hour} {
		if left := window - pollOf(window) - lease.Margin(window); left < window/3 {
			t.Errorf("window %s: %s are left of it after a request of %s, want a third for the first extensions", window, left, pollOf(window))
		}
	}
}
