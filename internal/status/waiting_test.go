package status

import (
	"strings"
	"testing"

	"avatarworker/internal/jobs/limit"
)

func TestAJobThatWaitsForALimitNamesItUnderEachKey(t *testing.T) {
	t.Parallel()
	w := Waiting{Queue: "vip", AppID: "a1", AvatarID: "av", Labels: map[string]string{"customer": "acme"}, Delivered: true, region: "us-west"}
	values := map[string]string{"app_id": "a1", "avatar_id": "av", "queue": "vip", "region": "us-west", "label.customer": "acme"}
	for _, key := range append(limit.Keys(), "label.customer") {
		l := Limit{Name: limit.Name(key, values[key]), InUse: 2}
		if got := w.waitsFor(nil, []Limit{l}); !strings.Contains(got, l.Name+" (2 in use)") {
			t.Errorf("by %s: waits for %q", key, got)
		}
		other := Limit{Name: limit.Name(key, "other"), InUse: 2}
		if got := w.waitsFor(nil, []Limit{other}); strings.Contains(got, other.Name) {
			t.Errorf("by %s: waits for another's: %q", key, got)
		}
	}
}
