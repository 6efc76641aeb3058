package jobs_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// announce puts the presence of a worker into the bucket, as it would itself.
func (h *env) announce(p fleet.Presence) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	data, err := json.Marshal(p)
	if err == nil {
		_, err = h.handles.Fleet.Put(ctx, "worker."+p.WorkerID, data)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// fleetMark is the last message about a worker in the fleet's bucket; nil:
// there is none.
func (h *env) fleetMark(workerID string) *jetstream.RawStreamMsg {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	bucket := h.names.FleetBucket()
	s, err := h.js.Stream(ctx, "KV_"+bucket)
	if err != nil {
		h.t.Fatal(err)
	}
	msg, err := s.GetLastMsgForSubject(ctx, "$KV."+bucket+".worker."+workerID)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return msg
}

// sessions is a Runner that reports when each session began.
func sessions() (*script, chan time.Time) {
	began := make(chan time.Time, 8)
	return runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- time.Now()
		return untilDone(ctx)
	}), began
}

func noDrain(o *options) { o.Drain = time.Millisecond }

func TestRestartAfterACrashTakesTheJobOverWhenItsLeaseEnds(t *testing.T) {
	h := newEnv(t)
	const window = 3 * time.Second
	lease := h.leaseOf(window)
	runner, began := sessions()
	crashed := h.start(runner, lease, noDrain)
	h.submit("default", job("j1"))
	receive(t, began, "session")
	if err := crashed.nc.Flush(); err != nil { // its lease is extended
		t.Fatal(err)
	}
	crashed.kill()
	since := time.Now()
	h.start(runner, lease, noDrain)
	took := receive(t, began, "next session").Sub(since)
	t.Logf("taken over %s after the crash; lease %s", took, window)
	if took > 4*window { // the lease, and what a busy machine adds
		t.Errorf("taken over only %s after the crash", took)
	}
}

func TestWorkerWhoseClockIsAheadSeesTheOthers(t *testing.T) {
	h := newEnv(t)
	began := make(chan string, 2)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- a.Job.ID
		return untilDone(ctx)
	}), noDrain, func(o *options) { o.Concurrency = 1 })
	h.submit("default", job("j1"))
	receive(t, began, "session")
	h.announce(fleet.Presence{WorkerID: "other", At: time.Now(), Busy: map[string]int{"default": 2}})

	purged := h.purgedWorkers()
	w := h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeBillingRequired, errors.PhaseHandshake)
	}), noDrain, func(o *options) { o.Now = func() time.Time { return time.Now().Add(24 * time.Hour) } })
	h.eventually("it counts what others have in hand", func() bool { return w.InFleet("default") == 3 })
	h.submit("default", job("j2"))
	h.state("j2", lifecycle.StateHeld)
	if opened := h.events("avatar.alerts.circuit_opened.>"); len(opened) != 0 {
		t.Errorf("a session too many was taken for an unpaid bill: %v", opened)
	}
	if gone := purged(); len(gone) != 0 {
		t.Errorf("taken off the list while they live: %v", gone)
	}
}

func TestWorkerWhoseClockIsAheadCountsFailuresFromBeforeItStarted(t *testing.T) {
	h := newEnv(t)
	failing := runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeServerError, errors.PhaseRuntime)
	})
	first := h.start(failing, func(o *options) { o.Alerts.Threshold, o.Retry.MaxAttempts = 100, 1 })
	for _, id := range []string{"j1", "j2", "j3"} {
		h.submit("default", job(id))
		h.state(id, lifecycle.StateDeadLettered)
	}
	first.end()
	h.start(failing, func(o *options) {
		o.Alerts.Threshold = 3
		o.Now = func() time.Time { return time.Now().Add(24 * time.Hour) }
	})
	h.eventually("it is reported", func() bool { return h.countUnder("avatar.alerts.recurring.>") == 1 })
}

// purgedWorkers watches the list; the function returned says who was taken off
// it since.
func (h *env) purgedWorkers() func() []string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	watcher, err := h.handles.Fleet.Watch(ctx, "worker.>", jetstream.UpdatesOnly())
	if err != nil {
		cancel()
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = watcher.Stop(); cancel() }) // the server may be gone
	return func() (gone []string) {
		h.announce(fleet.Presence{WorkerID: "last"})
		for entry := range watcher.Updates() {
			switch {
			case entry.Key() == "worker.last":
				return gone
			case entry.Operation() != jetstream.KeyValuePut:
				gone = append(gone, entry.Key())
			}
		}
		return gone
	}
}

func TestWorkerThatLeavesIsTakenOffTheListAndLeavesNothingForEver(t *testing.T) {
	h := newEnv(t)
	w := h.start(&script{})
	h.eventually("it is on the list", func() bool { return h.fleetMark(w.id) != nil })
	w.end()
	mark := h.fleetMark(w.id)
	if mark == nil || mark.Header.Get("KV-Operation") != "PURGE" {
		t.Fatalf("after it left: %+v", mark)
	}
	if got := mark.Header.Get("Nats-TTL"); got != "1m0s" {
		t.Errorf("its marker lives for %q", got)
	}
}
