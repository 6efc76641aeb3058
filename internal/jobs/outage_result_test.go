package jobs_test

import (
	"context"
	"testing"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// The server was away for longer than the lease: all leases are gone at once,
// although no worker has died, and some workers are back before others.
func TestAResultIsWrittenAfterAnOutageThoughAnotherWorkerIsBackFirst(t *testing.T) {
	t.Parallel()
	const window = 6 * time.Second
	dir := t.TempDir()
	server, err := natsserver.Start(natsserver.Options{StoreDir: dir, Port: natstest.Port(t)})
	if err != nil {
		t.Fatal(err)
	}
	h := &env{t: t, server: server}
	h.openOnDisk()
	lease := h.leaseOf(window)
	k := newLink(t, h.url)
	began, away, over := make(chan struct{}, 4), make(chan struct{}), make(chan struct{}, 4)
	defer h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-away
		_, err := speakAll(ctx, a)
		over <- struct{}{}
		return err
	}), lease, func(o *options) { o.url = k.url() }).end() // while NATS is there
	h.submit("default", job("j1"))
	receive(t, began, "session")
	again := &script{}
	first := h.start(again, lease)
	defer first.end()
	h.eventually("ready", func() bool { return first.Ready() == nil })

	if err := server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	close(away)
	receive(t, over, "end of the session")
	k.silence(true)
	h.eventually("the lease is lost", func() bool { return first.Ready() != nil })
	after := time.NewTimer(window) // the lease that the server knows ends too
	<-after.C
	h.server = natstest.StartWith(t, natsserver.Options{StoreDir: dir, Port: portOf(t, h.url)})
	h.eventually("ready again", func() bool { return first.Ready() == nil })
	after.Reset(window / 20) // enough to take the job over
	<-after.C
	k.silence(false)

	r := h.outcome("j1", lifecycle.StateCompleted)
	if r.Session != 1 || r.Crashes != 0 || len(again.ran()) != 0 {
		t.Errorf("the job was run again: session %d, %d crashes, %v", r.Session, r.Crashes, again.ran())
	}
}
