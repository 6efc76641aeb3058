package jobs_test

import (
	"context"
	"testing"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
)

// hopeless is a job that becomes a dead letter at once.
func hopeless() *script {
	return runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeAvatarNotFound, errors.PhaseHandshake)
	})
}

// realLetters writes dead letters as a worker outside of tests does.
func (h *env) realLetters(o *options) { o.DeadLetters = dlq.NewWriter(h.js, h.names) }

// letterRemoved takes the only dead letter away, as an operator does.
func (h *env) letterRemoved() {
	h.t.Helper()
	store := dlq.NewStore(h.js, h.names, nil)
	for e, err := range store.List(h.t.Context(), dlq.Filter{}, 0) {
		if err == nil {
			err = store.Remove(h.t.Context(), e.Seq)
		}
		if err != nil {
			h.t.Fatal(err)
		}
	}
}

// forget purges the job's record, as its bucket does when it is old.
func (h *env) forget(id string) {
	h.t.Helper()
	if err := h.handles.State.Purge(h.t.Context(), id); err != nil {
		h.t.Fatal(err)
	}
}

func (h *env) wantLetters(want uint64) {
	h.t.Helper()
	if n := h.messages(h.names.DLQStream()); n != want {
		h.t.Errorf("%d dead letters, want %d", n, want)
	}
}

func TestJobWithAnIDThatWasUsedBeforeGetsItsDeadLetter(t *testing.T) {
	h := newEnv(t)
	h.start(hopeless(), h.realLetters)
	h.submit("default", job("j1"))
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	h.forget("j1")
	h.letterRemoved()
	h.submit("default", job("j1"))
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	h.wantLetters(1)
}

func TestOutcomeWhoseWorkerDiedGetsItsDeadLetterUnlessThatWasRemoved(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ before, want uint64 }{
		"the letter removed was its own":           {0, 0},
		"the letter removed was of an earlier job": {1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			w := h.start(hopeless(), h.realLetters)
			h.submit("default", job("j1"))
			r := h.outcome("j1", lifecycle.StateDeadLettered)
			h.settled()
			w.end()
			h.letterRemoved()
			if err := h.handles.Events.Purge(t.Context()); err != nil { // it was not published yet
				t.Fatal(err)
			}
			r.StreamSeq, r.UpdatedAt, r.LettersBefore = h.submit("default", job("j1")), time.Now().UTC(), c.before
			h.put(r)
			h.start(hopeless(), h.realLetters)
			h.settled()
			h.wantLetters(c.want)
		})
	}
}
