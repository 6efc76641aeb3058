package app_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
)

// long reports whether the long forms of tests are wanted.
func long() bool { return os.Getenv("AVATAR_LONG") != "" }

// change changes a stream's configuration; restore takes that back.
func (f *fleet) change(stream string, change func(*jetstream.StreamConfig)) (restore func()) {
	f.t.Helper()
	s, err := f.js.Stream(f.ctx, stream)
	if err != nil {
		f.t.Fatal(err)
	}
	before := s.CachedInfo().Config
	changed := before
	change(&changed)
	update := func(c jetstream.StreamConfig) {
		if _, err := f.js.UpdateStream(f.ctx, c); err != nil {
			f.t.Error(err)
		}
	}
	update(changed)
	return func() { update(before) }
}

// until waits for something that only asking shows.
func (f *fleet) until(what string, holds func() bool) {
	f.t.Helper()
	natstest.Eventually(f.t, what, holds)
}

// notReadyFor waits until the worker is not ready and names a stream.
func (f *fleet) notReadyFor(w *running, stream string) {
	f.t.Helper()
	f.until("not ready for "+stream, func() bool {
		err := w.app.Ready()
		return err != nil && strings.Contains(err.Error(), stream)
	})
}

// discards runs jobs that need no store, and wants each done soon.
func (f *fleet) discards(n int) {
	f.t.Helper()
	for i := range n {
		id, from := fmt.Sprintf("plain-%d-%d", time.Now().UnixNano(), i), time.Now()
		f.publish(id, "ok-plain", fields{"output": fields{"discard": fields{}}})
		f.completed(id)
		if took := time.Since(from); took > 20*time.Second {
			f.t.Errorf("a job that needs no store took %s", took)
		}
	}
}

// heldForStorage waits until the job is held, and wants nothing paid for it.
func (f *fleet) heldForStorage(id, avatar string) {
	f.t.Helper()
	r := f.state(id, func(r lifecycle.Record) bool { return r.State == lifecycle.StateHeld })
	if r.HeldReason != lifecycle.HeldStorage || r.Attempt > 1 || r.Crashes != 0 {
		f.t.Errorf("%s is held for %s: attempt %d, %d crashes", id, r.HeldReason, r.Attempt, r.Crashes)
	}
	if s := f.sessions(avatar); len(s) != 0 {
		f.t.Errorf("%d sessions of %s", len(s), id)
	}
}

func (f *fleet) noDeadLetters() {
	f.t.Helper()
	for _, msg := range f.all(f.names.DLQStream(), f.names.AllDLQ()) {
		f.t.Errorf("a dead letter: %s", msg.Headers().Get("Avatar-Error"))
	}
}

func fourAtATime(c *config.Config) { c.Worker.Concurrency = 4 }

func TestJobsAreHeldBeforeASessionWhileTheFramesStreamRefuses(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]func(*jetstream.StreamConfig){
		"all bytes used": func(c *jetstream.StreamConfig) { c.Discard, c.MaxBytes = jetstream.DiscardNew, 100 },
		"small messages": func(c *jetstream.StreamConfig) { c.MaxMsgSize = 100 },
		"no subject":     func(c *jetstream.StreamConfig) { c.Subjects = []string{"elsewhere.*"} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, nil)
			w := f.worker(worker{config: fourAtATime})
			restore := f.change(f.names.FramesStream(), refuse)
			const n = 8
			for i := range n {
				f.publish(fmt.Sprintf("fr-%d", i), fmt.Sprintf("ok-fr%d", i), nil)
			}
			for i := range n {
				f.heldForStorage(fmt.Sprintf("fr-%d", i), fmt.Sprintf("ok-fr%d", i))
			}
			f.notReadyFor(w, f.names.FramesStream())
			f.discards(3)
			if body := f.alert(event.AlertStorage); body["what"] != "frames" {
				t.Errorf("alert: %v", body)
			}
			if long() {
				f.discards(300)
			}
			restore()
			for i := range n {
				f.completed(fmt.Sprintf("fr-%d", i))
			}
			f.until("ready again", func() bool { return w.app.Ready() == nil })
			f.noDeadLetters()
		})
	}
}

func TestJobsAreHeldBeforeASessionWhileTheWorkerMayNotWriteWhatTheyMake(t *testing.T) {
	t.Parallel()
	for output, subject := range map[string]string{"frames": "avatar.frames.*", "object": "$O.AVATAR_RECORDINGS.C.>"} {
		t.Run(output, func(t *testing.T) {
			t.Parallel()
			url, admin := natstest.Denying(t, subject)
			f := &fleet{t: t, url: url}
			f.open(admin, nil)
			w := f.worker(worker{config: fourAtATime})
			const n = 3
			for i := range n {
				f.publish(fmt.Sprintf("j%d", i), fmt.Sprintf("ok-j%d", i), fields{"output": fields{output: fields{}}})
			}
			f.discards(2)
			for i := range n {
				f.heldForStorage(fmt.Sprintf("j%d", i), fmt.Sprintf("ok-j%d", i))
			}
			f.notReadyFor(w, "permission")
			f.discards(2)
			f.noDeadLetters()
		})
	}
}

func TestJobsAreHeldBeforeASessionWhileTheRecordingsAreFull(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) {
		fourAtATime(c)
		c.Streams.Recordings.MaxBytes = 1 << 20
	}})
	const n = 8 // of which four fit
	for i := range n {
		f.publish(fmt.Sprintf("rec-%d", i), fmt.Sprintf("ok-rec%d", i), fields{
			"utterances": []fields{pcm(8 * time.Second), pcm(8 * time.Second)}, "output": fields{"object": fields{}},
		})
	}
	done, held := 0, 0
	for i := range n {
		r := f.state(fmt.Sprintf("rec-%d", i), func(r lifecycle.Record) bool { return r.State.Final() || r.State == lifecycle.StateHeld })
		if r.State == lifecycle.StateHeld {
			held++
			f.heldForStorage(r.JobID, fmt.Sprintf("ok-rec%d", i))
		} else {
			done++
		}
	}
	if done < 3 || held < 3 {
		t.Errorf("%d done, %d held", done, held)
	}
	f.notReadyFor(w, f.names.RecordingsBucket())
	f.discards(3)
	f.change("OBJ_"+f.names.RecordingsBucket(), func(c *jetstream.StreamConfig) { c.MaxBytes = 64 << 20 })
	for i := range n {
		f.completed(fmt.Sprintf("rec-%d", i))
		if s := f.sessions(fmt.Sprintf("ok-rec%d", i)); len(s) != 1 {
			t.Errorf("job %d had %d sessions", i, len(s))
		}
	}
	f.until("ready again", func() bool { return w.app.Ready() == nil })
	f.noDeadLetters()
}

func TestJobWhoseFramesNeverFitIsRefusedBeforeItIsSpoken(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) {
		c.Streams.Recordings.MaxBytes, c.Streams.Frames.MaxBytes = 1<<20, 1<<20
	}})
	for id, extra := range map[string]fields{
		"object":   {"audio": f.uploaded(2 * time.Minute), "output": fields{"object": fields{}}},
		"frames":   {"audio": f.uploaded(3 * time.Minute), "output": fields{"frames": fields{}}},
		"together": {"utterances": []fields{f.uploaded(70 * time.Second), f.uploaded(71 * time.Second)}, "output": fields{"object": fields{}}},
	} {
		f.publish(id, "ok-"+id, extra)
		r := f.outcome(id)
		if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeInvalidJob || !strings.Contains(r.LastError.Message, "max_bytes") {
			t.Errorf("%s: %s: %+v", id, r.State, r.LastError)
		}
		if s := f.sessions("ok-" + id); len(s) != 0 {
			t.Errorf("%s: %d sessions", id, len(s))
		}
	}
	f.publish("fits", "ok", fields{"output": fields{"object": fields{}}})
	f.completed("fits")
	if err := w.app.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
}

func TestSessionWhoseStoreFailsCostsNoAttempt(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("conv", "ok", fields{"live": fields{"sample_rate": 16000}})
	f.say("conv", silence(time.Second), end)
	f.state("conv", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	restore := f.change(f.names.FramesStream(), func(c *jetstream.StreamConfig) { c.MaxMsgSize = 100 })
	f.say("conv", silence(time.Second), closing)
	r := f.state("conv", func(r lifecycle.Record) bool { return r.State == lifecycle.StateHeld })
	if r.HeldReason != lifecycle.HeldStorage || r.Attempt != 1 {
		t.Errorf("held for %s at attempt %d", r.HeldReason, r.Attempt)
	}
	if n := f.backend.OpenSessions(); n != 0 {
		t.Errorf("%d sessions still open", n)
	}
	restore()
	if done := f.completed("conv"); done.Attempts != 1 || len(done.Utterances) != 2 {
		t.Errorf("%+v", done)
	}
	if s := f.sessions("ok"); len(s) != 2 {
		t.Errorf("%d sessions, want the one that failed and one more", len(s))
	}
	if e := f.errorEvents("conv"); len(e) != 0 {
		t.Errorf("%+v", e)
	}
	f.noDeadLetters()
}

// Uploads and live speech come from stores of our own too.
func TestJobsAreHeldWhileTheirSpeechCannotBeRead(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{checkEvery: time.Hour})
	audio := f.uploaded(time.Second)
	data := f.recorded("OBJ_" + f.names.AudioFilesBucket())
	if err := f.js.DeleteStream(f.ctx, data.Name); err != nil {
		t.Fatal(err)
	}
	f.publish("upload", "ok-upload", fields{"audio": audio})
	f.heldForStorage("upload", "ok-upload")
	f.notReadyFor(w, f.names.AudioFilesBucket()+" is gone")
	f.discards(2)
	if _, err := f.js.CreateStream(f.ctx, data); err != nil {
		t.Fatal(err)
	}
	f.uploaded(time.Second)
	f.completed("upload")
	f.noDeadLetters()
}

// recorded is a stream's configuration.
func (f *fleet) recorded(stream string) jetstream.StreamConfig {
	f.t.Helper()
	s, err := f.js.Stream(f.ctx, stream)
	if err != nil {
		f.t.Fatal(err)
	}
	return s.CachedInfo().Config
}

func TestSessionOutlivesAFullBucketOfTheFleet(t *testing.T) {
	t.Parallel()
	f := newFleet(t, func(o *simulator.Options) { o.Speed = 1 })
	f.worker(worker{config: func(c *config.Config) { c.Lease.AckWait = 5 * time.Second }})
	f.change("KV_"+f.names.FleetBucket(), func(c *jetstream.StreamConfig) { c.Discard, c.MaxBytes = jetstream.DiscardNew, 1 })
	length := 11 * time.Second // of more than two leases
	if long() {
		length = 30 * time.Second
	}
	f.publish("long", "ok-long", fields{"utterances": []fields{pcm(length)}, "output": fields{"discard": fields{}}})
	f.completed("long")
	if s := f.sessions("ok-long"); len(s) != 1 {
		t.Errorf("%d sessions", len(s))
	}
}

// alert waits for an alert, and returns its body.
func (f *fleet) alert(kind string) (body map[string]any) {
	f.t.Helper()
	f.watch(f.names.EventsStream(), strings.TrimSuffix(f.names.AllAlerts(), ">")+kind+".>", func(msg jetstream.Msg) bool {
		if err := json.Unmarshal(msg.Data(), &body); err != nil {
			f.t.Fatal(err)
		}
		return true
	})
	return body
}

func TestWorkerWithABadKeyLeavesTheJobsToTheOthers(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	for range 3 {
		f.worker(worker{config: func(c *config.Config) { c.Worker.Name = "good" }})
	}
	bad := f.worker(worker{config: func(c *config.Config) { c.Worker.Name, c.App.APIKey = "bad", "status-401" }})
	const n = 40
	for i := range n {
		f.publish(fmt.Sprintf("j%d", i), "ok", nil)
	}
	for i := range n {
		f.completed(fmt.Sprintf("j%d", i))
	}
	f.noDeadLetters()
	err := bad.app.Ready()
	if err == nil || !strings.Contains(err.Error(), "API key") {
		t.Errorf("the worker with the bad key: %v", err)
	}
	body := f.alert(event.AlertWorkerKey)
	if body["worker"] != "bad" || body["app_id"] != "app" {
		t.Errorf("alert: %v", body)
	}
	if e := f.all(f.names.EventsStream(), f.names.AllErrors()); len(e) != 0 {
		t.Errorf("%d failed attempts, the first: %s", len(e), e[0].Data())
	}
	f.until("its presence says so", func() bool {
		kv, err := f.js.KeyValue(f.ctx, f.names.FleetBucket())
		if err != nil {
			return false
		}
		keys, err := kv.ListKeys(f.ctx)
		if err != nil {
			return false
		}
		found := false
		for key := range keys.Keys() {
			if entry, err := kv.Get(context.WithoutCancel(f.ctx), key); err == nil && strings.Contains(string(entry.Value()), `"worker":"bad"`) {
				found = found || strings.Contains(string(entry.Value()), `"refused_keys":["app"]`) || strings.Contains(string(entry.Value()), "API key")
			}
		}
		return found
	})
}
