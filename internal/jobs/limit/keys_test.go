package limit

import (
	"strings"
	"testing"
)

func TestARuleWithAKeyThatNoJobHasIsRefused(t *testing.T) {
	job := Job{App: "a", Avatar: "b", Region: "c", Queue: "d", Labels: map[string]string{"room": "e", "": "f"}}
	seen := make(map[string]string)
	for _, key := range append(Keys(), "label.room") {
		if err := (Rule{Key: key, Max: 1}).Check(); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		value, ok := job.Value(key)
		if !ok || value == "" || seen[value] != "" {
			t.Errorf("%s: %q, %t, as under %q", key, value, ok, seen[value])
		}
		seen[value] = key
	}
	for _, key := range []string{"", "room", "worker", "label.", "label", "labels.room", "App_ID"} {
		if err := (Rule{Key: key, Max: 1}).Check(); err == nil || !strings.Contains(err.Error(), "label.<name>") {
			t.Errorf("%q: %v", key, err)
		}
		if value, ok := job.Value(key); ok || key != "label." && value != "" {
			t.Errorf("%q has the value %q", key, value)
		}
	}
}
