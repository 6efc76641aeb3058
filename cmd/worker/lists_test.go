package main

import (
	"encoding/json"
	"strings"
	"testing"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

func TestSubmitTakesEveryOutput(t *testing.T) {
	for _, kind := range jobspec.Outputs() {
		d := &document{fields: make(map[string]json.RawMessage)}
		s := &submission{}
		s.output = kind
		if err := d.output(s); err != nil || !strings.Contains(string(d.fields["output"]), kind) {
			t.Errorf("%s: %v, %s", kind, err, d.fields["output"])
		}
	}
}

func TestEveryReasonOfAHoldIsExplained(t *testing.T) {
	seen := make(map[string]string)
	for _, reason := range append(lifecycle.HeldReasons(), "moon") {
		why, _ := status.HeldBecause(&lifecycle.Record{State: lifecycle.StateHeld, HeldReason: reason, HeldWhy: "why " + reason, AppID: "app"})
		if other := seen[why]; why == "" || other != "" {
			t.Errorf("%s is explained as %s: %q", reason, other, why)
		}
		seen[why] = reason
	}
}
