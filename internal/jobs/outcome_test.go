package jobs_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
)

func TestCompletedJobIsPublishedAndAcknowledged(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	h.submit("default", job("j1", spoken(3), `"labels":{"k":"v"}`))
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	h.wantTypes("j1", "started", "completed")
	if r.Attempt != 1 || r.Session != 1 || r.Checkpoint != 3 || len(r.ConnectionIDs) != 1 {
		t.Errorf("record is %+v", r)
	}
	body := h.events("avatar.events.completed.j1")[0].body
	if len(body["utterances"].([]any)) != 3 || body["attempts"] != 1.0 || body["session_ms"] != 1.0 {
		t.Errorf("completed event is %v", body)
	}
	if got := runner.ran(); fmt.Sprint(got) != "[j1/s1/a1]" {
		t.Errorf("ran %v", got)
	}
}

func TestFailedAttemptIsRetriedThenCompletes(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Number < 3 {
			return failure(errors.CodeUpstreamError, errors.PhaseRuntime)
		}
		_, err := speakAll(ctx, a)
		return err
	}))
	h.submit("default", job("j1"))
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	h.wantTypes("j1", "started", "error", "retrying", "started", "error", "retrying", "started", "completed")
	if r.Attempt != 3 || r.Session != 3 {
		t.Errorf("attempt %d, session %d", r.Attempt, r.Session)
	}
	for i, e := range h.events("avatar.errors.>") {
		if e.body["attempt"] != float64(i+1) || e.body["max_attempts"] != 5.0 || e.body["action"] != "retry" || e.body["retry_at"] == nil {
			t.Errorf("error event %d is %v", i, e.body)
		}
	}
}

func TestExhaustedJobBecomesOneDeadLetter(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
	}))
	h.submit("default", job("j1", `"max_attempts":2`))
	r := h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	if r.Reason != lifecycle.ReasonAttemptsExhausted || r.Attempt != 2 {
		t.Errorf("reason %s after %d attempts", r.Reason, r.Attempt)
	}
	h.wantTypes("j1", "started", "error", "retrying", "started", "error", "dead_lettered")
	if n := h.messages(h.names.DLQStream()); n != 1 {
		t.Errorf("%d dead letters", n)
	}
}

func TestPermanentFailureIsNeverRetried(t *testing.T) {
	h := newEnv(t)
	runner := runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeAvatarNotFound, errors.PhaseHandshake)
	})
	h.start(runner)
	h.submit("default", job("j1"))
	r := h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	if r.Reason != lifecycle.ReasonPermanent || len(runner.ran()) != 1 {
		t.Errorf("reason %s, ran %v", r.Reason, runner.ran())
	}
}

func TestInvalidJobIsDeadLetteredWithoutASession(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	h.submit("default", `{"id":"j1","avatar":"typo"}`, "Nats-Msg-Id", "j1")
	h.submit("default", job("j2", `"app_id":"nobody"`))
	for _, id := range []string{"j1", "j2"} {
		r := h.outcome(id, lifecycle.StateDeadLettered)
		if r.Reason != lifecycle.ReasonInvalidJob || r.LastError.Phase != errors.PhaseJob {
			t.Errorf("%s: reason %s, %+v", id, r.Reason, r.LastError)
		}
	}
	h.settled()
	h.wantTypes("j1", "error", "dead_lettered")
	if len(runner.ran()) != 0 {
		t.Errorf("ran %v", runner.ran())
	}
}

// counted is an Observer that counts attempts.
type counted struct {
	nopObserver
	attempts *atomic.Int32
}

func (c counted) AttemptDone(errors.Code, errors.Class, errors.Phase) { c.attempts.Add(1) }

func TestDuplicateOfAnInvalidJobIsNoFailedAttempt(t *testing.T) {
	h := newEnv(t)
	var attempts atomic.Int32
	h.start(&script{}, func(o *options) { o.Observer = counted{attempts: &attempts} })
	for range 2 {
		h.submit("default", `{"avatar":"typo"}`, jobspec.HeaderJobID, "j1")
		h.settled()
	}
	h.wantTypes("j1", "error", "dead_lettered", "duplicate")
	if n := attempts.Load(); n != 1 {
		t.Errorf("%d attempts failed, want 1", n)
	}
}

func TestInvalidMessageTakesNoJobsPlace(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	h.submit("default", `{"id":"order-7","avatar":"typo"}`)
	h.eventually("the typo is dead-lettered", func() bool { return h.messages(h.names.DLQStream()) == 1 })
	h.submit("default", job("order-7"))
	h.outcome("order-7", lifecycle.StateCompleted)
	h.submit("default", `{"id":"order-7","avatar":"again"}`)
	h.eventually("so is the next", func() bool { return h.messages(h.names.DLQStream()) == 2 })
	h.settled()
	h.wantTypes("order-7", "started", "completed")
	if got := fmt.Sprint(runner.ran()); got != "[order-7/s1/a1]" {
		t.Errorf("ran %s", got)
	}
}

func TestDeadlineExpiresAJobUnlessItIsIgnored(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	past := fmt.Sprintf(`"deadline":%q`, time.Now().Add(-time.Hour).UTC().Format(time.RFC3339))
	h.submit("default", job("late", past))
	h.submit("default", job("anyway", past), strings.ToLower(jobspec.HeaderIgnoreDeadline), "Yes")
	h.outcome("late", lifecycle.StateExpired)
	h.outcome("anyway", lifecycle.StateCompleted)
	h.settled()
	h.wantTypes("late", "expired")
	if got := fmt.Sprint(runner.ran()); got != "[anyway/s1/a1]" {
		t.Errorf("ran %s", got)
	}
}

// As NTP does it after a virtual machine was paused.
func TestAWorkersClockThatIsSetForwardExpiresNoJob(t *testing.T) {
	h := newEnv(t)
	var ahead atomic.Int64
	w := h.start(&script{}, func(o *options) {
		o.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	h.eventually("ready", func() bool { return w.Ready() == nil })
	ahead.Store(int64(time.Hour))
	h.submit("default", job("j1", fmt.Sprintf(`"deadline":%q`, time.Now().Add(30*time.Minute).UTC().Format(time.RFC3339))))
	h.state("j1", lifecycle.StateCompleted)
}

func TestTheLedgerGoesByTheServersClock(t *testing.T) {
	h := newEnv(t)
	var now func() time.Time
	w := h.start(&script{}, func(o *options) {
		o.Now = func() time.Time { return time.Now().Add(-30 * time.Minute) }
		o.Ledger = func(clock func() time.Time) ledger.Ledger {
			now = clock
			return usage.NewLedger(usage.Options{JS: h.js, Names: h.names, Now: clock, Window: time.Minute})
		}
	})
	h.eventually("ready", func() bool { return w.Ready() == nil })
	if off := time.Until(now()).Abs(); off > time.Minute {
		t.Errorf("off by %s", off)
	}
}

func TestEveryActionOfAPolicyIsCarriedOut(t *testing.T) {
	for _, action := range errors.PolicyActions() {
		t.Run(string(action), func(t *testing.T) {
			h := newEnv(t)
			table, err := errors.NewTable(errors.Policy{errors.CodeServerError: {Action: action}})
			if err != nil {
				t.Fatal(err)
			}
			h.start(runnerFunc(func(_ context.Context, a *jobs.Attempt) error {
				connect(a)
				return failure(errors.CodeServerError, errors.PhaseRuntime)
			}), func(o *options) {
				o.Table, o.Retry.Initial, o.Retry.Max = table, time.Hour, time.Hour // as the action has left it
			})
			h.submit("default", job("j1"))
			r := h.until("j1", func(r *lifecycle.Record) bool { return r.State != lifecycle.StateRunning })
			if r.LastError == nil || r.LastError.Action != action || r.State == lifecycle.StateReleased {
				t.Errorf("the job is %s: %+v", r.State, r.LastError)
			}
		})
	}
}

func TestRetryAfterPastTheDeadlineExpiresAtOnce(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		e := errors.Newf(errors.CodeServerError, errors.PhaseRuntime, "busy")
		e.HTTPStatus, e.RetryAfter = 503, 30*time.Minute
		return e
	}))
	soon := time.Now().Add(10 * time.Minute).UTC().Format(time.RFC3339)
	h.submit("default", job("j1", fmt.Sprintf(`"deadline":%q`, soon)))
	r := h.outcome("j1", lifecycle.StateExpired)
	h.settled()
	h.wantTypes("j1", "started", "error", "expired")
	want := "busy; the backend asks to wait 30m0s, until after the deadline " + soon
	if r.LastError == nil || r.LastError.Code != errors.CodeServerError || r.LastError.Message != want {
		t.Errorf("last error %+v, want %q", r.LastError, want)
	}
	for _, e := range h.events(h.names.Events(event.TypeExpired, "j1")) {
		last, _ := e.body["last_error"].(map[string]any)
		if e.body["deadline"] != soon || last["message"] != want {
			t.Errorf("%v", e.body)
		}
	}
}

func TestTheEventOfADeadLetterHasWhatTheBackendSaid(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return errors.FromServerError(errors.PhaseHandshake, 0, "avatar not found: gone")
	}))
	h.submit("default", job("j1"))
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	list := h.events(h.names.Events(event.TypeDeadLettered, "j1"))
	if len(list) != 1 || list[0].body["message"] != "the backend reported error 0" || list[0].body["server_detail"] != "avatar not found: gone" {
		t.Errorf("%+v", list)
	}
}

func TestMessageWithAnotherJobsIDIsDropped(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	h.start(runner)
	first := h.submit("default", job("j1"))
	h.outcome("j1", lifecycle.StateCompleted)
	second := h.submit("default", job("j1"))
	h.settled()
	h.wantTypes("j1", "started", "completed", "duplicate")
	body := h.events("avatar.events.duplicate.>")[0].body
	if body["kept_seq"] != float64(first) || body["stream_seq"] != float64(second) || len(runner.ran()) != 1 {
		t.Errorf("duplicate event %v, ran %v", body, runner.ran())
	}
}

func TestTwoMessagesWithOneIDAtOnceRunOneJob(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	for range 20 {
		h.submit("default", job("j1"))
	}
	h.start(runner)
	h.start(runner)
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	if len(runner.ran()) != 1 || len(h.events("avatar.events.duplicate.j1")) != 19 {
		t.Errorf("ran %v, %d duplicates", runner.ran(), len(h.events("avatar.events.duplicate.j1")))
	}
}

func TestReplayIsARunOfItsOwnAndWaitsForTheOneBefore(t *testing.T) {
	h := newEnv(t)
	release := make(chan struct{})
	runner := runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Job.Run == 1 {
			<-release
			return failure(errors.CodeAvatarNotFound, errors.PhaseHandshake)
		}
		_, err := speakAll(ctx, a)
		return err
	})
	h.start(runner)
	h.submit("default", job("j1"))
	h.until("j1", func(r *lifecycle.Record) bool { return r.State == lifecycle.StateRunning })
	close(release)
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.submit("default", job("j1"), "Avatar-Job-Id", "j1", "Avatar-Run", "2")
	r := h.until("j1", func(r *lifecycle.Record) bool { return r.State == lifecycle.StateCompleted })
	h.settled()
	if r.Run != 2 || r.Attempt != 1 || r.Session != 1 {
		t.Errorf("run %d attempt %d session %d", r.Run, r.Attempt, r.Session)
	}
	h.submit("default", job("j1"), "Avatar-Run", "1")
	h.settled()
	if got := h.types("j1"); got[len(got)-1] != "duplicate" {
		t.Errorf("a lower run was not a duplicate: %v", got)
	}
}

func TestPanicInARunnerHitsOneJobOnly(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Job.ID == "bad" {
			panic("scripted")
		}
		_, err := speakAll(ctx, a)
		return err
	}))
	h.submit("default", job("bad"))
	h.submit("default", job("good"))
	r := h.outcome("bad", lifecycle.StateDeadLettered)
	h.outcome("good", lifecycle.StateCompleted)
	h.settled()
	if r.LastError.Code != errors.CodeInternal || r.Attempt != 2 || !strings.Contains(r.LastError.Message, "scripted") {
		t.Errorf("%+v", r.LastError)
	}
}

// faulty panics at the first attempt that is done.
type faulty struct {
	nopObserver
	once *sync.Once
}

func (f faulty) AttemptDone(errors.Code, errors.Class, errors.Phase) {
	f.once.Do(func() { panic("scripted") })
}

func TestPanicInTheWorkerHandsTheJobBack(t *testing.T) {
	h := newEnv(t)
	s := &script{}
	var once sync.Once
	h.start(s, func(o *options) {
		o.Observer = faulty{once: new(sync.Once)}
		known := o.KnownApp
		o.KnownApp = func(app string) bool {
			if app == "app2" {
				once.Do(func() { panic("scripted") })
			}
			return known(app)
		}
	})
	h.submit("default", job("settling"))
	r := h.outcome("settling", lifecycle.StateCompleted)
	h.submit("default", job("claimed", `"app_id":"app2"`))
	h.outcome("claimed", lifecycle.StateCompleted)
	h.submit("default", job("next"))
	h.outcome("next", lifecycle.StateCompleted)
	h.settled()
	if r.Session != 2 || r.Crashes != 0 || r.Attempt != 1 {
		t.Errorf("session %d, attempt %d, %d crashes", r.Session, r.Attempt, r.Crashes)
	}
	h.wantTypes("settling", "started", "released", "started", "completed")
	h.wantTypes("claimed", "started", "completed")
	if got := s.ran(); !slices.Equal(got, []string{"settling/s1/a1", "settling/s2/a1", "claimed/s1/a1", "next/s1/a1"}) {
		t.Errorf("sessions %v", got)
	}
}

func TestRedeliveryAfterTheOutcomeOnlyRepeatsWhatFollows(t *testing.T) {
	h := newEnv(t)
	// As if a worker had died between writing the outcome and telling it.
	for i, state := range []lifecycle.State{lifecycle.StateCompleted, lifecycle.StateDeadLettered, lifecycle.StateExpired, lifecycle.StateCancelled} {
		id := fmt.Sprintf("j%d", i)
		seq := h.submit("default", job(id, `"output":{"object":{}}`))
		h.put(&lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: seq, Session: 1, State: state, Outcome: state, Queue: "default", AppID: "app1",
			Attempt: 1, MaxAttempts: 5, WorkerID: "dead", Reason: lifecycle.ReasonPermanent, UpdatedAt: time.Now().UTC(),
			LastError: &event.Error{JobID: id, Run: 1, Session: 1, Attempt: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Action: errors.ActionDeadLetter},
		})
	}
	runner := &script{}
	finished := make(chan string, 10)
	runner.finish = func(_ context.Context, j *jobspec.Job, f jobs.Finished) error {
		finished <- j.ID + " " + string(f.Outcome)
		return nil
	}
	h.start(runner)
	h.settled()
	h.wantTypes("j0", "completed")
	h.wantTypes("j1", "error", "dead_lettered")
	h.wantTypes("j2", "expired")
	h.wantTypes("j3", "cancelled")
	if n := h.messages(h.names.DLQStream()); n != 1 {
		t.Errorf("%d dead letters", n)
	}
	if len(runner.ran()) != 0 || len(finished) != 4 {
		t.Errorf("ran %v", runner.ran())
	}
}

// A job without a recording shows nothing about whether recordings can be made.
func TestAWorkerThatCannotFinishRecordingsIsNotReadyWhateverOtherJobsDo(t *testing.T) {
	h := newEnv(t)
	runner := &script{}
	finished := make(chan string, 10)
	runner.finish = func(_ context.Context, job *jobspec.Job, _ jobs.Finished) error {
		if job.OutputKind() == jobspec.OutputObject {
			return errors.New("the bucket is gone")
		}
		finished <- job.ID
		return nil
	}
	w := h.start(runner)
	h.submit("default", job("recorded", `"output":{"object":{}}`))
	h.eventually("the worker is not ready", func() bool { return w.Ready() != nil })
	h.submit("default", job("counted", `"output":{"discard":{}}`))
	h.outcome("counted", lifecycle.StateCompleted)
	h.wantTypes("counted", "started", "completed")
	if id := receive(t, finished, "an output of another kind that is finished"); id != "counted" {
		t.Errorf("%s is finished", id)
	}
	if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "recordings") {
		t.Errorf("ready: %v", err)
	}
}

func TestWhatFollowsAFailureIsRepeatedAfterACrash(t *testing.T) {
	h := newEnv(t)
	at := time.Now().Add(300 * time.Millisecond).UTC()
	for _, state := range []lifecycle.State{lifecycle.StateRetrying, lifecycle.StateHeld} {
		action := errors.ActionRetry
		if state == lifecycle.StateHeld {
			action = errors.ActionHold
		}
		id := string(state)
		seq := h.submit("default", job(id))
		h.put(&lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: seq, Session: 1, State: state, Queue: "default", AppID: "app1", Holds: 1,
			Attempt: 1, MaxAttempts: 5, WorkerID: "dead", UpdatedAt: time.Now().UTC(), NextAttemptAt: &at,
			LastError: &event.Error{JobID: id, Run: 1, Session: 1, Attempt: 1, Code: errors.CodeUpstreamError, Class: errors.ClassServer, Action: action},
		})
	}
	started := make(chan time.Time, 2)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		started <- time.Now()
		_, err := speakAll(ctx, a)
		return err
	}))
	h.outcome("retrying", lifecycle.StateCompleted)
	h.outcome("held", lifecycle.StateCompleted)
	h.settled()
	h.wantTypes("retrying", "error", "retrying", "started", "completed")
	h.wantTypes("held", "error", "held", "started", "completed")
	for range 2 {
		// The worker's clock follows the server's, no better than a round trip takes.
		if first := receive(t, started, "start"); first.Before(at.Add(-100 * time.Millisecond)) {
			t.Errorf("started %s before its time", at.Sub(first))
		}
	}
}

func TestUnwrittenDeadLetterIsNeverLost(t *testing.T) {
	h := newEnv(t)
	failed := make(chan struct{}, 10)
	var away = true
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeAvatarNotFound, errors.PhaseHandshake)
	}), func(o *options) {
		o.DeadLetters.(*letters).fail = func() error {
			if away {
				away = false
				failed <- struct{}{}
				return errors.New("not acknowledged")
			}
			return nil
		}
	})
	h.submit("default", job("j1"))
	receive(t, failed, "failed write")
	h.settled()
	h.wantTypes("j1", "started", "error", "dead_lettered")
	if n := h.messages(h.names.DLQStream()); n != 1 {
		t.Errorf("%d dead letters", n)
	}
}
