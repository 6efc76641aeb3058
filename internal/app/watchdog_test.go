package app_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// often is how often the workers of these tests look.
const often = 100 * time.Millisecond

func (f *fleet) remove(stream string) {
	f.t.Helper()
	if err := f.js.DeleteStream(f.ctx, stream); err != nil {
		f.t.Fatal(err)
	}
}

// reason is why a worker is not ready; "": it is.
func (r *running) reason() string {
	if err := r.app.Ready(); err != nil {
		return err.Error()
	}
	return ""
}

func TestWhatIsDeletedUnderneathAWorkerIsReportedAndMadeAgainWhereEmptyIsNoHarm(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	log := &buffer{}
	w := f.worker(worker{log: log, checkEvery: often, config: func(c *config.Config) { c.Lease.AckWait = 30 * time.Second }})
	for stream, object := range map[string]string{
		f.names.EventsStream(): "stream AVATAR_EVENTS", f.names.FramesStream(): "stream AVATAR_FRAMES",
		f.names.DLQStream(): "stream AVATAR_DLQ", f.names.AudioStream(): "stream AVATAR_AUDIO",
		"KV_AVATAR_FLEET":        "bucket AVATAR_FLEET",
		"OBJ_AVATAR_AUDIO_FILES": "bucket AVATAR_AUDIO_FILES", "OBJ_AVATAR_RECORDINGS": "bucket AVATAR_RECORDINGS",
	} {
		f.remove(stream)
		natstest.Eventually(t, object, func() bool { return strings.Contains(log.String(), object+" was recreated") })
		natstest.Eventually(t, object, func() bool { return w.reason() == "" })
		if _, err := f.js.Stream(f.ctx, stream); err != nil {
			t.Errorf("%s: %v", object, err)
		}
		if n := strings.Count(log.String(), object+" is missing"); n != 1 {
			t.Errorf("%s: logged %d times\n%s", object, n, log.String())
		}
	}
	f.publish("frames", "ok", nil)
	f.publish("object", "ok", fields{"output": fields{"object": fields{}}, "audio": f.uploaded(time.Second)})
	f.publish("failed", "fail-avatarNotFound", nil)
	f.completed("frames")
	f.completed("object")
	if f.outcome("failed"); len(f.frames("frames")) == 0 || len(f.recording("object")) == 0 || len(f.deadLetters("failed")) != 1 {
		t.Error("not everything is written to what was made again")
	}
}

func TestAWorkerIsNotReadyWithoutItsJobsOrItsRecordsUntilAnotherOneMadeThem(t *testing.T) {
	t.Parallel()
	for stream, object := range map[string]string{"AVATAR_JOBS": "stream AVATAR_JOBS", "KV_AVATAR_STATE": "bucket AVATAR_STATE"} {
		t.Run(object, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, nil)
			log := &buffer{}
			w := f.worker(worker{log: log, checkEvery: often})
			f.remove(stream)
			natstest.Eventually(t, object, func() bool { return strings.Contains(w.reason(), object+" is missing") })
			// A request for jobs may have failed too: that is another line.
			reason := strings.Split(w.reason(), "\n")
			if !slices.ContainsFunc(reason, func(line string) bool {
				return strings.HasPrefix(line, object+" is missing") && strings.Contains(line, "start a worker")
			}) {
				t.Errorf("%q does not say what to do, in one line", reason)
			}
			if _, err := f.js.Stream(f.ctx, stream); !errors.Is(err, jetstream.ErrStreamNotFound) {
				t.Errorf("made again: %v", err)
			}
			f.worker(worker{checkEvery: often, config: func(c *config.Config) { c.Worker.Name = "second" }})
			natstest.Eventually(t, object, func() bool { return w.reason() == "" })
			if text := log.String(); strings.Count(text, object+" is missing") != 1 || strings.Count(text, object+" is back") != 1 {
				t.Errorf("not logged once each:\n%s", text)
			}
			f.publish("after", "ok", nil)
			f.completed("after")
		})
	}
}

func TestWhatCanNotBeMadeAgainIsSaidForAsLongAsItLasts(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{checkEvery: often})
	// The worker may make the stream again before another takes its subjects.
	natstest.Eventually(t, "another stream has the subjects", func() bool {
		if err := f.js.DeleteStream(f.ctx, f.names.FramesStream()); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Fatal(err)
		}
		_, err := f.js.CreateStream(f.ctx, jetstream.StreamConfig{Name: "OTHER", Subjects: []string{f.names.AllFrames()}})
		return err == nil
	})
	natstest.Eventually(t, "the reason", func() bool {
		return strings.Contains(w.reason(), "stream AVATAR_FRAMES is missing and can't be made again") && strings.Contains(w.reason(), "another stream takes these subjects")
	})
	f.remove("OTHER")
	natstest.Eventually(t, "ready again", func() bool { return w.reason() == "" })
}

// A fleet's bucket that is made again begins with revision 1.
func TestWorkersPublishTheirPresenceAgainWhenTheFleetsBucketWasMadeAgain(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{checkEvery: often, config: func(c *config.Config) { c.Circuit.Cooldown, c.Circuit.MaxCooldown = time.Hour, time.Hour }})
	f.publish("held", "fail-billingRequired", nil)
	f.state("held", func(r lifecycle.Record) bool { return r.State == lifecycle.StateHeld })
	f.remove("KV_AVATAR_FLEET")
	natstest.Eventually(t, "the circuit in the new bucket", func() bool {
		kv, err := f.js.KeyValue(f.ctx, f.names.FleetBucket())
		if err != nil {
			return false
		}
		_, err = kv.Get(f.ctx, "circuit.app.=")
		return err == nil
	})
	// Who starts now finds the circuit open.
	f.worker(worker{config: func(c *config.Config) { c.Worker.Name = "second" }})
	f.publish("next", "ok", nil)
	f.state("next", func(r lifecycle.Record) bool { return r.State == lifecycle.StateHeld })
	natstest.Eventually(t, "the new bucket watched", func() bool {
		s, err := f.js.Stream(f.ctx, "KV_AVATAR_FLEET")
		return err == nil && s.CachedInfo().State.Consumers >= 2
	})
}
