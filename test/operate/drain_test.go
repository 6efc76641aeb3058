package operate_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// awaitStarted waits until the job's session was started.
func (s *site) awaitStarted(id string) {
	s.t.Helper()
	s.awaitEvents(s.names.Events("started", id), 1)
}

func TestDrainFinishesSessionsStartsNoneAndExitsZero(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	p := s.run("--concurrency", "1")
	s.connect()
	s.publish("default", "running", "slow-1500")
	s.awaitStarted("running")
	for i := range 3 {
		s.publish("default", fmt.Sprintf("later-%d", i), "ok")
	}
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.stderr)
	}
	if n := s.backend.Totals().Sessions; n != 1 {
		t.Errorf("%d sessions, want the one that was running", n)
	}
	s.run()
	s.connect()
	s.awaitEvents("avatar.events.completed.*", 4)
	if run := s.record("running"); run["attempt"] != 1.0 || run["session"] != 1.0 || run["state"] != "completed" {
		t.Errorf("the session that was running: %v", run)
	}
}

func TestDrainTimeoutHandsTheJobBackInTimeAndCostsNoAttempt(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	// A hand-back is not kept by a NATS server that ends too: the job comes again
	// when its lease is over.
	p := s.run("--set", "worker.drain_timeout=300ms", "--set", "lease.ack_wait=2s")
	s.connect()
	s.publish("default", "long", "slow-2000")
	s.awaitStarted("long")
	began := time.Now()
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.stderr)
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("drained in %s", took)
	}
	s.run("--set", "lease.ack_wait=2s")
	s.connect()
	s.awaitEvents(s.names.Events("released", "long"), 1)
	s.awaitEvents(s.names.Events("completed", "long"), 1)
	if r := s.record("long"); r["attempt"] != 1.0 || r["crashes"] != 0.0 || r["session"] != 2.0 {
		t.Errorf("attempt %v, crashes %v, session %v; want 1, 0, 2", r["attempt"], r["crashes"], r["session"])
	}
}

func TestSecondSignalEndsAtOnceAndLosesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0)
	p := s.run("--set", "lease.ack_wait=2s")
	s.connect()
	s.publish("default", "long", "slow-3000")
	s.awaitStarted("long")
	p.signal(syscall.SIGTERM)
	p.stderr.awaitText(t, "draining")
	p.signal(syscall.SIGTERM)
	p.wait()
	s.run("--set", "lease.ack_wait=2s")
	s.connect()
	s.awaitEvents(s.names.Events("completed", "long"), 1)
	if r := s.record("long"); r["session"] != 2.0 {
		t.Errorf("completed in session %v: the worker waited for its session's end", r["session"])
	}
}
