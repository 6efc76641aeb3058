package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
)

// impatient lets a worker wait no longer than a second for a write.
func impatient(o *options) { o.SettleTimeout = time.Second }

// largest sets the largest value that the bucket of records takes; -1: any.
func (h *env) largest(bytes int32) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := h.js.Stream(ctx, "KV_"+h.names.StateBucket())
	if err == nil {
		config := s.CachedInfo().Config
		config.MaxMsgSize = bytes
		_, err = h.js.UpdateStream(ctx, config)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

func TestSessionEndsWhenItsRecordIsGoneAndTheJobRunsAgain(t *testing.T) {
	h := newEnv(t)
	began, ended := make(chan struct{}, 8), make(chan error, 8)
	gone := make(chan struct{})
	s := &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		began <- struct{}{}
		select {
		case <-gone:
		case <-ctx.Done():
		}
		report, err := speakAll(ctx, a)
		ended <- err
		return report, err
	}}
	h.start(s, impatient)
	h.submit("default", job("j1", spoken(3)))
	receive(t, began, "session")
	if err := h.js.DeleteKeyValue(t.Context(), h.names.StateBucket()); err != nil {
		t.Fatal(err)
	}
	close(gone)
	if err := receive(t, ended, "end of a session whose record is gone"); err == nil {
		t.Error("the session went on without a record")
	}
	h.ensure()
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
}

func TestWhatWasSpokenIsKeptThoughItsWriteFailed(t *testing.T) {
	h := newEnv(t)
	var spokenOnce []int
	s := &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		connect(a)
		for n := a.Checkpoint + 1; n <= len(a.Job.AudioSpecs()); n++ {
			spokenOnce = append(spokenOnce, n)
			if a.Session == 1 && n == 2 {
				h.largest(16)
			}
			err := speak(ctx, a, n)
			if a.Session == 1 && n == 2 {
				h.largest(-1)
			}
			if err != nil {
				return jobs.Report{}, err
			}
		}
		return jobs.Report{}, nil
	}}
	h.start(s, impatient)
	h.submit("default", job("j1", spoken(3)))
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	if got := fmt.Sprint(spokenOnce); got != "[1 2 3]" {
		t.Errorf("spoken: %s", got)
	}
	if r.Attempt != 1 || r.Crashes != 0 || r.UtterancesDone != 3 {
		t.Errorf("attempt %d, %d crashes, %d utterances", r.Attempt, r.Crashes, r.UtterancesDone)
	}
	h.wantTypes("j1", "started", "released", "started", "completed")
}

func TestWhatWasNotBegunIsNotGivenUp(t *testing.T) {
	h := newEnv(t)
	s := &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		if a.Session == 1 {
			h.largest(16)
			defer h.largest(-1)
		}
		return speakAll(ctx, a)
	}}
	h.start(s, impatient)
	h.submit("default", job("j1", `"on_redelivery":"give_up"`))
	h.outcome("j1", lifecycle.StateCompleted)
	if got := fmt.Sprint(s.ran()); got != "[j1/s1/a1 j1/s2/a1]" {
		t.Error(got)
	}
}

func TestWriteOfAValueThatIsGoneIsAConflict(t *testing.T) {
	h := newEnv(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	store := kv.NewStore(h.js, h.handles.State, time.Second)
	record := lifecycle.Record{JobID: "j", Labels: map[string]string{"long": strings.Repeat("x", 500)}}
	revision, err := store.Put(ctx, "j", record, 0)
	if err != nil {
		t.Fatal(err)
	}
	tries := make(chan *nats.Msg, 1024)
	sub, err := h.nc.ChanSubscribe("$KV."+h.names.StateBucket()+".j", tries)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	h.largest(200)
	done := make(chan error, 1)
	go func() {
		_, err := store.Put(ctx, "j", record, revision)
		done <- err
	}()
	receive(t, tries, "first try of the write")
	receive(t, tries, "second try of the write")
	if err := h.handles.State.Purge(ctx, "j"); err != nil {
		t.Fatal(err)
	}
	h.largest(-1)
	if err := receive(t, done, "end of the write"); !errors.Is(err, kv.ErrConflict) {
		t.Errorf("%v, want a conflict", err)
	}
}

// It was paid for, so it counts among those without a result.
func TestSessionWithoutAConnectionIDWasOpenedAllTheSame(t *testing.T) {
	h := newEnv(t)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		a.Progress.Connected("", "us-west")
		return untilDone(ctx)
	}), func(o *options) { o.Drain = time.Millisecond })
	h.submit("default", job("j1"))
	h.until("j1", func(r *lifecycle.Record) bool { return !r.ConfirmedAt.IsZero() })
	w.end()
	if r := h.state("j1", lifecycle.StateReleased); r.Unsettled != 1 {
		t.Errorf("%d sessions without a result", r.Unsettled)
	}
}
