package app

import (
	"testing"
	"time"

	"avatarworker/internal/config"
	"avatarworker/internal/jobs/lifecycle"
)

func TestAScrapeSaysWhatWaitsAtThatMoment(t *testing.T) {
	t.Parallel()
	c := config.Defaults()
	c.App.ID, c.App.APIKey = "app", "key"
	a, err := New(Options{Config: c})
	if err != nil {
		t.Fatal(err)
	}
	o := observer{a.metrics, a.waiting}
	o.Postponed("retried", lifecycle.StateRetrying, time.Hour)
	o.Postponed("held", lifecycle.StateHeld, time.Hour)
	o.Postponed("held-too", lifecycle.StateHeld, time.Hour)
	o.Postponed("over", lifecycle.StateRetrying, -time.Second)
	for name, want := range map[string]float64{"retries_waiting": 1, "jobs_held": 2, "ready": 0} {
		if got := scraped(t, a, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	a.waiting.forget(time.Now())
	if len(a.waiting.jobs) != 3 {
		t.Errorf("%d jobs are remembered, want those that wait", len(a.waiting.jobs))
	}
}

func scraped(t *testing.T, a *App, name string) float64 {
	t.Helper()
	families, err := a.gather.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "avatar_worker_"+name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no %s", name)
	return 0
}
