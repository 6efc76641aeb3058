package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

func TestSuspectLeavesTheOtherSlotsOfItsWorkerInUse(t *testing.T) {
	h := newEnv(t, "default", "other")
	h.abandoned("suspect", func(r *lifecycle.Record) { r.Crashes, r.Session = 2, 3 })
	began, leave := make(chan struct{}, 1), make(chan struct{})
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.Job.ID == "suspect" {
			began <- struct{}{}
			<-leave
		}
		_, err := speakAll(ctx, a)
		return err
	}))
	receive(t, began, "session of the suspect")
	const others = 30
	for i := range others {
		h.submit([]string{"default", "other"}[i%2], job(fmt.Sprintf("j%d", i)))
	}
	for i := range others {
		h.outcome(fmt.Sprintf("j%d", i), lifecycle.StateCompleted)
	}
	h.eventually("ready beside the suspect", func() bool { return w.Ready() == nil })
	close(leave)
	h.outcome("suspect", lifecycle.StateCompleted)
}

// worker full of sessions that all wait until n of them are open.
type together struct {
	mu   sync.Mutex
	open int
	n    int
	all  chan struct{} // closed when n are open at once
}

func (g *together) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	connect(a)
	g.mu.Lock()
	if g.open++; g.open == g.n {
		close(g.all)
	}
	g.mu.Unlock()
	select {
	case <-g.all:
		return speakAll(ctx, a)
	case <-ctx.Done():
		g.mu.Lock()
		g.open--
		g.mu.Unlock()
		return jobs.Report{}, untilDone(ctx)
	}
}

func (g *together) Finish(context.Context, *jobspec.Job, jobs.Finished) error { return nil }

func TestJobsOfTwoKilledWorkersRunSideBySide(t *testing.T) {
	h := newEnv(t, "default", "other")
	const n = 16
	for i := range n {
		h.submit("default", job(fmt.Sprintf("j%d", i)))
	}
	for range 2 {
		began := make(chan string, 2*n)
		dies := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
			connect(a)
			began <- a.Job.ID
			return untilDone(ctx)
		}), shortDrain)
		for range n {
			receive(t, began, "session")
		}
		dies.kill()
	}
	all := &together{n: n, all: make(chan struct{})}
	runner := &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		if a.Job.ID == "other" {
			return speakAll(ctx, a)
		}
		return all.Run(ctx, a)
	}}
	h.start(runner, func(o *options) { o.Concurrency = n + 1 })
	from := time.Now()
	h.submit("other", job("other"))
	h.outcome("other", lifecycle.StateCompleted)
	if took := time.Since(from); took > natstest.Unhurried(10*time.Second) {
		t.Errorf("a job of another queue waited %s", took)
	}
	for i := range n {
		h.outcome(fmt.Sprintf("j%d", i), lifecycle.StateCompleted)
	}
	select {
	case <-all.all:
	default:
		t.Errorf("at most %d of them ran at once", all.open)
	}
	h.settled()
	if n := h.messages(h.names.DLQStream()); n != 0 {
		t.Errorf("%d dead letters", n)
	}
}

func TestNextSessionOfALimitedAppOpensAtOnceAfterARestart(t *testing.T) {
	h := newEnv(t)
	h.settings.AckWait = 30 * time.Second
	lease := func(o *options) { o.AckWait = h.settings.AckWait }
	for round := range 2 {
		// One of the two drains in its session: its job is handed back.
		began := make(chan time.Time, 99)
		from := time.Now()
		w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
			began <- time.Now()
			if round == 0 && strings.HasPrefix(a.Job.ID, "long") {
				connect(a)
				return untilDone(ctx)
			}
			_, err := speakAll(ctx, a)
			return err
		}), maxSessions(2), lease, shortDrain)
		if round == 0 {
			h.submit("default", job("short")) // it must not have to wait for the two that last
			receive(t, began, "session")
			h.outcome("short", lifecycle.StateCompleted)
			h.submit("default", job("long1"))
			h.submit("default", job("long2"))
			for range 2 {
				receive(t, began, "session")
			}
			for i := range 40 { // wait for a session of the app
				h.submit("default", job(fmt.Sprintf("waits%d", i)))
			}
			h.eventually("all were handed out", func() bool { return h.delivered() >= 43 })
			w.end()
			continue
		}
		for range 2 {
			// A second on a quiet machine; a wait for a lease is thirty.
			took := receive(t, began, "next session").Sub(from)
			t.Log("a session opened", took, "after the start")
			if took > natstest.Unhurried(3*time.Second) {
				t.Errorf("a session opened %s after the worker's start", took)
			}
		}
		h.outcome("long1", lifecycle.StateCompleted)
		h.outcome("long2", lifecycle.StateCompleted)
	}
}
