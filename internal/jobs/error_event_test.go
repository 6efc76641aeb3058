package jobs_test

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
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
