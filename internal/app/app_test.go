package app_test

import (
	"fmt"
	"testing"

	"avatarworker/internal/jobs/lifecycle"
)

func TestJobsEndAsTheirAvatarsSay(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	for i, c := range []struct {
		avatar string
		extra  map[string]any
		want   lifecycle.State
		code   string
	}{
		{"ok", nil, lifecycle.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"discard": map[string]any{}}}, lifecycle.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"object": map[string]any{"name": "rec"}}}, lifecycle.StateCompleted, ""},
		{"ok", map[string]any{"output": map[string]any{"livekit": map[string]any{"url": "wss://example.com", "room_name": "r", "publisher_id": "p", "api_token": "good-token"}}}, lifecycle.StateCompleted, ""},
		{"flaky-connectionClosed-2", nil, lifecycle.StateCompleted, ""},
		{"fail-avatarNotFound", nil, lifecycle.StateDeadLettered, "avatarNotFound"},
		{"ok", map[string]any{"deadline": "2020-01-01T00:00:00Z"}, lifecycle.StateExpired, ""},
		{"ok", map[string]any{"audio": map[string]any{"inline": "AAAA", "sample_rate": 16000}}, lifecycle.StateDeadLettered, "invalidJob"},
	} {
		t.Run(fmt.Sprintf("%s_%s", c.avatar, c.want), func(t *testing.T) {
			id := fmt.Sprintf("job%d", i)
			f.publish(id, c.avatar, c.extra)
			r := f.outcome(id)
			if r.State != c.want {
				t.Errorf("state %s, want %s: %+v", r.State, c.want, r.LastError)
			}
			if c.code != "" && (r.LastError == nil || string(r.LastError.Code) != c.code) {
				t.Errorf("last error %+v, want %s", r.LastError, c.code)
			}
		})
	}
}
