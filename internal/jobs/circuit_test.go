package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

// account is a backend that refuses or serves the sessions of app1.
type account struct {
	mu      sync.Mutex
	code    errors.Code
	refused []time.Time
}

func (b *account) set(code errors.Code) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.code = code
}

func (b *account) refusals() []time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]time.Time(nil), b.refused...)
}

func (b *account) runner() *script {
	return runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		b.mu.Lock()
		code := b.code
		if a.AppID != "app1" || a.Region != "us-west" {
			code = ""
		}
		if code != "" {
			b.refused = append(b.refused, time.Now())
		}
		b.mu.Unlock()
		if code != "" {
			return failure(code, errors.PhaseToken)
		}
		_, err := speakAll(ctx, a)
		return err
	})
}

func TestUnpaidAccountHoldsItsJobsOnly(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeCreditsExhausted}
	runner := b.runner()
	h.start(runner, func(o *options) { o.Concurrency = 4 })
	h.start(runner, func(o *options) { o.Concurrency = 4 })
	const jobsInAll = 40
	for n := range jobsInAll {
		h.submit("default", job(fmt.Sprintf("j%d", n)))
	}
	h.eventually("the circuit opens", func() bool { return len(h.events("avatar.alerts.circuit_opened.>")) == 1 })
	h.submit("default", job("other-app", `"app_id":"app2"`))
	h.submit("default", job("other-region", `"region":"eu-west"`))
	h.outcome("other-app", lifecycle.StateCompleted)
	h.outcome("other-region", lifecycle.StateCompleted)
	h.eventually("two probes fail", func() bool {
		seen := b.refusals()
		return seen[len(seen)-1].Sub(seen[0]) > time.Second
	})
	// As many as the fleet runs at once, and one probe in each cooldown.
	seen := b.refusals()
	last := seen[len(seen)-1].Sub(seen[0])
	if most := 8 + int(last/(500*time.Millisecond)) + 1; len(seen) > most {
		t.Errorf("%d sessions were refused in %s, want at most %d", len(seen), last, most)
	}
	b.set("")
	for n := range jobsInAll {
		h.outcome(fmt.Sprintf("j%d", n), lifecycle.StateCompleted)
	}
	h.settled()
	if h.messages(h.names.DLQStream()) != 0 {
		t.Error("dead letters")
	}
	opened, closed := h.events("avatar.alerts.circuit_opened.>"), h.events("avatar.alerts.circuit_closed.>")
	if len(opened) != 1 || len(closed) != 1 {
		t.Errorf("%d times opened, %d closed", len(opened), len(closed))
	}
	for _, e := range h.events("avatar.events.held.>") {
		if e.body["attempt"] != nil && e.body["attempt"] != 1.0 {
			t.Errorf("held at attempt %v", e.body["attempt"])
		}
	}
	ids := map[string]bool{}
	for _, e := range h.events("avatar.events.held.>") {
		if ids[e.id] {
			t.Errorf("hold %s reported twice", e.id)
		}
		ids[e.id] = true
	}
}

func TestRefusedKeyLosesFewJobs(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeSessionTokenExpired}
	h.start(b.runner(), func(o *options) { o.Concurrency = 1 })
	for n := range 12 {
		h.submit("default", job(fmt.Sprintf("j%d", n)))
	}
	h.eventually("the circuit opens", func() bool { return len(h.events("avatar.alerts.circuit_opened.>")) == 1 })
	h.eventually("a probe fails", func() bool { return len(b.refusals()) >= 6 })
	if n := h.messages(h.names.DLQStream()); n != 4 {
		t.Errorf("%d dead letters, want the four before the fifth failure opened the circuit", n)
	}
	b.set("")
	h.settled()
	if n := h.messages(h.names.DLQStream()); n != 4 {
		t.Errorf("%d dead letters in the end", n)
	}
}

func TestRefusedKeyLosesFewJobsAlsoWhileTheCircuitsCannotBeWritten(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeSessionTokenExpired}
	h.full("KV_" + h.names.FleetBucket())
	h.start(b.runner(), func(o *options) { o.Concurrency, o.Patience = 1, 200*time.Millisecond })
	for n := range 12 {
		h.submit("default", job(fmt.Sprintf("j%d", n)))
	}
	h.eventually("the circuit opens", func() bool { return len(h.events("avatar.alerts.circuit_opened.>")) == 1 })
	h.eventually("a probe fails", func() bool { return len(b.refusals()) >= 6 })
	b.set("")
	h.settled()
	if n := h.messages(h.names.DLQStream()); n != 4 {
		t.Errorf("%d dead letters, want the four before the fifth failure opened the circuit", n)
	}
}

func TestOneJobsFailuresDoNotOpenTheCircuit(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeConnectionFailed, errors.PhaseConnect)
	}))
	h.submit("default", job("j1", `"max_attempts":5`))
	h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	if n := len(h.events("avatar.alerts.>")); n != 0 {
		t.Errorf("%d alerts", n)
	}
}

func TestRefusedConcurrencyIsNoUnpaidBill(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 1), make(chan struct{})
	var refusals atomic.Int32
	var log logged
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Job.ID == "first" {
			connect(a)
			began <- struct{}{}
			<-leave
			return speak(ctx, a, 1)
		}
		if refusals.Add(1) <= 3 {
			return failure(errors.CodeBillingRequired, errors.PhaseToken)
		}
		_, err := speakAll(ctx, a)
		return err
	}), func(o *options) { o.Logger = zerolog.New(&log) })
	h.submit("default", job("first"))
	receive(t, began, "session")
	h.submit("default", job("second"))
	r := h.outcome("second", lifecycle.StateCompleted)
	close(leave)
	h.outcome("first", lifecycle.StateCompleted)
	h.settled()
	if n := len(h.events("avatar.alerts.>")); n != 0 || r.Attempt != 1 || r.Holds != 3 {
		t.Errorf("%d alerts, attempt %d, %d holds", n, r.Attempt, r.Holds)
	}
	warned := 0
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "set max_sessions of the app") && strings.Contains(line, `"level":"warn"`) {
			warned++
		}
	}
	if warned != 1 {
		t.Errorf("%d warnings for 3 refusals, want 1:\n%s", warned, log.String())
	}
}

func TestJobHeldTooLongIsGivenUp(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeBillingRequired}
	h.start(b.runner(), func(o *options) { o.MaxHold = 300 * time.Millisecond })
	h.submit("default", job("j1"))
	r := h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	if r.Reason != lifecycle.ReasonHeldTooLong || r.LastError.Code != errors.CodeBillingRequired || r.HeldFor < 300*time.Millisecond {
		t.Errorf("%s %s after %s", r.Reason, r.LastError.Code, r.HeldFor)
	}
	if !strings.Contains(r.LastError.Message, "max_hold") || !strings.Contains(r.LastError.Message, "scripted billingRequired") {
		t.Errorf("%q does not say both how long it waited and for what", r.LastError.Message)
	}
	if msg, err := h.handles.DLQ.GetLastMsgForSubject(t.Context(), h.names.DLQ("billing", "billingRequired")); err != nil || msg.Header.Get("Avatar-Attempts") != "0" {
		t.Errorf("%v, %v: no attempt of it counts", msg, err)
	}
}

// However long the cooldown lasts, a held job is given up when its time is over.
func TestHoldEndsWithMaxHoldAndNotWithTheCooldown(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeCreditsExhausted}
	h.start(b.runner(), func(o *options) {
		o.Circuit.Cooldown, o.Circuit.MaxCooldown, o.MaxHold = time.Hour, time.Hour, 500*time.Millisecond
		o.Random = func() float64 { return 0.99 }
	})
	h.submit("default", job("refused"))
	h.state("refused", lifecycle.StateHeld)
	h.submit("default", job("never-tried"))
	for _, id := range []string{"refused", "never-tried"} {
		if r := h.outcome(id, lifecycle.StateDeadLettered); r.Reason != lifecycle.ReasonHeldTooLong {
			t.Errorf("%s: %s", id, r.Reason)
		}
	}
	h.settled()
}

func TestHeldJobExpiresAndCanBeCancelled(t *testing.T) {
	h := newEnv(t)
	b := &account{code: errors.CodeCreditsExhausted}
	h.start(b.runner())
	h.submit("default", job("opens"))
	h.state("opens", lifecycle.StateHeld)
	h.submit("default", job("late", fmt.Sprintf(`"deadline":%q`, time.Now().Add(1500*time.Millisecond).UTC().Format(time.RFC3339Nano))))
	h.wantStatus("opens", "cancel", control.StatusRequested)
	h.outcome("opens", lifecycle.StateCancelled)
	h.outcome("late", lifecycle.StateExpired)
	h.settled()
}

func TestPolicyThatHoldsBacksOff(t *testing.T) {
	h := newEnv(t)
	var tries atomic.Int32
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if tries.Add(1) < 4 {
			return failure(errors.CodeUpstreamError, errors.PhaseRuntime)
		}
		_, err := speakAll(ctx, a)
		return err
	}), func(o *options) {
		table, err := errors.NewTable(errors.Policy{errors.CodeUpstreamError: {Action: errors.ActionHold}})
		if err != nil {
			t.Fatal(err)
		}
		o.Table, o.Random = table, func() float64 { return 0.99 }
	})
	from := time.Now()
	h.submit("default", job("j1"))
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	if took := time.Since(from); took < 130*time.Millisecond || r.Attempt != 1 || r.Holds != 3 {
		t.Errorf("%s, attempt %d, %d holds", took, r.Attempt, r.Holds)
	}
	for _, e := range h.events("avatar.events.held.>") {
		if text := fmt.Sprint(e.body["message"]); e.body["reason"] != lifecycle.HeldPolicy || !strings.Contains(text, "policy holds") || !strings.Contains(text, "upstreamError") {
			t.Errorf("held for %v because %s", e.body["reason"], text)
		}
	}
}

func TestSlotsHoldTheFleetWithinMaxSessions(t *testing.T) {
	h := newEnv(t)
	var mu sync.Mutex
	open, most := 0, 0
	leave := make(chan struct{})
	var stuck atomic.Int32
	runner := func(dies bool) *script {
		return runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
			mu.Lock()
			open++
			most = max(most, open)
			mu.Unlock()
			defer func() {
				mu.Lock()
				open--
				mu.Unlock()
			}()
			if dies && stuck.Add(1) == 1 {
				close(leave)
				return untilDone(ctx)
			}
			time.Sleep(5 * time.Millisecond) //nolint:forbidigo // a session takes a moment
			_, err := speakAll(ctx, a)
			return err
		})
	}
	limit := func(o *options) { o.MaxSessions = map[string]int{"app1": 3} }
	for n := range 60 {
		h.submit("default", job(fmt.Sprintf("j%d", n)))
	}
	h.submit("default", job("unlimited", `"app_id":"app2"`))
	dying := h.start(runner(true), limit)
	h.start(runner(false), limit)
	receive(t, leave, "session of the worker that dies")
	dying.kill()
	h.settled()
	for n := range 60 {
		h.outcome(fmt.Sprintf("j%d", n), lifecycle.StateCompleted)
	}
	mu.Lock()
	defer mu.Unlock()
	if most > 4 { // three of the app, one of the other
		t.Errorf("%d sessions at once", most)
	}
}

// alerted counts the alerts of all workers that have it.
type alerted struct {
	nopObserver
	n *atomic.Int32
}

func (a alerted) Alerted(string, errors.Code) { a.n.Add(1) }

func TestOneAlertForACodeAndWindow(t *testing.T) {
	t.Parallel()
	for name, claim := range map[string]string{
		"no worker knew":                   "",
		"who claimed it did not report it": fmt.Sprintf(`{"at":%q,"worker_id":"gone"}`, time.Now().Format(time.RFC3339Nano)),
		"the one before is long enough":    fmt.Sprintf(`{"at":%q,"worker_id":"w"}`, time.Now().Add(-time.Hour).Format(time.RFC3339Nano)),
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			if claim != "" {
				if _, err := h.handles.Fleet.Put(t.Context(), "alert.upstreamError", []byte(claim)); err != nil {
					t.Fatal(err)
				}
			}
			h.oneAlert()
		})
	}
}

func (h *env) oneAlert() {
	h.t.Helper()
	counted := new(atomic.Int32)
	counting := func(o *options) { o.Observer = alerted{n: counted} }
	runner := runnerFunc(func(context.Context, *jobs.Attempt) error {
		return failure(errors.CodeUpstreamError, errors.PhaseRuntime)
	})
	h.start(runner, counting)
	h.start(runner, counting)
	for n := range 4 {
		h.submit("default", job(fmt.Sprintf("j%d", n), `"max_attempts":3`))
	}
	h.settled()
	if n := len(h.events("avatar.errors.server.upstreamError")); n != 12 {
		h.t.Fatalf("%d errors", n)
	}
	h.eventually("an alert", func() bool { return len(h.events("avatar.alerts.recurring.upstreamError")) > 0 })
	h.start(runner, counting).end() // sees the same events again
	h.submit("default", job("more", `"max_attempts":1`))
	h.settled()
	alerts := h.events("avatar.alerts.recurring.>")
	if len(alerts) != 1 || alerts[0].body["count"].(float64) < 5 || alerts[0].body["window"] != "1m0s" {
		h.t.Errorf("%v", alerts)
	}
	if n := counted.Load(); n != 1 {
		h.t.Errorf("counted %d times", n)
	}
}
