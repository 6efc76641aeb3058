package config

import "testing"

func TestAPolicyWithHardlyAnyEffectIsWarnedOf(t *testing.T) {
	_, warnings, err := Load(Source{Overrides: map[string]string{
		"policy.deadlineExceeded.action": "dead_letter", "policy.workerLost.alert": "true", "policy.upstreamError.action": "hold",
	}})
	if err != nil || len(warnings) != 1 || warnings[0].Name != "policy.deadlineExceeded" {
		t.Errorf("%v, %v", warnings, err)
	}
}
