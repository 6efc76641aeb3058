package app_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/config"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
)

func TestAPausedQueueShowsInReadinessAndStatusAndIsNoFault(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) { c.Admin.Addr = "127.0.0.1:0" }})
	readyz := func() string {
		resp, err := http.Get("http://" + w.app.AdminAddr().String() + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%d %s %v", resp.StatusCode, body, err)
		}
		return string(body)
	}
	becomes := func(want string) {
		t.Helper()
		natstest.Eventually(t, "/readyz is "+want, func() bool { return strings.TrimSpace(readyz()) == want })
	}
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	text := "queue default is paused until " + until.Format(time.RFC3339)
	if _, err := f.js.PauseConsumer(f.ctx, f.names.JobsStream(), "default", until); err != nil {
		t.Fatal(err)
	}
	becomes("ready: " + text)
	fleet, err := status.NewStore(f.js, f.names, nil, 0).Fleet(f.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(fleet.Queues) != 1 || !fleet.Queues[0].PausedUntil.Equal(until) || !strings.Contains(strings.Join(fleet.Warnings, "\n"), text) {
		t.Errorf("status: %+v, %v", fleet.Queues, fleet.Warnings)
	}
	if _, err := f.js.ResumeConsumer(f.ctx, f.names.JobsStream(), "default"); err != nil {
		t.Fatal(err)
	}
	becomes("ready")
}
