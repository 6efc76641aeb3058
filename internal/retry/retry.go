// Package retry waits between attempts and repeats an operation until it
// succeeds, fails for good or is cancelled. It owns the backoff and must not know
// what the operation is.
package retry

import (
	"context"
	"time"

	"avatarworker/internal/errors"
)

// Pause waits for d. If ctx ends first, it returns the cause joined with why, the
// error that made the pause necessary (nil: none).
func Pause(ctx context.Context, d time.Duration, why error) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), why)
	}
}

// Backoff sets the waits between attempts.
type Backoff struct {
	Initial time.Duration // before the second attempt
	Max     time.Duration // the wait doubles up to this
}

// Until calls f until it returns nil, it returns an error that final reports as
// permanent, or ctx ends. If final is nil, only ctx ends the attempts. The error
// is f's last one, joined with the cause if ctx ended.
func Until(ctx context.Context, b Backoff, final func(error) bool, f func() error) error {
	wait := b.Initial
	for {
		err := f()
		if err == nil || final != nil && final(err) {
			return err
		}
		if err := Pause(ctx, wait, err); err != nil {
			return err
		}
		wait = min(2*wait, max(b.Max, b.Initial))
	}
}
