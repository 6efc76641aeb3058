package jobs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
)

func (h *env) operator() *operate.Operator {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	o, err := operate.Open(ctx, h.nc, h.js, h.names)
	if err != nil {
		h.t.Fatal(err)
	}
	return o
}

func (h *env) retry(o *operate.Operator, id string, probe bool, want string) operate.Retried {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := o.Retry(ctx, id, probe)
	if err != nil || r.Status != want {
		h.t.Fatalf("retry of %s: %+v, %v; want %s", id, r, err, want)
	}
	return r
}

// patient makes retries wait for an hour.
func patient(o *options) {
	o.Retry = lifecycle.RetryPolicy{MaxAttempts: 5, Initial: time.Hour, Max: time.Hour}
	o.Random = func() float64 { return .999 }
}

// failsFirst fails the first attempt of each job.
func failsFirst() *script {
	return runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Number == 1 {
			connect(a)
			return failure(errors.CodeServerError, errors.PhaseRuntime)
		}
		_, err := speakAll(ctx, a)
		return err
	})
}

func TestAJobInBackoffIsDeliveredAtOnceWhenItIsRetried(t *testing.T) {
	h := newEnv(t)
	h.start(failsFirst(), patient)
	h.submit("default", job("j"))
	seq := h.state("j", lifecycle.StateRetrying).StreamSeq
	o := h.operator()
	h.retry(o, "nobody", false, operate.StatusUnknown)
	h.retry(o, "j", false, operate.StatusDelivered)
	if r := h.outcome("j", lifecycle.StateCompleted); r.Attempt != 2 || r.StreamSeq != seq {
		t.Errorf("attempt %d of message %d", r.Attempt, r.StreamSeq)
	}
	h.wantTypes("j", "started", "error", "retrying", "started", "completed")
	h.retry(o, "j", false, operate.StatusFinished)
	h.settled()
}

// A retry whose second step is lost leaves a record whose time has come.
func TestARetryThatDiesBetweenItsStepsIsRepeated(t *testing.T) {
	h := newEnv(t)
	h.start(failsFirst(), patient)
	h.submit("default", job("j"))
	r := h.state("j", lifecycle.StateRetrying)
	if !r.MakeDue(time.Now().UTC()) {
		t.Fatal("it waits no more")
	}
	h.put(r)
	// The worker sees it by itself where it comes before its nak.
	again, err := h.operator().Retry(t.Context(), "j", false)
	if err != nil || !slices.Contains([]string{operate.StatusDelivered, operate.StatusRunning, operate.StatusFinished}, again.Status) {
		t.Errorf("%+v, %v", again, err)
	}
	h.outcome("j", lifecycle.StateCompleted)
}

// onPostponed calls do when a job is about to be handed back with a delay.
type onPostponed struct {
	nopObserver
	do func(jobID string)
}

func (p onPostponed) Postponed(jobID string, _ lifecycle.State, _ time.Duration) { p.do(jobID) }

// A job can be made due between the write of its record and its nak, which has a delay.
func TestAJobMadeDueAsItIsPostponedComesThoughItsRecordCannotBeReadThen(t *testing.T) {
	h := newEnv(t)
	due := make(chan *lifecycle.Record, 1)
	h.start(failsFirst(), patient, func(o *options) {
		o.Observer = onPostponed{do: func(jobID string) {
			entry, err := h.handles.State.Get(t.Context(), jobID)
			r := new(lifecycle.Record)
			if err == nil {
				err = json.Unmarshal(entry.Value(), r)
			}
			if err == nil {
				_, err = h.handles.State.Put(t.Context(), jobID, []byte("not a record"))
			}
			if err != nil || !r.MakeDue(time.Now().UTC()) {
				t.Errorf("%+v: %v", r, err)
			}
			due <- r
		}}
	})
	h.submit("default", job("j"))
	r := receive(t, due, "retry")
	h.eventually("the job is delivered again", func() bool {
		c, err := h.js.Consumer(t.Context(), h.names.JobsStream(), "default")
		return err == nil && c.CachedInfo().Delivered.Consumer > 1
	})
	h.put(r)
	h.outcome("j", lifecycle.StateCompleted)
}

func TestRetriesOfTwoOperatorsBesideADrainAreOneAttemptEach(t *testing.T) {
	h := newEnv(t)
	runner := failsFirst()
	first := h.start(runner, patient)
	const n = 30
	for i := range n {
		h.submit("default", job(fmt.Sprint("j", i)))
	}
	for i := range n {
		h.state(fmt.Sprint("j", i), lifecycle.StateRetrying)
	}
	h.start(runner, patient)
	var wg sync.WaitGroup
	for range 2 {
		o := h.operator()
		wg.Go(func() {
			for i := range n {
				if r, err := o.Retry(context.Background(), fmt.Sprint("j", i), false); err != nil {
					t.Errorf("%+v: %v", r, err)
				}
			}
		})
	}
	wg.Go(first.end)
	wg.Wait()
	for i := range n {
		id := fmt.Sprint("j", i)
		if r := h.outcome(id, lifecycle.StateCompleted); r.Attempt != 2 || r.Crashes != 0 {
			t.Errorf("%s: attempt %d, crashes %d", id, r.Attempt, r.Crashes)
		}
	}
	second := 0
	for _, run := range runner.ran() {
		if strings.HasSuffix(run, "/a2") {
			second++
		}
	}
	if second != n {
		t.Errorf("%d second attempts of %d jobs", second, n)
	}
	h.settled()
}

func TestAJobHeldAsUnsettledGetsItsCountBackWhenItIsRetried(t *testing.T) {
	h := newEnv(t)
	seq := h.submit("default", job("j"))
	h.put(&lifecycle.Record{
		JobID: "j", Run: 1, StreamSeq: seq, Session: 5, State: lifecycle.StateReleased, Queue: "default", AppID: "app1", Attempt: 1,
		Unsettled: lifecycle.MaxUnsettled, CreatedAt: time.Now().UTC(), UpdatedAt: time.Now().UTC(),
	})
	h.start(&script{})
	if r := h.state("j", lifecycle.StateHeld); r.HeldReason != lifecycle.HeldUnsettled {
		t.Fatalf("held for %s", r.HeldReason)
	}
	h.retry(h.operator(), "j", false, operate.StatusDelivered)
	h.outcome("j", lifecycle.StateCompleted)
}

func TestAnOpenCircuitHoldsAJobThatIsRetriedUnlessItIsTheProbe(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeCreditsExhausted}
	h.start(b.runner(), func(o *options) {
		o.Circuit = circuit.Config{Failures: 5, Cooldown: time.Hour, MaxCooldown: 2 * time.Hour}
		o.Random = func() float64 { return .999 }
	})
	h.submit("default", job("j"))
	h.state("j", lifecycle.StateHeld)
	h.eventually("the circuit opens", func() bool { return len(h.events("avatar.alerts.circuit_opened.>")) == 1 })
	o := h.operator()
	if r := h.retry(o, "j", false, operate.StatusHeld); !strings.Contains(r.Message, "--probe") {
		t.Errorf("got %+v", r)
	}
	b.set("")
	h.retry(o, "j", true, operate.StatusDelivered)
	h.outcome("j", lifecycle.StateCompleted)
	h.eventually("the circuit closes", func() bool { return len(h.events("avatar.alerts.circuit_closed.>")) == 1 })
}

func TestAJobWhoseMessageIsGoneIsNotSaidToBeDelivered(t *testing.T) {
	h := newEnv(t)
	h.start(failsFirst(), patient)
	seq := h.submit("default", job("j"))
	h.state("j", lifecycle.StateRetrying)
	if err := h.handles.Jobs.DeleteMsg(t.Context(), seq); err != nil {
		t.Fatal(err)
	}
	h.retry(h.operator(), "j", false, operate.StatusLost)
}

// retriesAtOnce has each job that was postponed for longer retried before its message
// is handed back.
type retriesAtOnce struct {
	jobs.Observer
	do func(id string)
}

func (o *retriesAtOnce) Postponed(id string, state lifecycle.State, d time.Duration) {
	o.Observer.Postponed(id, state, d)
	if d > time.Minute {
		o.do(id)
	}
}

func TestARetryOrCancelBetweenAFailuresRecordAndItsNakIsNotDelayed(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		do   func(h *env, id string)
		want lifecycle.State
	}{
		{"retry", func(h *env, id string) { h.retry(h.operator(), id, false, operate.StatusDelivered) }, lifecycle.StateCompleted},
		{"cancel", func(h *env, id string) {
			if _, err := h.operator().Cancel(context.Background(), id, false); err != nil {
				h.t.Error(err)
			}
		}, lifecycle.StateCancelled},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newEnv(t)
			h.start(failsFirst(), patient, func(o *options) {
				o.Observer = &retriesAtOnce{o.Observer, func(id string) { tc.do(h, id) }}
			})
			h.submit("default", job("j"))
			h.outcome("j", tc.want)
		})
	}
}

func TestAPausedQueueDeliversNothingNotEvenWhatIsRetried(t *testing.T) {
	h := newEnv(t, "default", "other")
	h.start(failsFirst(), patient)
	h.submit("default", job("j"))
	h.state("j", lifecycle.StateRetrying)
	o := h.operator()
	if until, err := o.Pause(t.Context(), "default", operate.Forever); err != nil || time.Until(until) < 24*time.Hour {
		t.Fatal(until, err)
	}
	if _, err := o.Pause(t.Context(), "none", time.Hour); !errors.Is(err, operate.ErrNoQueue) {
		t.Errorf("got %v", err)
	}
	h.submit("default", job("new"))
	if r := h.retry(o, "j", false, operate.StatusDelivered); !strings.Contains(r.Message, "paused") {
		t.Errorf("got %+v", r)
	}
	for i := range 5 { // another queue goes on
		id := fmt.Sprint("o", i)
		h.submit("other", job(id))
		h.retryUntilDone(o, id)
	}
	if r := h.record("j"); r.State != lifecycle.StateRetrying || h.record("new") != nil {
		t.Errorf("delivered while paused: %+v, %+v", r, h.record("new"))
	}
	if was, err := o.Resume(t.Context(), "default"); err != nil || !was {
		t.Error(was, err)
	}
	if was, err := o.Resume(t.Context(), "default"); err != nil || was {
		t.Error(was, err)
	}
	h.outcome("j", lifecycle.StateCompleted)
	h.retryUntilDone(o, "new")
}

func (h *env) retryUntilDone(o *operate.Operator, id string) {
	h.t.Helper()
	h.state(id, lifecycle.StateRetrying)
	h.retry(o, id, false, operate.StatusDelivered)
	h.outcome(id, lifecycle.StateCompleted)
}

// Cancels of two operators meet the end of the job.
func TestACancelBesideACompletionLeavesOneOutcome(t *testing.T) {
	h := newEnv(t)
	h.start(&script{})
	operator := h.operator()
	const n = 40
	var wg sync.WaitGroup
	for i := range n {
		id := fmt.Sprint("j", i)
		h.submit("default", job(id))
		for range 2 {
			wg.Go(func() {
				if _, err := operator.Cancel(context.Background(), id, true); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	for i := range n {
		id := fmt.Sprint("j", i)
		r := h.until(id, func(r *lifecycle.Record) bool { return r.State.Final() })
		if r.Outcome != lifecycle.StateCancelled && r.Outcome != lifecycle.StateCompleted {
			t.Errorf("%s: %s", id, r.Outcome)
		}
	}
	h.settled()
	outcomes := make(map[string]int)
	for _, kind := range []string{"completed", "cancelled"} {
		for _, e := range h.events("avatar.events." + kind + ".>") {
			outcomes[e.subject[strings.LastIndexByte(e.subject, '.')+1:]]++
		}
	}
	for id, times := range outcomes {
		if times != 1 {
			t.Errorf("%s has %d outcomes", id, times)
		}
	}
	if len(outcomes) != n {
		t.Errorf("%d of %d jobs have an outcome", len(outcomes), n)
	}
}

func TestTwoOperatorsAndAWorkerChangeACircuitOnce(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeCreditsExhausted}
	h.start(b.runner(), func(o *options) {
		o.Circuit = circuit.Config{Failures: 5, Cooldown: time.Hour, MaxCooldown: 2 * time.Hour}
	})
	h.submit("default", job("j"))
	h.state("j", lifecycle.StateHeld)
	h.eventually("the circuit opens", func() bool { return len(h.events("avatar.alerts.circuit_opened.>")) == 1 })
	circuits, err := h.operator().Circuits(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list, err := circuits.NotClosed(t.Context(), "app1", nil)
	if err != nil || len(list) != 1 || list[0].Code != errors.CodeCreditsExhausted {
		t.Fatalf("%+v, %v", list, err)
	}
	b.set("")
	var wg sync.WaitGroup
	closed := make(chan error, 4)
	for range 4 {
		wg.Go(func() {
			_, err := circuits.Close(context.Background(), list[0].App, list[0].Region)
			closed <- err
		})
	}
	wg.Wait()
	close(closed)
	done := 0
	for err := range closed {
		switch {
		case err == nil:
			done++
		case !errors.Is(err, circuit.ErrNone):
			t.Error(err)
		}
	}
	if done != 1 {
		t.Errorf("closed %d times", done)
	}
	if _, err := circuits.Probe(t.Context(), "app1", list[0].Region); !errors.Is(err, circuit.ErrNone) {
		t.Errorf("got %v", err)
	}
	h.retry(h.operator(), "j", false, operate.StatusDelivered)
	h.outcome("j", lifecycle.StateCompleted)
	h.eventually("it is reported", func() bool { return len(h.events("avatar.alerts.circuit_closed.>")) == 1 })
}
