package reliability

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
)

func TestADrainWhoseTimeIsUpHandsSessionsBackAndExitsWithZero(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 5*time.Second)
	old := f.worker("old", "AVATAR_WORKER_DRAIN_TIMEOUT=200ms")
	for i := range 8 {
		f.publish(job(fmt.Sprintf("j-%d", i), "slow-1000", 2))
	}
	f.await("running", 8, running)
	old.signal(syscall.SIGTERM)
	if !old.waitEnd(10*time.Second) || !old.cmd.ProcessState.Success() {
		t.Fatalf("worker %s did not drain in good order: %v", old.name, old.cmd.ProcessState)
	}
	f.worker("new")
	f.settle()
	report, _ := f.check()
	if report.Released != 8 || report.Again != 0 || report.Crashes != 0 || report.Failures != 0 || report.Outcomes[lifecycle.StateCompleted] != 8 {
		t.Errorf("want all handed back and completed, at no cost: %s", report)
	}
	if n := f.count(func(r lifecycle.Record) bool { return r.Attempt == 1 }); n != 8 {
		t.Errorf("%d of 8 jobs completed in their first attempt", n)
	}
}

func TestADrainWithoutAnyTimeCostsNoJobACrash(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 2*time.Second)
	old := f.worker("old", "AVATAR_WORKER_DRAIN_TIMEOUT=0s")
	for i := range 16 {
		f.publish(job(fmt.Sprintf("j-%d", i), "slow-500", 1))
	}
	f.await("running", 1, running) // the others are on their way
	old.signal(syscall.SIGTERM)
	if !old.waitEnd(10*time.Second) || !old.cmd.ProcessState.Success() {
		t.Fatalf("worker %s did not drain in good order: %v", old.name, old.cmd.ProcessState)
	}
	f.worker("new")
	f.settle()
	if report, _ := f.check(); report.Again != 0 || report.Crashes != 0 || report.Failures != 0 || report.Outcomes[lifecycle.StateCompleted] != 16 {
		t.Errorf("want all completed, at no cost: %s", report)
	}
}

func TestASecondSignalEndsAtOnceAndLosesNothing(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "", 2*time.Second)
	old := f.worker("old")
	for i := range 8 {
		f.publish(job(fmt.Sprintf("j-%d", i), "slow-1500", 2))
	}
	f.await("running", 8, running)
	old.signal(syscall.SIGTERM)
	old.awaitLine("draining")
	f.terminate(old)
	f.worker("new")
	f.settle()
	if report, _ := f.check(); report.Failures != 0 || report.Outcomes[lifecycle.StateCompleted] != 8 {
		t.Errorf("want all completed without a failed attempt: %s", report)
	}
}

func TestAChangeOfLeadersRunsNoSessionAgain(t *testing.T) {
	if testing.Short() {
		t.Skip("forms a cluster: not with -short")
	}
	t.Parallel()
	cluster, _ := newCluster(t)
	f := newFleetAt(t, cluster.ClientURLs(), 10*time.Second, 3, simulator.Options{Addr: "127.0.0.1:0"})
	const total = 60
	for i := range total {
		f.publish(job(fmt.Sprintf("j-%d", i), "slow-1500", 2))
	}
	// A delivery is stored with the time of publishing: jobs that queued for
	// longer than a lease are the ones that a new leader delivers again.
	linger(t.Context(), f.lease)
	f.worker("w1")
	f.worker("w2")
	f.await("running", 30, running)
	leader := cluster.ConsumerLeader(f.names.JobsStream(), "default")
	if err := cluster.Stop(leader); err != nil {
		t.Fatal(err)
	}
	f.await("done", total/2, final)
	if err := insist(func() error { return cluster.Start(leader) }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	if err := cluster.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	f.settle()
	report, _ := f.check()
	if report.Sessions != total || report.Again != 0 || report.Crashes != 0 || report.Failures != 0 {
		t.Errorf("want %d sessions, none of them twice: %s", total, report)
	}
}
