// Package retry waits between the tries of something that may succeed later.
package retry

import (
	"context"
	"time"

	"avatarworker/internal/errors"
)

// Pause waits for d. If ctx ends first it returns the cause of that, joined
// with why, the error that made the pause necessary (nil: none).
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

// Backoff says how long to wait between tries.
type Backoff struct {
	Initial time.Duration // before the second try
	Max     time.Duration // of every wait; the wait doubles up to it
}

// Until calls f until it returns nil or an error that final reports as lasting,
// or until ctx ends. final may be nil: then only ctx ends the tries. The error
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
