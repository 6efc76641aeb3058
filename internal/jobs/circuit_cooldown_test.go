package jobs_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
)

func TestCooldownDoublesWithEachFailedProbeAndResetsAfterTenGoodSessions(t *testing.T) {
	h := newHouse(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var mu sync.Mutex
	now := time.Unix(1_000_000, 0)
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
	config := jobs.CircuitConfig{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 30 * time.Second}
	store, err := jobs.NewStore(h.js, h.handles.Fleet, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c := jobs.NewCircuits(store, config, "w1", clock,
		func() float64 { return 1 }, func(jobs.Circuit, bool) {})
	unpaid := errors.Decision{Code: errors.CodeCreditsExhausted, OpensCircuit: true, Action: errors.ActionHold}
	try := func(job string) jobs.Pass {
		t.Helper()
		p, err := c.Allow(ctx, "app", "us-west", job)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	fail := func(job string, probe bool, want time.Duration) {
		t.Helper()
		wait, open, err := c.Failed(ctx, "app", "us-west", job, unpaid, probe)
		if err != nil || !open || wait != want {
			t.Fatalf("failed: wait %s, open %v, %v; want %s", wait, open, err, want)
		}
	}
	succeed := func(job string, probe bool) {
		t.Helper()
		if err := c.Succeeded(ctx, "app", "us-west", job, probe); err != nil {
			t.Fatal(err)
		}
	}
	fail("j1", false, 10*time.Second)
	for i, next := range []time.Duration{20 * time.Second, 30 * time.Second, 30 * time.Second} {
		if try("early").Go {
			t.Fatal("let through before the cooldown")
		}
		pass(30 * time.Second)
		job := fmt.Sprint("probe", i)
		if p := try(job); !p.Go || !p.Probe {
			t.Fatalf("probe %d: %+v", i, p)
		}
		if try("second").Go {
			t.Fatal("two probes at once")
		}
		fail(job, true, next)
	}
	pass(30 * time.Second)
	if try("probe2").Go {
		t.Fatal("the job that probed in vain goes again before any other could")
	}
	if !try("good").Probe {
		t.Fatal("no probe")
	}
	succeed("good", true)
	fail("again", false, 30*time.Second) // not forgotten yet
	pass(30 * time.Second)
	try("good")
	succeed("good", true)
	for range 9 {
		succeed("more", false)
	}
	fail("anew", false, 10*time.Second)
	// Where no other comes it goes again, a little later.
	pass(10 * time.Second)
	try("alone")
	fail("alone", true, 20*time.Second)
	pass(20 * time.Second)
	if try("alone").Go {
		t.Fatal("it goes at once")
	}
	pass(5 * time.Second)
	if !try("alone").Probe {
		t.Fatal("it does not go again although no other came")
	}
}

func TestCircuitOpenedByAFastClockDoesNotStayOpen(t *testing.T) {
	h := newHouse(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	store, err := jobs.NewStore(h.js, h.handles.Fleet, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	config := jobs.CircuitConfig{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 30 * time.Second}
	unpaid := errors.Decision{Code: errors.CodeCreditsExhausted, OpensCircuit: true, Action: errors.ActionHold}
	circuits := func(worker string, ahead time.Duration) *jobs.Circuits {
		return jobs.NewCircuits(store, config, worker, func() time.Time { return time.Now().Add(ahead) },
			func() float64 { return 1 }, func(jobs.Circuit, bool) {})
	}
	fast, right, other := circuits("fast", time.Hour), circuits("right", 0), circuits("other", time.Second)
	if _, open, err := fast.Failed(ctx, "app", "us-west", "j1", unpaid, false); err != nil || !open {
		t.Fatal(open, err)
	}
	for _, c := range []*jobs.Circuits{right, other} { // they learn of it by failures of their own
		if _, open, err := c.Failed(ctx, "app", "us-west", "j2", unpaid, false); err != nil || !open {
			t.Fatal(open, err)
		}
	}
	if p, err := right.Allow(ctx, "app", "us-west", "j3"); err != nil || !p.Probe {
		t.Errorf("no probe may start: %+v, %v", p, err)
	}
	if p, err := other.Allow(ctx, "app", "us-west", "j4"); err != nil || p.Go {
		t.Errorf("a second probe beside it: %+v, %v", p, err)
	}
}
