package jobs_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/natsserver/natstest"
)

// stall makes the link take nothing any more, until the returned function is
// called: what is sent fills the buffers, and then every sender waits.
func (k *link) stall() (goOn func()) {
	k.stalled.Lock()
	return sync.OnceFunc(k.stalled.Unlock)
}

// leaseOf makes workers and consumers have another lease.
func (h *env) leaseOf(window time.Duration) func(*options) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	h.settings.AckWait = window
	if err := h.handles.Jobs.DeleteConsumer(ctx, "default"); err != nil {
		h.t.Fatal(err)
	}
	h.ensure()
	return func(o *options) { o.AckWait = window }
}

func TestLinkThatTakesNothingEndsTheSessionWithinItsLease(t *testing.T) {
	h := newEnv(t)
	window := natstest.Unhurried(4 * time.Second)
	k := newLink(t, h.url)
	began, ended := make(chan struct{}, 4), make(chan time.Time, 4)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- struct{}{}
		err := untilDone(ctx)
		if !errors.Is(err, lease.ErrLost) {
			t.Errorf("ended by %v", err)
		}
		ended <- time.Now()
		return err
	}), h.leaseOf(window), func(o *options) { o.url, o.Drain = k.url(), time.Millisecond })
	h.submit("default", job("j1"))
	receive(t, began, "session")

	stop := make(chan struct{})
	var frames sync.WaitGroup
	goOn := k.stall()
	defer func() { // before anything is waited for
		close(stop)
		goOn()
		frames.Wait()
	}()
	since := time.Now()
	for range 4 {
		frames.Go(func() { // as sessions with many frames do
			for data := make([]byte, 500<<10); ; {
				select {
				case <-stop:
					return
				default:
					_ = w.nc.Publish("frames", data) // what becomes of it is not the point
				}
			}
		})
	}
	if took := receive(t, ended, "end of the session").Sub(since); took > window {
		t.Errorf("the session ended %s after the link stalled, later than its lease of %s", took, window)
	}
	w.stop() // no worker may take the job
}
