package jobs

import (
	"testing"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/limit"
)

// A key that limited forgets would limit nothing.
func TestARecordHasAValueUnderEachKeyOfALimit(t *testing.T) {
	r := &lifecycle.Record{JobID: "j", AppID: "a", AvatarID: "b", Region: "c", Queue: "d", Labels: map[string]string{"room": "e"}}
	for _, key := range append(limit.Keys(), "label.room") {
		if value, ok := limited(r).Value(key); !ok || value == "" {
			t.Errorf("%s: %q", key, value)
		}
	}
}
