package jobs_test

import (
	"context"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// forgetful replaces the bucket of records by one that forgets soon.
func (h *env) forgetful(ttl time.Duration) {
	h.t.Helper()
	if err := h.js.DeleteKeyValue(h.t.Context(), h.names.StateBucket()); err != nil {
		h.t.Fatal(err)
	}
	h.settings.StateTTL = ttl
	h.ensure()
}

var (
	forgets    = natstest.Unhurried(5 * time.Second) // a record is written again after half of it; a busy machine needs the rest
	longEnough = 5 * forgets / 2
)

func TestRecordOfAJobThatIsHeldForLongIsKept(t *testing.T) {
	h := newEnv(t)
	h.forgetful(forgets)
	b := &account{code: errors.CodeCreditsExhausted}
	h.start(b.runner(), func(o *options) { o.Circuit.MaxCooldown = o.Circuit.Cooldown })
	h.submit("default", job("probe"))
	h.state("probe", lifecycle.StateHeld)
	h.submit("default", job("held"))
	first := h.state("held", lifecycle.StateHeld)
	time.Sleep(longEnough) //nolint:forbidigo // what the bucket forgets by its own clock
	r := h.record("held")  // it may be the probe just now
	if r == nil || !r.CreatedAt.Equal(first.CreatedAt) || r.State.Final() {
		t.Fatalf("%+v after %s, want the record made at %s", r, longEnough, first.CreatedAt)
	}
	b.set("")
	done := h.outcome("held", lifecycle.StateCompleted)
	h.outcome("probe", lifecycle.StateCompleted)
	h.settled()
	if n := h.count("held", "held"); n != done.Holds {
		t.Errorf("%d events of %d holds", n, done.Holds)
	}
}

func (h *env) count(id, kind string) (n int) {
	h.t.Helper()
	for _, got := range h.types(id) {
		if got == kind {
			n++
		}
	}
	return n
}

func TestRecordOfALongSessionIsKept(t *testing.T) {
	h := newEnv(t)
	h.forgetful(forgets)
	leave := make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		<-leave
		return speak(ctx, a, 1)
	}), h.leaseOf(forgets))
	h.submit("default", job("j1"))
	h.state("j1", lifecycle.StateRunning)
	time.Sleep(longEnough) //nolint:forbidigo // by the bucket's clock
	if r := h.record("j1"); r == nil || r.State != lifecycle.StateRunning {
		t.Errorf("%+v after %s", r, longEnough)
	}
	close(leave)
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
}

func TestFailuresCountThoughTheCircuitsAreGone(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeConnectionFailed, errors.PhaseHandshake)
	}), func(o *options) { o.Patience = 200 * time.Millisecond })
	if err := h.js.DeleteKeyValue(t.Context(), h.names.FleetBucket()); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j1", `"max_attempts":2`))
	if r := h.outcome("j1", lifecycle.StateDeadLettered); r.Attempt != 2 || r.Reason != lifecycle.ReasonAttemptsExhausted {
		t.Errorf("attempt %d, reason %s", r.Attempt, r.Reason)
	}
	h.settled()
	h.wantTypes("j1", "started", "error", "retrying", "started", "error", "dead_lettered")
}
