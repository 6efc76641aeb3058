package jobs_test

import (
	"testing"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

func TestReplayOfAJobWithARunPastTheLastIsItsNextRun(t *testing.T) {
	h := newEnv(t)
	h.start(&script{}, h.realLetters)
	h.submit("default", job("j1"), "Avatar-Run", "2147483647")
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	r, err := dlq.NewStore(h.js, h.names, nil).Replay(t.Context(), 1, dlq.ReplayOptions{})
	if err != nil || r.Status != dlq.StatusReplayed {
		t.Fatalf("%+v, %v", r, err)
	}
	h.until("j1", func(r *lifecycle.Record) bool { return r.Run == 2 && r.State == lifecycle.StateCompleted })
	h.settled()
}

func TestReplayPublishesTheOutcomeThatItsRunBeforeCouldNotPublish(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ago  time.Duration
		want []string
	}{
		"died just now":                     {0, []string{"dead_lettered", "started", "completed"}},
		"longer ago than events last, half": {84 * 2 * time.Hour, []string{"started", "completed"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			at := time.Now().Add(-c.ago).UTC()
			h.put(&lifecycle.Record{
				JobID: "j1", Run: 1, StreamSeq: 99, Session: 1, Attempt: 1, State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered,
				Reason: lifecycle.ReasonPermanent, UpdatedAt: at,
				LastError: &event.Error{JobID: "j1", Run: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseHandshake},
			})
			h.start(&script{})
			h.submit("default", job("j1"), "Avatar-Run", "2")
			h.until("j1", func(r *lifecycle.Record) bool { return r.Run == 2 && r.State == lifecycle.StateCompleted })
			h.settled()
			h.wantTypes("j1", c.want...)
			for _, e := range h.events("avatar.events.dead_lettered.j1") {
				if e.id != "j1.run1.s1.dead_lettered" || e.body["run"] != 1.0 {
					t.Errorf("%s: %v", e.id, e.body)
				}
			}
		})
	}
}
