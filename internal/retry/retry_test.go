package retry_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/retry"
)

var errAway = errors.New("away")

func TestWaitsDoubleUpToTheMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var waits []time.Duration
		last := time.Now()
		err := retry.Until(t.Context(), retry.Backoff{Initial: time.Second, Max: 3 * time.Second}, nil, func() error {
			waits = append(waits, time.Since(last))
			last = time.Now()
			if len(waits) < 5 {
				return errAway
			}
			return nil
		})
		if want := []time.Duration{0, time.Second, 2 * time.Second, 3 * time.Second, 3 * time.Second}; err != nil || !slices.Equal(waits, want) {
			t.Errorf("waited %v, want %v; %v", waits, want, err)
		}
	})
}

func TestAFinalErrorEndsTheAttempts(t *testing.T) {
	attempts := 0
	err := retry.Until(t.Context(), retry.Backoff{}, func(err error) bool { return errors.Is(err, errAway) }, func() error {
		attempts++
		return errAway
	})
	if !errors.Is(err, errAway) || attempts != 1 {
		t.Errorf("%d attempts, %v", attempts, err)
	}
}

func TestTheErrorOfACancelledWaitNamesCauseAndFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("stopping")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Minute, func() { cancel(cause) })
		began := time.Now()
		err := retry.Until(ctx, retry.Backoff{Initial: time.Hour}, nil, func() error { return errAway })
		if !errors.Is(err, cause) || !errors.Is(err, errAway) || time.Since(began) != time.Minute {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}
