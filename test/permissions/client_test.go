package permissions_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

var names topology.Names

// each runs a role with all its permissions, and with one less at a time.
func each(t *testing.T, role string, run scenario) {
	t.Run("all", func(t *testing.T) { t.Parallel(); withAll(t, role, run) })
	for _, p := range lines(t, role) {
		t.Run("without "+p.kind+" "+p.subject, func(t *testing.T) { t.Parallel(); withOneLess(t, role, p, run) })
	}
}

func TestPublisherNeedsJustItsPermissions(t *testing.T) {
	t.Parallel()
	each(t, "publisher", publisher)
}

func TestListenerNeedsJustItsPermissions(t *testing.T) {
	t.Parallel()
	each(t, "listener", listener)
}

func TestOperatorNeedsJustItsPermissions(t *testing.T) {
	t.Parallel()
	each(t, "operator", operator)
}

func TestPublisherMayNotTouchWhatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	foreign(t, "publisher", others...)
}

func TestListenerMayNotTouchWhatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	foreign(t, "listener", others...)
}

// An operator writes records. What says which worker may run a job is the
// workers' alone.
func TestOperatorMayNotTouchLeasesAndSessionLimits(t *testing.T) {
	t.Parallel()
	foreign(t, "operator", "$KV.AVATAR_STATE.lease.w", "$KV.AVATAR_STATE.limit.app_id/app.1", "$JS.API.STREAM.PURGE.KV_AVATAR_STATE")
}

// publisher uploads speech, replaces it, publishes a job, speaks, and controls.
func publisher(ctx context.Context, t *testing.T, url string, refused *refusals) error {
	admin := connect(t, url, "admin", nil)
	prepare(ctx, t, admin)
	answer, err := admin.nc.Subscribe(names.Control("J"), func(m *nats.Msg) {
		if err := m.Respond([]byte("{}")); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := answer.Unsubscribe(); err != nil {
			t.Error(err)
		}
	}()
	if err := admin.nc.Flush(); err != nil {
		return err
	}
	c := connect(t, url, "publisher", refused)
	return firstOf(ctx,
		func(ctx context.Context) error {
			store, err := c.js.ObjectStore(ctx, names.AudioFilesBucket())
			if err != nil {
				return must(err, "open the bucket")
			}
			for range 2 {
				if _, err := store.PutBytes(ctx, "hello.wav", []byte("RIFF")); err != nil {
					return must(err, "upload")
				}
			}
			return nil
		},
		func(ctx context.Context) error {
			_, err := c.js.Publish(ctx, names.Jobs("default"), []byte(`{}`))
			return must(err, "publish a job")
		},
		func(ctx context.Context) error {
			_, err := c.js.Publish(ctx, names.Audio("J"), []byte("ab"))
			return must(err, "publish speech")
		},
		func(ctx context.Context) error {
			_, err := c.nc.RequestWithContext(ctx, names.Control("J"), []byte(`{"op":"cancel"}`))
			return must(err, "control")
		},
	)
}

// listener receives what comes, and reads what was before.
func listener(ctx context.Context, t *testing.T, url string, refused *refusals) error {
	admin := connect(t, url, "admin", nil)
	handles := prepare(ctx, t, admin)
	for _, subject := range []string{names.Events("completed", "J"), names.Frames("J")} {
		if _, err := admin.js.Publish(ctx, subject, []byte("x")); err != nil {
			return err
		}
	}
	// Enough for the server to ask the client to keep up.
	recording := bytes.Repeat([]byte("recording"), 1<<19)
	if _, err := handles.Recordings.PutBytes(ctx, "J", recording); err != nil {
		return err
	}
	c := connect(t, url, "listener", refused)
	read := func(stream string) func(context.Context) error {
		return func(ctx context.Context) error { return must(readFirst(ctx, c.js, stream), "read "+stream) }
	}
	return firstOf(ctx,
		receive(c, admin, names.AllEvents(), names.Events("started", "J")),
		receive(c, admin, names.AllErrors(), names.Errors("server", "serverError")),
		receive(c, admin, names.AllAlerts(), names.Alerts("recurring", "serverError")),
		receive(c, admin, names.AllFrames(), names.Frames("J")),
		read(names.EventsStream()),
		read(names.FramesStream()),
		func(ctx context.Context) error { return must(scan(ctx, c.js, names.EventsStream()), "scan the events") },
		func(ctx context.Context) error { return must(scan(ctx, c.js, names.FramesStream()), "scan the frames") },
		func(ctx context.Context) error {
			store, err := c.js.ObjectStore(ctx, names.RecordingsBucket())
			if err != nil {
				return must(err, "open the recordings")
			}
			// The client does not notice that ctx is cancelled while no chunk comes: only
			// its deadline ends the read.
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			data, err := store.GetBytes(ctx, "J")
			if err == nil && !bytes.Equal(data, recording) {
				err = errors.New("these are not the bytes")
			}
			return must(err, "read the recording")
		},
		func(ctx context.Context) error {
			body, _, err := audio.JetStreamObjects(c.js)(ctx, names.RecordingsBucket(), "J")
			if err == nil {
				_, err = io.ReadAll(body)
			}
			return must(err, "read the recording as the tool does")
		},
	)
}

// scan reads a stream to its end, as `avatarworker events --no-follow` does.
func scan(ctx context.Context, js jetstream.JetStream, name string) error {
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return err
	}
	return streams.Scan(ctx, stream, jetstream.ConsumerConfig{}, func(jetstream.Msg, *jetstream.MsgMetadata) bool { return true })
}

// readFirst reads a stream's first message through its own consumer.
func readFirst(ctx context.Context, js jetstream.JetStream, name string) error {
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return err
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	messages, err := consumer.Messages()
	if err != nil {
		return err
	}
	defer messages.Stop()
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	_, err = messages.Next()
	return err
}

// operator looks at the fleet, and at dead letters: replays one, removes one;
// cancels a job.
func operator(ctx context.Context, t *testing.T, url string, refused *refusals) error {
	admin := connect(t, url, "admin", nil)
	handles := prepare(ctx, t, admin)
	for _, id := range []string{"J", "K"} {
		if err := dlq.NewWriter(admin.js, names).Write(ctx, letter(id)); err != nil {
			return err
		}
	}
	running, err := json.Marshal(lifecycle.Record{JobID: "R", Run: 1, State: lifecycle.StateRunning, WorkerID: "w"})
	if err != nil {
		return err
	}
	if _, err := handles.State.Put(ctx, "R", running); err != nil {
		return err
	}
	if _, err := handles.Fleet.Put(ctx, "worker.w", []byte(`{"worker":"w","worker_id":"w"}`)); err != nil {
		return err
	}
	if err := leaveTraces(ctx, admin, handles); err != nil {
		return err
	}
	ping, err := admin.nc.Subscribe("$SRV.PING", func(m *nats.Msg) {
		if err := m.Respond([]byte("{}")); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := ping.Unsubscribe(); err != nil {
			t.Error(err)
		}
	}()
	drain, err := admin.nc.Subscribe(names.AllWorkerDrains(), func(m *nats.Msg) {
		if err := m.Respond([]byte(`{"worker_id":"w"}`)); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := drain.Unsubscribe(); err != nil {
			t.Error(err)
		}
	}()
	if err := admin.nc.Flush(); err != nil {
		return err
	}
	if _, err := handles.State.Put(ctx, "B", []byte(`{"job_id":"B","run":1,"stream_seq":1,"state":"retrying","queue":"default","app_id":"other","next_attempt_at":"2100-01-01T00:00:00Z"}`)); err != nil {
		return err
	}
	if _, err := handles.Fleet.Put(ctx, "circuit.app.us-west", []byte(`{"app_id":"app","region":"us-west","state":"open"}`)); err != nil {
		return err
	}
	c := connect(t, url, "operator", refused)
	letters := dlq.NewStore(c.js, names, nil)
	return firstOf(ctx,
		func(ctx context.Context) error { return look(ctx, c) },
		func(ctx context.Context) error {
			for entry, err := range letters.List(ctx, dlq.Filter{}, 0) {
				if err != nil {
					return must(err, "list")
				}
				if _, err := letters.Show(ctx, entry.Seq); err != nil {
					return must(err, "show")
				}
			}
			return nil
		},
		func(ctx context.Context) error {
			r, err := letters.Replay(ctx, 1, dlq.ReplayOptions{Correct: func(dlq.Letter) ([]byte, error) {
				return []byte(`{"avatar_id":"corrected","audio":{"url":"https://h/a.wav"}}`), nil
			}})
			if err != nil {
				return must(err, "replay")
			}
			_, _, err = letters.Original(ctx, r.JobID, r.Run)
			return must(err, "read the original")
		},
		func(ctx context.Context) error { return must(letters.Remove(ctx, 2), "remove") },
		func(ctx context.Context) error {
			operator, err := operate.Open(ctx, c.nc, c.js, names)
			if err != nil {
				return must(err, "open the records")
			}
			_, err = operator.Cancel(ctx, "R", true)
			return must(err, "cancel")
		},
		func(ctx context.Context) error { return costs(ctx, c) },
		func(ctx context.Context) error { return must(operateOn(ctx, c), "operate") },
		func(ctx context.Context) error {
			_, err := c.nc.RequestWithContext(ctx, "$SRV.PING", nil)
			return must(err, "ping the services")
		},
	)
}

// costs adds up the ledger, reads it, and changes a budget.
func costs(ctx context.Context, c client) error {
	store := cost.NewStore(c.js, names, nil)
	if _, after, err := store.Rebuild(ctx); err != nil || after.Counters != 1 || after.Pending != 0 {
		return must(errors.Join(err, fmt.Errorf("%+v", after)), "rebuild the counters")
	}
	if _, err := store.Sum(ctx, cost.Query{By: cost.ByApp}); err != nil {
		return must(err, "sum what it costs")
	}
	fleet, err := c.js.KeyValue(ctx, names.FleetBucket())
	if err != nil {
		return must(err, "open the fleet's bucket")
	}
	_, err = fleet.Put(ctx, budget.SettingKey("app_id", budget.Month), []byte(`{"credits":1}`))
	return must(err, "change a budget")
}

// operateOn retries a job, pauses a queue, closes a circuit and drains a worker.
func operateOn(ctx context.Context, c client) error {
	o, err := operate.Open(ctx, c.nc, c.js, names)
	if err != nil {
		return err
	}
	if r, err := o.Retry(ctx, "B", false); err != nil || r.Status != operate.StatusDelivered {
		return errors.Join(err, fmt.Errorf("retry: %+v", r))
	}
	if _, err := o.Pause(ctx, "default", time.Hour); err != nil {
		return err
	}
	if _, err := o.Resume(ctx, "default"); err != nil {
		return err
	}
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return err
	}
	if _, err := circuits.Close(ctx, "app", "us-west"); err != nil {
		return err
	}
	if _, err := o.Drain(ctx, "w"); err != nil {
		return err
	}
	return o.Empty(ctx, "w")
}

// leaveTraces publishes a job that is taken, one that waits, and what is told of
// job R.
func leaveTraces(ctx context.Context, admin client, handles topology.Handles) error {
	failure := &nats.Msg{
		Subject: names.Errors("server", "serverError"), Header: nats.Header{"ce-subject": {"R"}, "ce-id": {"R.run1.s1.error"}}, Data: []byte(`{"job_id":"R"}`),
	}
	for _, subject := range []string{names.Events("started", "R"), names.Jobs("default"), names.Jobs("default")} {
		if _, err := admin.js.Publish(ctx, subject, []byte("{}")); err != nil {
			return err
		}
	}
	if _, err := admin.js.PublishMsg(ctx, failure); err != nil {
		return err
	}
	if _, err := admin.js.Publish(ctx, names.Usage("app", "default"), []byte(`{"job_id":"R","run":1,"session":1,"app_id":"app","queue":"default","confirmed_at":"2026-03-01T12:00:00Z"}`), jetstream.WithMsgID("R.run1.s1")); err != nil {
		return err
	}
	_, err := handles.Consumers["default"].Next(jetstream.FetchMaxWait(5 * time.Second))
	return err
}

func letter(id string) lifecycle.DeadLetter {
	return lifecycle.DeadLetter{
		Job:  jobspec.Identity{ID: id, Run: 1, Queue: "default", Subject: names.Jobs("default"), StreamSeq: 1},
		Data: []byte(`{}`), Reason: lifecycle.ReasonPermanent, FailedAt: time.Now(), Worker: "w",
		Error: event.Error{JobID: id, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig},
	}
}

// others lists what only workers and operators may touch.
var others = []string{
	"$KV.AVATAR_STATE.J", "$KV.AVATAR_STATE.lease.w", "$KV.AVATAR_STATE.limit.app_id/app.1",
	"$JS.API.STREAM.DELETE.AVATAR_JOBS", "$JS.API.STREAM.PURGE.AVATAR_DLQ",
	"$JS.API.STREAM.MSG.GET.AVATAR_JOBS", "$JS.API.STREAM.MSG.GET.AVATAR_DLQ", "$JS.ACK.AVATAR_JOBS.default.1.1.1.1.1",
	"$JS.API.DIRECT.GET.AVATAR_JOBS", "$JS.API.CONSUMER.PAUSE.AVATAR_JOBS.default", "$KV.AVATAR_FLEET.circuit.a.b", "avatar.workers.w.drain",
	"avatar.events.completed.J", "avatar.workers.w",
}

// foreign asserts that a role may not publish to the subjects.
func foreign(t *testing.T, role string, subjects ...string) {
	for _, subject := range subjects {
		t.Run(subject, func(t *testing.T) {
			t.Parallel()
			refused := newRefusals(&permission{subject, "publish"})
			c := connect(t, start(t, role, nil), role, refused)
			if err := c.nc.Publish(subject, []byte("x")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-refused.seen:
			case <-time.After(enough):
				t.Error("the server did not refuse it")
			}
		})
	}
}

// receive subscribes and wants what the publisher then publishes.
func receive(c, publisher client, filter, subject string) func(context.Context) error {
	return func(ctx context.Context) error {
		sub, err := c.nc.SubscribeSync(filter)
		if err != nil {
			return err
		}
		if err := c.nc.Flush(); err != nil {
			return err
		}
		if err := publisher.nc.Publish(subject, []byte("x")); err != nil {
			return err
		}
		_, err = sub.NextMsgWithContext(ctx)
		return must(err, "receive "+filter)
	}
}
