package jobs_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// unfinished writes the record of a job whose message has the sequence seq.
func (h *env) unfinished(id string, seq uint64, state lifecycle.State) {
	h.t.Helper()
	at := time.Now().UTC()
	h.put(&lifecycle.Record{
		JobID: id, Run: 1, StreamSeq: seq, Session: 1, Attempt: 1, MaxAttempts: 5, State: state, WorkerID: "gone",
		NextAttemptAt: &at, CreatedAt: at, UpdatedAt: at,
		LastError: &event.Error{JobID: id, Code: errors.CodeConnectionClosed, Class: errors.ClassTransient},
	})
}

func TestJobWhoseMessageWasPurgedRunsWhenPublishedAgain(t *testing.T) {
	h := newEnv(t)
	other := h.submit("default", job("other"))
	h.unfinished("purged", 999, lifecycle.StateRetrying)
	h.unfinished("released", 998, lifecycle.StateReleased)
	h.unfinished("in-an-older-stream", other, lifecycle.StateRetrying)
	s := &script{}
	h.start(s)
	for _, id := range []string{"purged", "released", "in-an-older-stream"} {
		seq := h.submit("default", job(id))
		if r := h.outcome(id, lifecycle.StateCompleted); r.StreamSeq != seq || r.Session != 2 {
			t.Errorf("%s: kept sequence %d, want %d; session %d", id, r.StreamSeq, seq, r.Session)
		}
	}
	h.settled()
}

func TestReplayDoesNotWaitForARunWhoseMessageWasPurged(t *testing.T) {
	h := newEnv(t)
	h.unfinished("j1", 999, lifecycle.StateRetrying)
	h.start(&script{})
	seq := h.submit("default", job("j1"), "Avatar-Run", "2")
	if r := h.outcome("j1", lifecycle.StateCompleted); r.Run != 2 || r.StreamSeq != seq || r.Session != 1 {
		t.Errorf("run %d, sequence %d, session %d", r.Run, r.StreamSeq, r.Session)
	}
	h.settled()
}

func TestJobWhoseMessageMadeRoomForOneWithoutAnIDRuns(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan string, 4), make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- a.Job.ID
		if a.Job.ID != "x" {
			<-leave
		}
		_, err := speakAll(ctx, a)
		return err
	}))
	seq := h.submit("default", job(""))
	nameless := receive(t, began, "the job without an id")
	h.unfinished("x", seq, lifecycle.StateRetrying) // of the stream before
	h.submit("default", job("x"))
	h.eventually("x is off the queue", func() bool { return h.messages(h.names.JobsStream()) == 1 })
	close(leave)
	for _, id := range []string{"x", nameless} {
		h.outcome(id, lifecycle.StateCompleted)
	}
	h.settled()
}

func TestJobWithoutAnIDIsNotTakenByAnotherWithItsName(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan string, 4), make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- a.Job.ID
		<-leave
		_, err := speakAll(ctx, a)
		return err
	}))
	first := h.submit("default", job(""))
	id := receive(t, began, "session")
	h.submit("default", job(id))
	h.eventually("the second message is dropped", func() bool { return h.messages(h.names.JobsStream()) == 1 })
	close(leave)
	if r := h.outcome(id, lifecycle.StateCompleted); r.StreamSeq != first {
		t.Errorf("kept sequence %d, want %d", r.StreamSeq, first)
	}
	h.settled()
	h.wantTypes(id, "started", "duplicate", "completed")
}

func TestJobWhoseMessageIsThereIsNotTakenByAnother(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 4), make(chan struct{})
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-leave
		_, err := speakAll(ctx, a)
		return err
	})
	h.start(s)
	first := h.submit("default", job("j1"))
	receive(t, began, "session")
	h.submit("default", job("j1"))
	h.eventually("the second message is dropped", func() bool { return h.messages(h.names.JobsStream()) == 1 })
	close(leave)
	if r := h.outcome("j1", lifecycle.StateCompleted); r.StreamSeq != first {
		t.Errorf("kept sequence %d, want %d", r.StreamSeq, first)
	}
	h.settled()
	h.wantTypes("j1", "started", "duplicate", "completed")
	if got := fmt.Sprint(s.ran()); got != "[j1/s1/a1]" {
		t.Error(got)
	}
}

func TestRunningJobWhosePurgedMessageComesAgainRunsOnce(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 4), make(chan struct{})
	s := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-leave
		_, err := speakAll(ctx, a)
		return err
	})
	h.start(s)
	h.submit("default", job("j1"))
	receive(t, began, "session")
	if err := h.handles.Jobs.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j1"))
	close(leave)
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	if got := fmt.Sprint(s.ran()); got != "[j1/s1/a1]" {
		t.Error(got)
	}
}
