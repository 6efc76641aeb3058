package jobs_test

import (
	"testing"
	"time"

	"avatarworker/internal/jobs"
)

func TestJobThatHasToRunAloneDoesNotStopItsWorkerForAsLongAsASessionLasts(t *testing.T) {
	h := newHouse(t)
	sessions := newOpenEnded()
	w := h.start(sessions, noDrain, func(o *options) { o.Concurrency, o.AlonePatience = 2, 100*time.Millisecond })
	h.submit("default", job("long"))
	receive(t, sessions.began, "a long session")
	h.abandoned("killer", func(r *jobs.Record) { r.State, r.Crashes = jobs.StateReleased, 2 })
	h.eventually("it waits to be alone", func() bool { return w.Running() == 2 })
	h.submit("default", job("innocent"))
	if id := receive(t, sessions.began, "another session"); id != "innocent" {
		t.Errorf("%s began beside others", id)
	}
}

func TestJobThatWaitsForItsSlotLeavesTheOnlyPlaceToOthers(t *testing.T) {
	h := newHouse(t)
	one := func(o *options) {
		o.MaxSessions, o.Concurrency, o.Drain = map[string]int{"app1": 1}, 1, time.Millisecond
	}
	elsewhere := newOpenEnded()
	h.start(elsewhere, one)
	h.submit("default", job("holder", `"app_id":"app1"`))
	receive(t, elsewhere.began, "session that has the slot")
	here := newOpenEnded()
	w := h.start(here, one)
	h.submit("default", job("waits", `"app_id":"app1"`))
	h.eventually("one waits for the slot", func() bool { return w.Running() == 1 })
	h.submit("default", job("free", `"app_id":"app2"`))
	if id := receive(t, here.began, "session of another app"); id != "free" {
		t.Errorf("%s began", id)
	}
}
