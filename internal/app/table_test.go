package app_test

import (
	"bytes"
	"slices"
	"testing"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/simulator"
)

// tableAttempts is what the jobs of the table walk may have.
const tableAttempts = 3

// walk is one failure that the backend gives.
type walk struct {
	name   string // of app and job
	key    string // the app's API key
	avatar string
	code   errors.Code // that it is read as
	action errors.Action
}

// walks are every code, given by the avatar and by the API key. What the table
// says is taken from it; here is only where a phase changes the code.
func walks() []walk {
	var out []walk
	for _, name := range simulator.Codes() {
		code := errors.Code(name)
		byKey := walk{name: "key-" + name, key: "fail-" + name, avatar: "ok", code: code}
		if code == errors.CodeConnectionClosed {
			byKey.code = errors.CodeConnectionFailed // a call has nothing to close
		}
		out = append(out, walk{name: "avatar-" + name, key: "good", avatar: "fail-" + name, code: code})
		if code != errors.CodeSessionTokenExpired { // a 401: the worker takes no jobs with such a key
			out = append(out, byKey)
		}
	}
	return append(out,
		walk{name: "key-429", key: "status-429", avatar: "ok", code: errors.CodeInvalidRequest, action: errors.ActionRetry},
		walk{name: "avatar-429", key: "good", avatar: "fail-status-429", code: errors.CodeInvalidRequest, action: errors.ActionRetry},
		walk{name: "avatar-503", key: "good", avatar: "fail-status-503", code: errors.CodeServerError, action: errors.ActionRetry},
	)
}

// want is the action and the number of failed attempts.
func (w walk) want(table *errors.Table) (errors.Action, int) {
	for _, row := range table.Rows() {
		if row.Code != w.code {
			continue
		}
		if w.action == "" {
			w.action = row.Action
		}
		switch {
		case w.action != errors.ActionRetry:
			return w.action, 1
		case row.Attempts > 0 && row.Action == errors.ActionRetry:
			return w.action, row.Attempts
		default:
			return w.action, tableAttempts
		}
	}
	return "", 0
}

func TestEveryCodeOfTheBackendEndsWithTheActionOfTheTable(t *testing.T) {
	t.Parallel()
	table, err := errors.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, nil)
	all := walks()
	f.worker(worker{config: func(c *config.Config) {
		for _, w := range all {
			c.Apps[w.name] = &config.App{ID: w.name, APIKey: config.Secret(w.key)}
		}
	}})
	published := map[string][]byte{}
	for _, w := range all {
		published[w.name] = f.publish(w.name, w.avatar, fields{"app_id": w.name, "max_attempts": tableAttempts})
	}
	for _, w := range all {
		action, attempts := w.want(table)
		if action == errors.ActionHold {
			f.checkHeld(w)
			continue
		}
		r := f.outcome(w.name)
		events := f.errorEvents(w.name)
		if r.State != lifecycle.StateDeadLettered || r.Attempt != attempts || len(events) != attempts {
			t.Errorf("%s: %s after %d attempts with %d error events, want dead_lettered and %d: %+v", w.name, r.State, r.Attempt, len(events), attempts, r.LastError)
			continue
		}
		for i, e := range events {
			want := action
			if i == attempts-1 {
				want = errors.ActionDeadLetter
			}
			if e.Code != w.code || e.Action != want || e.Attempt != i+1 || e.Message == "" || e.Phase == "" {
				t.Errorf("%s: error event %d: %+v, want %s and %s", w.name, i+1, e, w.code, want)
			}
		}
		f.checkLetter(w, published[w.name], action)
	}
	if n := len(f.all(f.names.DLQStream(), f.names.AllDLQ())); n != len(all)-4 {
		t.Errorf("%d dead letters of %d jobs, of which 4 are held", n, len(all))
	}
}

// checkHeld looks at a job whose circuit is open, and cancels it.
func (f *fleet) checkHeld(w walk) {
	f.t.Helper()
	r := f.state(w.name, func(r lifecycle.Record) bool { return r.State == lifecycle.StateHeld })
	f.event(w.name, "held")
	events := f.errorEvents(w.name)
	if len(events) == 0 || events[0].Code != w.code || events[0].Action != errors.ActionHold || events[0].Attempt != 1 {
		f.t.Errorf("%s: %+v, error events %+v", w.name, r, events)
	}
	// It may be the circuit's probe just then, and is cancelled at once.
	if got := f.control(w.name, "cancel"); got.Status != control.StatusRequested && got.Status != control.StatusCancelled {
		f.t.Errorf("cancel of %s, which is held: %+v", w.name, got)
	}
	if r := f.outcome(w.name); r.State != lifecycle.StateCancelled {
		f.t.Errorf("%s ended %s", w.name, r.State)
	}
}

func (f *fleet) checkLetter(w walk, job []byte, action errors.Action) {
	f.t.Helper()
	reason := lifecycle.ReasonPermanent
	if action == errors.ActionRetry {
		reason = lifecycle.ReasonAttemptsExhausted
	}
	letters := f.deadLetters(w.name)
	if len(letters) != 1 {
		f.t.Errorf("%s: %d dead letters", w.name, len(letters))
		return
	}
	if !bytes.Equal(letters[0].Data(), job) {
		f.t.Errorf("%s: the dead letter's body is not the job's own bytes", w.name)
	}
	h := letters[0].Headers()
	if h.Get("Avatar-Error-Code") != string(w.code) || h.Get("Avatar-Reason") != reason {
		f.t.Errorf("%s: dead letter says %v, want reason %s", w.name, h, reason)
	}
}

func TestHeldJobsGoOnWhenTheAccountWorksAgain(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	for _, code := range []errors.Code{errors.CodeBillingRequired, errors.CodeCreditsExhausted} {
		if err := f.backend.SetFault(simulator.Control{Fault: string(code)}); err != nil {
			t.Fatal(err)
		}
		id := "held-" + string(code)
		f.publish(id, "ok", nil)
		f.event(id, "held")
		if err := f.backend.SetFault(simulator.Control{}); err != nil {
			t.Fatal(err)
		}
		r := f.outcome(id)
		if r.State != lifecycle.StateCompleted || r.Attempt != 1 {
			t.Errorf("%s: %s on attempt %d: a hold counts no attempt", id, r.State, r.Attempt)
		}
		if len(f.deadLetters(id)) != 0 {
			t.Errorf("%s has a dead letter", id)
		}
	}
}

func TestATokenThatTheWebSocketRefusesIsMintedOnceMore(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("again", "flaky-sessionTokenInvalid-1", nil)
	if r := f.outcome("again"); r.State != lifecycle.StateCompleted || r.Attempt != 1 || len(f.errorEvents("again")) != 0 {
		t.Errorf("%+v", r)
	}
	if n := f.backend.TokenCalls(); n != 3 { // one of them at the start
		t.Errorf("%d token calls, want 3", n)
	}
	f.publish("never", "fail-sessionTokenExpired", nil)
	if r := f.outcome("never"); r.State != lifecycle.StateDeadLettered || r.Attempt != 1 {
		t.Errorf("%+v", r)
	}
	if n := f.backend.TokenCalls(); n != 5 {
		t.Errorf("%d token calls, want 5", n)
	}
}

func TestAJobOfBackendTroubleCompletesOnItsThirdAttempt(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("flaky", "flaky-connectionClosed-2", nil)
	done := f.completed("flaky")
	if done.Attempts != 3 || len(done.ConnectionIDs) != 3 || len(done.Utterances) != 1 {
		t.Errorf("%+v", done)
	}
	var phases []errors.Phase
	for _, e := range f.errorEvents("flaky") {
		phases = append(phases, e.Phase)
		if e.ConnectionID == "" || e.CloseCode != 1011 || e.RetryAt == nil {
			t.Errorf("%+v", e)
		}
	}
	if !slices.Equal(phases, []errors.Phase{errors.PhaseRuntime, errors.PhaseRuntime}) {
		t.Errorf("phases %v", phases)
	}
}
