package lifecycle

import (
	"testing"
	"time"

	"avatarworker/internal/errors"
)

func TestEveryActionHasAPlanAndAnUnknownOneIsAnError(t *testing.T) {
	p := RetryPolicy{MaxAttempts: 5, Initial: time.Second, Max: time.Minute}
	plan := func(action errors.Action) (Plan, error) {
		d := errors.Decision{Code: errors.CodeServerError, Action: action}
		return p.Plan(Failure{Decision: d, Record: whole(1, 5), Now: time.Unix(1000, 0)}, func() float64 { return 0.5 })
	}
	for _, action := range errors.Actions() {
		if got, err := plan(action); err != nil || got.Action != action {
			t.Errorf("%s: %+v, %v", action, got, err)
		}
	}
	for _, action := range []errors.Action{"", "pause_queue"} {
		if got, err := plan(action); err == nil {
			t.Errorf("%q is planned as %+v", action, got)
		}
	}
}

func TestEveryReasonOfAHoldHasAText(t *testing.T) {
	seen := make(map[string]string)
	for _, reason := range HeldReasons() {
		r := &Record{State: StateHeld, HeldReason: reason, HeldWhy: "why " + reason, HeldCode: errors.CodeServerError}
		text := r.HeldText()
		if text == "" || seen[text] != "" {
			t.Errorf("%s: %q, as with %q", reason, text, seen[text])
		}
		seen[text] = reason
	}
	later := &Record{State: StateHeld, HeldReason: "moon"}
	if text := later.HeldText(); seen[text] != "" {
		t.Errorf("a reason that is not known is said to be %s: %q", seen[text], text)
	}
}
