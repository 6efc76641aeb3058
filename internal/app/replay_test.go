package app_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/jobs/lifecycle"
)

// An id is free again once its record has aged out; the dead letters are kept
// longer.
func TestBothDeadLettersOfAnIDThatWasUsedAgainAreReplayed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	for i, avatar := range []string{"fail-avatarNotFound", "fail-appIDMismatch"} {
		f.publish("greeting", avatar, nil)
		f.until("its dead letter is there", func() bool { return len(f.deadLetters("greeting")) == i+1 })
		f.outcome("greeting")
		if i == 0 {
			f.forget("greeting")
		}
	}
	for _, avatar := range []string{"fail-avatarNotFound", "fail-appIDMismatch"} {
		if n := len(f.sessions(avatar)); n > 1 {
			t.Errorf("%d sessions of %s", n, avatar)
		}
	}
	store := dlq.NewStore(f.js, f.names, nil)
	var bodies []string
	for _, letter := range f.deadLetters("greeting") {
		meta, err := letter.Metadata()
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, string(letter.Data()))
		if r, err := store.Replay(f.ctx, meta.Sequence.Stream, dlq.ReplayOptions{}); err != nil || r.Status != dlq.StatusReplayed {
			t.Fatalf("%+v %v", r, err)
		}
	}
	// Each fails again, as before: by its new letter it is known that it ran.
	f.until("both ran", func() bool {
		ran := map[string]bool{}
		for _, letter := range f.deadLetters("greeting") {
			if letter.Headers().Get("Avatar-Run") != "1" {
				ran[string(letter.Data())] = true
			}
		}
		return ran[bodies[0]] && ran[bodies[1]]
	})
	f.until("the queue is empty", func() bool {
		s, err := f.js.Stream(f.ctx, f.names.JobsStream())
		return err == nil && s.CachedInfo().State.Msgs == 0
	})
	if r := f.record("greeting"); r.State != lifecycle.StateDeadLettered || r.Run < 3 {
		t.Errorf("run %d: %s", r.Run, r.State)
	}
}

// forget removes a job's record, as its age would.
func (f *fleet) forget(id string) {
	f.t.Helper()
	s, err := f.js.Stream(f.ctx, "KV_"+f.names.StateBucket())
	if err == nil {
		err = s.Purge(f.ctx, jetstream.WithPurgeSubject("$KV."+f.names.StateBucket()+"."+id))
	}
	if err != nil {
		f.t.Fatal(err)
	}
}
