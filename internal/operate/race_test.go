package operate_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/operate"
)

func jobIDs(n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprint("j", i)
	}
	return ids
}

// What a cancel answers is what the job's record says in the end, however close it comes
// to the end of the session.
func TestACancelBesideACompletionHasOneOutcome(t *testing.T) {
	f := newFleet(t)
	ids := jobIDs(24)
	begin := make(chan struct{})
	var running sync.WaitGroup
	running.Add(8)
	var started atomic.Int32
	f.start("w-1", func(ctx context.Context, a *jobs.Attempt) error {
		if started.Add(1) <= 8 {
			running.Done()
		}
		select {
		case <-begin:
			return nil
		case <-ctx.Done():
			return errors.Wrap(errors.CodeConnectionClosed, errors.PhaseRuntime, context.Cause(ctx), "ended")
		}
	})
	for _, id := range ids {
		f.submit(id)
	}
	running.Wait()
	operators := []*operate.Operator{f.operator(), f.operator()}
	replies := make([][]control.Reply, 2)
	var wg sync.WaitGroup
	for k, o := range operators {
		replies[k] = make([]control.Reply, len(ids))
		wg.Go(func() {
			for i, id := range ids {
				if i == 4 && k == 0 {
					close(begin)
				}
				var err error
				if replies[k][i], err = o.Cancel(context.Background(), id, false); err != nil {
					t.Errorf("cancelling %s: %v", id, err)
				}
			}
		})
	}
	wg.Wait()
	f.oneOutcomeEach(ids)
	for k := range replies {
		for i, id := range ids {
			got, r := replies[k][i], f.outcome(id)
			switch got.Status {
			case control.StatusFinished:
				if got.Outcome != string(r.Outcome) {
					t.Errorf("%s: finished as %s, its record says %s", id, got.Outcome, r.Outcome)
				}
			case control.StatusCancelled:
				if r.Outcome != lifecycle.StateCancelled {
					t.Errorf("%s: cancelled, its record says %s", id, r.Outcome)
				}
			case control.StatusRequested:
			default:
				t.Errorf("%s: %+v", id, got)
			}
		}
	}
}

// A job that two operators retry while its worker drains has one more attempt.
func TestARetryBesideADrainIsOneAttempt(t *testing.T) {
	f := newFleet(t)
	ids := jobIDs(16)
	f.start("w-1", failsFirst)
	for _, id := range ids {
		f.submit(id)
	}
	for _, id := range ids {
		f.state(id, lifecycle.StateRetrying)
	}
	f.start("w-2", failsFirst)
	var wg sync.WaitGroup
	for range 2 {
		o := f.operator()
		wg.Go(func() {
			for _, id := range ids {
				if r, err := o.Retry(context.Background(), id, false); err != nil || !r.Done() && r.Status != operate.StatusFinished {
					t.Errorf("retrying %s: %+v, %v", id, r, err)
				}
			}
		})
	}
	o := f.operator()
	wg.Go(func() {
		if d, err := o.Drain(context.Background(), "w-1"); err != nil || d.WorkerID != "w-1" {
			t.Errorf("%+v, %v", d, err)
			return
		}
		if err := o.Empty(context.Background(), "w-1"); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	f.oneOutcomeEach(ids)
	for _, id := range ids {
		if r := f.outcome(id); r.Outcome != lifecycle.StateCompleted || r.Attempt != 2 || r.Crashes != 0 {
			t.Errorf("%s: %s after %d attempts, %d crashes", id, r.Outcome, r.Attempt, r.Crashes)
		}
	}
}

// Of several replays of a letter, corrected in different ways, one is a run.
func TestAReplayBesideAReplayIsOneRun(t *testing.T) {
	f := newFleet(t)
	const n = 6
	for i := range n {
		if _, err := f.js.PublishMsg(t.Context(), &nats.Msg{Subject: f.names.DLQ("config", "avatarNotFound"), Header: nats.Header{
			"Avatar-Job-Id": {fmt.Sprint("j", i)}, "Avatar-Run": {"1"}, "Avatar-Subject": {f.names.Jobs("default")},
		}, Data: []byte(`{"avatar_id":"gone","audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000},"output":{"discard":{}}}`)}); err != nil {
			t.Fatal(err)
		}
	}
	var replayed [n]atomic.Int32
	natstest.Together(4, func(k int) {
		store := dlq.NewStore(f.js, f.names, nil)
		for seq := uint64(1); seq <= n; seq++ {
			var correct func(dlq.Letter) ([]byte, error)
			if k%2 == 0 {
				correct = func(l dlq.Letter) ([]byte, error) {
					s, err := dlq.ParseSetting(fmt.Sprint("avatar_id=a", k))
					if err != nil {
						return nil, err
					}
					return dlq.Apply(l.Data, []dlq.Setting{s})
				}
			}
			r, err := store.Replay(context.Background(), seq, dlq.ReplayOptions{Correct: correct})
			switch {
			case errors.Is(err, dlq.ErrNoLetter): // another was quicker
			case err != nil:
				t.Errorf("replaying %d: %v", seq, err)
			case r.Status == dlq.StatusReplayed:
				replayed[seq-1].Add(1)
			}
		}
	})
	for i := range replayed {
		if got := replayed[i].Load(); got != 1 {
			t.Errorf("letter %d: %d replays say that they did it", i+1, got)
		}
	}
	f.start("w-1", works)
	f.oneOutcomeEach(jobIDs(n))
	for _, id := range jobIDs(n) {
		if r := f.outcome(id); r.Run != 2 || r.Session != 1 || r.Outcome != lifecycle.StateCompleted {
			t.Errorf("%s: run %d, session %d, %s", id, r.Run, r.Session, r.Outcome)
		}
	}
}

// Nothing starts in a queue that is paused, also what is retried; and what was retried
// meanwhile is one attempt once the pause ends.
func TestAPauseBesideARedeliveryIsOneAttemptAfterIt(t *testing.T) {
	f := newFleet(t)
	ids := jobIDs(12)
	var paused, late atomic.Int32
	f.start("w-1", func(ctx context.Context, a *jobs.Attempt) error {
		late.Add(paused.Load())
		return failsFirst(ctx, a)
	})
	for _, id := range ids {
		f.submit(id)
	}
	for _, id := range ids {
		f.state(id, lifecycle.StateRetrying)
	}
	var wg sync.WaitGroup
	one, two := f.operator(), f.operator()
	wg.Go(func() {
		for _, id := range ids {
			if r, err := one.Retry(context.Background(), id, false); err != nil || !r.Done() && r.Status != operate.StatusFinished {
				t.Errorf("retrying %s: %+v, %v", id, r, err)
			}
		}
	})
	wg.Go(func() {
		if _, err := two.Pause(context.Background(), "default", time.Hour); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	// What was delivered before the pause may still run; after that, nothing.
	attempts := 0
	for _, id := range ids {
		r := f.until(id, func(r lifecycle.Record) bool { return r.State.Final() || r.State == lifecycle.StateRetrying })
		if r.State.Final() {
			attempts++
		}
	}
	paused.Store(1)
	f.submit("later")
	for _, id := range ids {
		if r, err := one.Retry(context.Background(), id, false); err != nil {
			t.Errorf("%+v, %v", r, err)
		}
	}
	consumer, err := f.h.Jobs.Consumer(t.Context(), "default")
	if err != nil {
		t.Fatal(err)
	}
	if info := consumer.CachedInfo(); !info.Paused || info.NumPending != 1 {
		t.Errorf("paused %t, %d jobs pending", info.Paused, info.NumPending)
	}
	paused.Store(0)
	if was, err := two.Resume(t.Context(), "default"); err != nil || !was {
		t.Errorf("%t, %v", was, err)
	}
	f.state("later", lifecycle.StateRetrying) // its first attempt came after the pause
	if r, err := one.Retry(t.Context(), "later", false); err != nil || r.Status != operate.StatusDelivered {
		t.Errorf("%+v, %v", r, err)
	}
	f.oneOutcomeEach(append(ids, "later"))
	for _, id := range ids {
		if r := f.outcome(id); r.Attempt != 2 || r.Outcome != lifecycle.StateCompleted {
			t.Errorf("%s: %s after %d attempts", id, r.Outcome, r.Attempt)
		}
	}
	t.Logf("%d of %d were tried again before the pause", attempts, len(ids))
	if late.Load() > 0 {
		t.Errorf("%d attempts began in the pause", late.Load())
	}
}

// Two operators who do opposite things to a job leave it with one outcome.
func TestTwoOperatorsAtOnceLeaveOneOutcome(t *testing.T) {
	f := newFleet(t)
	ids := jobIDs(16)
	f.start("w-1", failsFirst)
	for _, id := range ids {
		f.submit(id)
	}
	for _, id := range ids {
		f.state(id, lifecycle.StateRetrying)
	}
	one, two := f.operator(), f.operator()
	cancelled := make([]control.Reply, len(ids))
	natstest.Together(3, func(k int) {
		for i, id := range ids {
			var err error
			switch k {
			case 0:
				_, err = one.Retry(context.Background(), id, false)
			case 1:
				cancelled[i], err = two.Cancel(context.Background(), id, false)
			case 2: // the queue is paused and resumed meanwhile
				switch i % 4 {
				case 0:
					_, err = two.Pause(context.Background(), "default", time.Minute)
				case 2:
					_, err = one.Resume(context.Background(), "default")
				}
			}
			if err != nil {
				t.Errorf("%s: %v", id, err)
			}
		}
	})
	if _, err := one.Resume(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids { // a cancel is noted, and done when the job is next delivered
		if _, err := one.Retry(t.Context(), id, false); err != nil {
			t.Fatal(err)
		}
	}
	f.oneOutcomeEach(ids)
	for i, id := range ids {
		if r := f.outcome(id); cancelled[i].Status == control.StatusFinished && cancelled[i].Outcome != string(r.Outcome) ||
			cancelled[i].Status == control.StatusCancelled && r.Outcome != lifecycle.StateCancelled {
			t.Errorf("%s: %+v, its record says %s", id, cancelled[i], r.Outcome)
		}
	}
}

// A letter that one operator replays while another removes it is gone, and its job runs
// once if a replay says so, and else not at all.
func TestARemovalBesideAReplayIsOneRunOrNone(t *testing.T) {
	f := newFleet(t)
	const n = 12
	for i := range n {
		if _, err := f.js.PublishMsg(t.Context(), &nats.Msg{Subject: f.names.DLQ("config", "avatarNotFound"), Header: nats.Header{
			"Avatar-Job-Id": {fmt.Sprint("j", i)}, "Avatar-Run": {"1"}, "Avatar-Subject": {f.names.Jobs("default")},
		}, Data: []byte(`{"avatar_id":"gone","audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000},"output":{"discard":{}}}`)}); err != nil {
			t.Fatal(err)
		}
	}
	var replayed, removed [n]atomic.Int32
	natstest.Together(4, func(k int) {
		store := dlq.NewStore(f.js, f.names, nil)
		for seq := uint64(1); seq <= n; seq++ {
			var err error
			switch {
			// Each of the two is the first now and then.
			case (k+int(seq))%2 == 0:
				if err = store.Remove(context.Background(), seq); err == nil {
					removed[seq-1].Add(1)
				}
			default:
				var r dlq.Result
				if r, err = store.Replay(context.Background(), seq, dlq.ReplayOptions{}); err == nil && r.Status == dlq.StatusReplayed {
					replayed[seq-1].Add(1)
				}
			}
			if err != nil && !errors.Is(err, dlq.ErrNoLetter) {
				t.Errorf("letter %d: %v", seq, err)
			}
		}
	})
	if info, err := f.js.Stream(t.Context(), f.names.DLQStream()); err != nil || info.CachedInfo().State.Msgs != 0 {
		t.Errorf("%v, letters are left: %+v", err, info.CachedInfo().State)
	}
	var ran []string
	for i := range n {
		switch does := replayed[i].Load(); {
		case does > 1 || removed[i].Load() > 1:
			t.Errorf("letter %d: %d replays and %d removals say that they did it", i+1, does, removed[i].Load())
		case does == 1:
			ran = append(ran, fmt.Sprint("j", i))
		case removed[i].Load() == 0:
			t.Errorf("letter %d is gone, and neither operator reports it", i+1)
		}
	}
	if info, err := f.js.Stream(t.Context(), f.names.JobsStream()); err != nil || info.CachedInfo().State.Msgs != uint64(len(ran)) {
		t.Fatalf("%v, %d jobs are in the queue, and %d replays say that they did it", err, info.CachedInfo().State.Msgs, len(ran))
	}
	t.Logf("%d of %d were replayed", len(ran), n)
	f.start("w-1", works)
	f.oneOutcomeEach(ran)
	for _, id := range ran {
		if r := f.outcome(id); r.Run != 2 || r.Session != 1 || r.Outcome != lifecycle.StateCompleted {
			t.Errorf("%s: run %d, session %d, %s", id, r.Run, r.Session, r.Outcome)
		}
	}
}

// Two operators who drain one worker at once, while jobs begin, empty it once: each of its
// jobs has one outcome and lost no attempt.
func TestTwoDrainsAtOnceAreOne(t *testing.T) {
	f := newFleet(t)
	ids := jobIDs(16)
	begin := make(chan struct{})
	var running sync.WaitGroup
	running.Add(8)
	var started atomic.Int32
	f.start("w-1", func(ctx context.Context, _ *jobs.Attempt) error {
		if started.Add(1) <= 8 {
			running.Done()
		}
		select {
		case <-begin:
			return nil
		case <-ctx.Done():
			return errors.Wrap(errors.CodeConnectionClosed, errors.PhaseRuntime, context.Cause(ctx), "ended")
		}
	})
	for _, id := range ids {
		f.submit(id)
	}
	running.Wait()
	f.start("w-2", works)
	operators := []*operate.Operator{f.operator(), f.operator()}
	natstest.Together(len(operators), func(k int) {
		d, err := operators[k].Drain(context.Background(), "w-1")
		if err != nil || d.WorkerID != "w-1" {
			t.Errorf("%+v, %v", d, err)
		}
	})
	close(begin)
	natstest.Together(len(operators), func(k int) {
		if err := operators[k].Empty(context.Background(), "w-1"); err != nil {
			t.Error(err)
		}
	})
	f.oneOutcomeEach(ids)
	for _, id := range ids {
		if r := f.outcome(id); r.Outcome != lifecycle.StateCompleted || r.Attempt != 1 || r.Crashes != 0 {
			t.Errorf("%s: %s after %d attempts, %d crashes", id, r.Outcome, r.Attempt, r.Crashes)
		}
	}
}
