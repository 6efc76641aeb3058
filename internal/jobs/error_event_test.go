package jobs_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

func TestEventOfAnEarlierJobHidesNoLostDeadLetter(t *testing.T) {
	h := newEnv(t)
	w := h.start(hopeless(), h.realLetters)
	h.submit("default", job("j1"))
	r := h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	w.end()
	h.letterRemoved()
	h.forget("j1")
	// The job is published again; its worker writes the outcome and dies.
	r.StreamSeq, r.UpdatedAt, r.LettersBefore = h.submit("default", job("j1")), time.Now().UTC(), 1
	h.put(r)
	h.start(hopeless(), h.realLetters)
	h.settled()
	h.wantLetters(1)
}

func TestFailureIsPublishedOnceThoughItsRecordIsWrittenAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		made  time.Duration // the record, after the failure
		again int
	}{
		"the event is this job's":       {-time.Second, 0},
		"the event is an earlier job's": {time.Hour, 1},
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			r := h.failedOnce("j1")
			reported := make(chan *nats.Msg, 8)
			if _, err := h.nc.ChanSubscribe(h.names.AllErrors(), reported); err != nil {
				t.Fatal(err)
			}
			now := time.Now().UTC()
			r.CreatedAt, r.UpdatedAt, r.NextAttemptAt = r.UpdatedAt.Add(c.made), now, &now
			r.StreamSeq = h.submit("default", job("j1"))
			h.put(r)
			h.start(&script{})
			h.outcome("j1", lifecycle.StateCompleted)
			h.settled()
			if len(reported) != c.again {
				t.Errorf("the failure was reported %d times more, want %d", len(reported), c.again)
			}
		})
	}
}

// fullFrom is a store that can take nothing from some time on.
type fullFrom struct {
	fullStore
	full *atomic.Bool
}

func (s fullFrom) Reserve(ctx context.Context, job *jobspec.Job, n int) error {
	if s.full.Load() {
		return s.fullStore.Reserve(ctx, job, n)
	}
	return nil
}

func TestAFailureIsPublishedOnceThoughWhatHoldsItsJobChanges(t *testing.T) {
	h := newEnv(t)
	config := h.handles.Events.CachedInfo().Config
	config.Duplicates = 100 * time.Millisecond // so that the stream does not drop a repetition
	if _, err := h.js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	var full atomic.Bool
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		full.Store(true)
		return failure(errors.CodeCreditsExhausted, errors.PhaseConnect)
	}), func(o *options) { o.Storage = fullFrom{full: &full} })
	h.submit("default", job("j"))
	h.until("j", func(r *lifecycle.Record) bool { return r.HeldReason == lifecycle.HeldStorage })
	h.wantTypes("j", "started", "error", "held", "held")
}

func TestAFailureThatHoldsItsJobIsPublishedByTheNextWorkerIfItsOwnDied(t *testing.T) {
	h := newEnv(t)
	now, later := time.Now().UTC(), time.Now().Add(time.Hour).UTC()
	r := &lifecycle.Record{
		JobID: "j", Run: 1, StreamSeq: h.submit("default", job("j")), Session: 1, State: lifecycle.StateRunning,
		Queue: "default", AppID: "app1", Attempt: 1, CreatedAt: now, UpdatedAt: now,
	}
	r.Fail(&event.Error{
		JobID: "j", Run: 1, Session: 1, Attempt: 1, Code: errors.CodeCreditsExhausted, Class: errors.ClassBilling,
		Phase: errors.PhaseConnect, Action: errors.ActionHold, Time: now,
	}, false)
	r.Hold(now, later, lifecycle.HeldCircuit, "", errors.CodeCreditsExhausted)
	h.put(r)
	h.start(&script{})
	h.wantTypes("j", "error", "held")
}

// failedOnce leaves the record of a job that has failed and was reported, and
// takes its message away.
func (h *env) failedOnce(id string) *lifecycle.Record {
	h.t.Helper()
	w := h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
	}), func(o *options) { o.Retry.Initial, o.Retry.Max = time.Hour, time.Hour })
	h.submit("default", job(id))
	r := h.state(id, lifecycle.StateRetrying)
	w.end()
	if err := h.handles.Jobs.Purge(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	return r
}
