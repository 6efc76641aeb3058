package jobs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// ask sends a control request and returns the answer.
func (h *env) ask(id, op string) control.Reply {
	h.t.Helper()
	var msg *nats.Msg
	h.eventually("a worker is there", func() bool { // one that has just started listens soon
		var err error
		msg, err = h.nc.Request(h.names.Control(id), []byte(fmt.Sprintf(`{"op":%q}`, op)), 15*time.Second)
		if err != nil && !errors.Is(err, nats.ErrNoResponders) {
			h.t.Fatal(err)
		}
		return err == nil
	})
	var reply control.Reply
	if err := json.Unmarshal(msg.Data, &reply); err != nil {
		h.t.Fatal(err)
	}
	return reply
}

func (h *env) wantStatus(id, op, status string) control.Reply {
	h.t.Helper()
	reply := h.ask(id, op)
	if reply.Status != status || reply.JobID != id {
		h.t.Errorf("%s of %s: %+v, want %s", op, id, reply, status)
	}
	return reply
}

func TestControlAnswersForEveryStateOfAJob(t *testing.T) {
	h := newEnv(t)
	began := make(chan string, 8)
	runner := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		switch a.Job.ID {
		case "quick":
			_, err := speakAll(ctx, a)
			return err
		case "waits":
			return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
		}
		connect(a)
		a.Control.OnInterrupt(func(context.Context) (jobs.Interrupted, error) {
			return jobs.Interrupted{ReqID: "r7", LastSeq: 9}, nil
		})
		began <- a.Job.ID
		return untilDone(ctx)
	})
	slowly := func(o *options) {
		o.Retry.Initial, o.Retry.Max = natstest.Unhurried(3*time.Second), natstest.Unhurried(3*time.Second)
		o.Random = func() float64 { return 0.99 }
	}
	h.start(runner, slowly)
	h.start(runner, slowly)
	h.submit("default", job("quick"))
	h.submit("default", job("runs"))
	h.outcome("quick", lifecycle.StateCompleted)
	receive(t, began, "session")

	if r := h.wantStatus("runs", "interrupt", control.StatusInterrupted); r.ReqID != "r7" || r.LastSeq != 9 {
		t.Errorf("%+v", r)
	}
	h.wantStatus("runs", "dance", control.StatusRefused)
	h.wantStatus("runs", "cancel", control.StatusCancelled)
	if r := h.outcome("runs", lifecycle.StateCancelled); !r.CancelRequested {
		t.Errorf("the record does not say that it was wished: %+v", r)
	}
	if r := h.wantStatus("quick", "cancel", control.StatusFinished); r.Outcome != string(lifecycle.StateCompleted) {
		t.Errorf("%+v", r)
	}
	h.wantStatus("quick", "interrupt", control.StatusNotRunning)
	h.submit("default", job("waits"))
	h.state("waits", lifecycle.StateRetrying)
	h.wantStatus("waits", "cancel", control.StatusRequested)
	h.wantStatus("waits", "cancel", control.StatusRequested)
	h.outcome("waits", lifecycle.StateCancelled)
	h.wantStatus("not-yet", "cancel", control.StatusRequested)
	h.submit("default", job("not-yet"))
	h.outcome("not-yet", lifecycle.StateCancelled)
	h.settled()
	h.wantTypes("runs", "started", "cancelled")
	h.wantTypes("waits", "started", "error", "retrying", "cancelled")
	h.wantTypes("not-yet", "cancelled")
}

func TestCancelBeforeAReplayEndsTheReplay(t *testing.T) {
	h := newEnv(t)
	h.put(&lifecycle.Record{JobID: "j1", Run: 1, State: lifecycle.StateReleased, CancelRequested: true})
	h.submit("default", job("j1"), "Avatar-Run", "3")
	h.start(&script{})
	if r := h.outcome("j1", lifecycle.StateCancelled); r.Run != 3 {
		t.Errorf("run %d", r.Run)
	}
	h.settled()
}

// Both replays were claimed, and neither was published when the cancel came.
func TestACancelEndsEachReplayThatHasNotBegun(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	h.put(&lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 99, Session: 1, Attempt: 1, State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered,
		UpdatedAt: time.Now().UTC(), LastError: &event.Error{JobID: "j1", Run: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig},
	})
	if r := h.wantStatus("j1", "cancel", control.StatusFinished); r.Outcome != string(lifecycle.StateDeadLettered) {
		t.Errorf("without a replay: %+v", r)
	}
	if _, err := h.handles.State.Put(t.Context(), lifecycle.ClaimPrefix+"j1", []byte(`{"claims":[{"run":2,"dead_letter":1},{"run":3,"dead_letter":2}]}`)); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("j1", "cancel", control.StatusRequested)
	for run := 2; run <= 3; run++ {
		h.submit("default", job("j1"), "Avatar-Run", fmt.Sprint(run))
		if r := h.until("j1", func(r *lifecycle.Record) bool { return r.Run == run && r.State.Final() }); r.Outcome != lifecycle.StateCancelled {
			t.Fatalf("run %d: %s", run, r.Outcome)
		}
		h.settled()
	}
	h.wantTypes("j1", "dead_lettered", "cancelled", "cancelled")
	if ran := runner.ran(); len(ran) != 0 {
		t.Errorf("sessions %v", ran)
	}
	h.wantStatus("j1", "cancel", control.StatusCancelled)
}

func TestCancelWrittenByAnybodyReachesTheSessionAtItsNextCheckpoint(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}), make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		close(began)
		<-leave
		if err := speak(ctx, a, 1); err != nil {
			return err
		}
		return untilDone(ctx)
	}))
	h.submit("default", job("j1", spoken(3)))
	receive(t, began, "session")
	r := h.record("j1")
	r.CancelRequested = true
	h.put(r)
	close(leave)
	if r := h.outcome("j1", lifecycle.StateCancelled); r.Checkpoint != 1 {
		t.Errorf("checkpoint %d", r.Checkpoint)
	}
	h.settled()
}

func TestConnectionIDIsWrittenDownWhileASessionLasts(t *testing.T) {
	h := newEnv(t)
	leave := make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		<-leave
		return speak(ctx, a, 1)
	}))
	h.submit("default", job("j1"))
	h.until("j1", func(r *lifecycle.Record) bool { return r.ConnectionID == "c-j1-1" && r.State == lifecycle.StateRunning })
	close(leave)
	h.outcome("j1", lifecycle.StateCompleted)
}

func TestCancelThatWantsNoReplyIsNoted(t *testing.T) {
	h := newEnv(t)
	began := make(chan struct{}, 4)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- struct{}{}
		return untilDone(ctx)
	}))
	h.submit("default", job("runs"))
	receive(t, began, "session")
	for _, id := range []string{"runs", "queued1", "queued2"} {
		if err := h.nc.Publish(h.names.Control(id), []byte(`{"op":"cancel"}`)); err != nil {
			t.Fatal(err)
		}
		h.until(id, func(r *lifecycle.Record) bool { return r.CancelRequested || r.State == lifecycle.StateCancelled })
	}
	h.outcome("runs", lifecycle.StateCancelled)
	h.submit("default", job("queued1"))
	h.outcome("queued1", lifecycle.StateCancelled)
}
