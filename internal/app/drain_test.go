package app_test

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
)

func TestADrainFinishesWhatRunsAndTakesNothingNew(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) { c.Worker.DrainTimeout = 30 * time.Second }})
	f.publish("talk", "ok", live("10s"))
	f.say("talk", silence(3*time.Second), end)
	f.state("talk", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	w.drain()
	f.publish("later", "ok-later", nil)
	f.say("talk", silence(3*time.Second), closing)
	w.stop()
	if r := f.record("talk"); r.State != lifecycle.StateCompleted || r.Session != 1 || r.UtterancesDone != 2 {
		t.Errorf("%+v", r)
	}
	if n := len(f.sessions("ok-later")); n != 0 {
		t.Errorf("%d sessions were started while draining", n)
	}
	f.worker(worker{})
	if done := f.completed("later"); done.Attempts != 1 {
		t.Errorf("%+v", done)
	}
}

func TestWhatDoesNotFinishInTimeIsHandedBackAndRunElsewhereAsTheSameAttempt(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	first := f.worker(worker{config: func(c *config.Config) {
		c.Worker.Name, c.Worker.DrainTimeout = "first", 300*time.Millisecond
	}})
	f.publish("long", "ok", live("20s"))
	f.say("long", silence(3*time.Second), end)
	f.say("long", silence(3*time.Second), going) // in flight when it is handed back
	f.watch(f.names.FramesStream(), f.names.Frames("long"), func(msg jetstream.Msg) bool {
		return number(t, msg, "Avatar-Utterance") == 2
	})
	f.worker(worker{config: func(c *config.Config) { c.Worker.Name = "second" }})
	began := time.Now()
	first.stop()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the drain took %s", took)
	}
	f.state("long", func(r lifecycle.Record) bool { return r.State == lifecycle.StateRunning && r.Session == 2 })
	f.say("long", silence(time.Second), closing)
	done := f.completed("long")
	if done.Attempts != 1 || done.Session != 2 || done.Worker != "second" || done.UtterancesTotal != 2 || done.Utterances[1].AudioMS != 4000 {
		t.Errorf("%+v", done)
	}
	if r := f.record("long"); r.Crashes != 0 {
		t.Errorf("a drain counted as a crash: %+v", r)
	}
	released := 0
	for _, msg := range f.event("long", "completed") {
		if msg.Subject() == f.names.Events("released", "long") {
			released++
		}
	}
	if released != 1 || len(f.errorEvents("long")) != 0 {
		t.Errorf("%d released events, error events %+v", released, f.errorEvents("long"))
	}
	for _, s := range f.sessions("ok") {
		if s.CloseCode != 1000 || s.ClosedBy != "client" {
			t.Errorf("%+v", s)
		}
	}
}

func TestAWorkerThatIsAskedToDrainEndsAsAfterATermination(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) { c.Worker.DrainTimeout = 30 * time.Second }})
	other := f.worker(worker{config: func(c *config.Config) { c.Worker.Name = "other" }})
	f.publish("talk", "ok", live("10s"))
	f.say("talk", silence(3*time.Second), end)
	r := f.state("talk", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	if r.WorkerID == other.app.ID() {
		w, other = other, w
	}
	o, err := operate.Open(f.ctx, f.js.Conn(), f.js, f.names)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // it may be repeated
		if d, err := o.Drain(f.ctx, r.WorkerID); err != nil || d.WorkerID != r.WorkerID || d.Running != 1 {
			t.Fatalf("%+v, %v", d, err)
		}
	}
	f.publish("later", "ok-later", nil)
	if done := f.completed("later"); done.WorkerID != other.app.ID() {
		t.Errorf("ran on %s", done.WorkerID)
	}
	f.say("talk", silence(3*time.Second), closing)
	if err := o.Empty(f.ctx, r.WorkerID); err != nil {
		t.Fatal(err)
	}
	if r := f.record("talk"); r.State != lifecycle.StateCompleted || r.Session != 1 {
		t.Errorf("%+v", r)
	}
	<-w.done
	if err := o.Empty(f.ctx, r.WorkerID); err != nil {
		t.Errorf("of a worker that is gone: %v", err)
	}
}
