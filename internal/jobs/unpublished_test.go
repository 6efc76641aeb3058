package jobs_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// newDeniedEnv is newEnv with a NATS that refuses workers what they publish on some
// subjects. The function returned makes a worker one of them.
func newDeniedEnv(t *testing.T, denied string) (*env, func(*options)) {
	t.Helper()
	t.Parallel()
	url := natstest.Configured(t, `
		listen: "127.0.0.1:-1"
		jetstream { max_memory_store: 64GB }
		authorization { users: [
			{user: admin, password: p}
			{user: worker, password: p, permissions: {publish: {allow: ">", deny: [`+denied+`]}}}
		] }`)
	h := &env{t: t, url: url, storage: jetstream.MemoryStorage, settings: topology.DefaultSettings()}
	h.nc = natstest.ConnectURL(t, url, nats.UserInfo("admin", "p"))
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		t.Fatal(err)
	}
	h.settings.AckWait, h.settings.Storage = 10*time.Second, h.storage
	h.ensure()
	return h, func(o *options) {
		o.AckWait, o.Logger = h.settings.AckWait, zerolog.Nop()
		o.natsOpt = []nats.Option{nats.UserInfo("worker", "p"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}
	}
}

// refusesApp is storage that takes nothing of the jobs of an app.
type refusesApp struct {
	fullStore
	app string
}

func (s refusesApp) Reserve(_ context.Context, job *jobspec.Job, _ int) error {
	if job.GetAppId() == s.app {
		return errors.New("the bucket is full")
	}
	return nil
}

// Jobs of which something can't be published come again and again: none of them keeps a
// slot while it is tried.
func TestWhatCannotBePublishedTakesNoJobsSlot(t *testing.T) {
	t.Parallel()
	const n = 160
	crowd := func(h *env, fields string) {
		for i := range n {
			h.submit("default", job(fmt.Sprintf("crowd%d", i), fields))
		}
	}
	for name, c := range map[string]struct {
		denied string
		crowd  func(h *env)
	}{
		"duplicates": {`"avatar.events.duplicate.>"`, func(h *env) {
			for range n {
				h.submit("default", job("first"))
			}
		}},
		"holds":    {`"avatar.events.held.>"`, func(h *env) { crowd(h, `"app_id":"app-full"`) }},
		"failures": {`"avatar.errors.>"`, func(h *env) { crowd(h, `"app_id":"app-fails"`) }},
		"what the stream of events does not say": {`"$JS.API.DIRECT.GET.AVATAR_EVENTS.>", "$JS.API.STREAM.MSG.GET.AVATAR_EVENTS"`, func(h *env) {
			crowd(h, `"app_id":"app-full"`)
		}},
		"the outcomes of runs before": {`"avatar.events.dead_lettered.>"`, func(h *env) {
			now := time.Now().UTC()
			for i := range n {
				id := fmt.Sprintf("crowd%d", i)
				h.put(&lifecycle.Record{
					JobID: id, Run: 1, StreamSeq: 1 << 40, State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered, Queue: "default", AppID: "app1",
					AvatarID: "a", Attempt: 1, MaxAttempts: 5, CreatedAt: now, UpdatedAt: now, Reason: lifecycle.ReasonPermanent,
					LastError: &event.Error{JobID: id, Queue: "default", Run: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseHandshake, Time: now},
				})
				h.submit("default", job(id), jobspec.HeaderJobID, id, jobspec.HeaderRun, "2")
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h, denied := newDeniedEnv(t, c.denied)
			h.submit("default", job("first"))
			w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
				if a.AppID == "app-fails" {
					return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
				}
				_, err := speakAll(ctx, a)
				return err
			}), denied, func(o *options) {
				o.Concurrency, o.SettleTimeout, o.Storage = 4, time.Second, refusesApp{app: "app-full"}
			})
			h.outcome("first", lifecycle.StateCompleted)
			c.crowd(h)
			h.eventually("not ready for want of it", func() bool { return w.Ready() != nil })
			from := time.Now()
			for i := range 10 {
				id := fmt.Sprintf("good%d", i)
				h.submit("default", job(id))
				h.outcome(id, lifecycle.StateCompleted)
			}
			if took := time.Since(from); took > natstest.Unhurried(15*time.Second) { // each of the crowd would keep a slot for a second
				t.Errorf("ten jobs waited %s", took)
			}
		})
	}
}
