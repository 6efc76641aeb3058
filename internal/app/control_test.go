package app_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

func TestCancelAnswersTruthfullyWhateverTheJobDoes(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Retry.Initial, c.Retry.Max = 5*time.Second, 5*time.Second }})

	f.publish("running", "hang", nil)
	f.state("running", func(r lifecycle.Record) bool { return r.State == lifecycle.StateRunning })
	if got := f.control("running", "cancel"); got.Status != control.StatusCancelled || got.JobID != "running" {
		t.Errorf("cancel of a running job: %+v", got)
	}
	if r := f.outcome("running"); r.State != lifecycle.StateCancelled {
		t.Errorf("a running job ended %s", r.State)
	}
	if n := f.backend.OpenSessions(); n != 0 {
		t.Errorf("%d sessions open after the cancel was answered", n)
	}

	f.publish("done", "ok", nil)
	f.outcome("done")
	if got := f.control("done", "cancel"); got.Status != control.StatusFinished || got.Outcome != string(lifecycle.StateCompleted) {
		t.Errorf("cancel of a completed job: %+v", got)
	}

	f.publish("retrying", "fail-upstreamError", nil)
	f.event("retrying", "retrying")
	before := len(f.sessions("fail-upstreamError"))
	if got := f.control("retrying", "cancel"); got.Status != control.StatusRequested {
		t.Errorf("cancel of a waiting job: %+v", got)
	}
	if r := f.outcome("retrying"); r.State != lifecycle.StateCancelled || !r.CancelRequested {
		t.Errorf("a waiting job ended %s", r.State)
	}
	if n := len(f.sessions("fail-upstreamError")); n > before+1 { // it may have been on its way
		t.Errorf("%d sessions, %d before the cancel", n, before)
	}

	if got := f.control("unknown", "cancel"); got.Status != control.StatusRequested {
		t.Errorf("cancel of an unknown job: %+v", got)
	}
	f.publish("unknown", "ok-unknown", nil)
	if r := f.outcome("unknown"); r.State != lifecycle.StateCancelled || len(f.sessions("ok-unknown")) != 0 {
		t.Errorf("a job cancelled before it was published: %+v", r)
	}
	if got := f.control("running", "cancel"); got.Status != control.StatusCancelled {
		t.Errorf("cancel of a cancelled job: %+v", got)
	}
}

func TestInterruptOfWhatDoesNotSpeakSaysSo(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Retry.Initial, c.Retry.Max = time.Hour, time.Hour }})
	f.publish("waits", "fail-upstreamError", nil)
	f.event("waits", "retrying")
	f.publish("silent", "ok", live("10s"))
	f.state("silent", func(r lifecycle.Record) bool { return r.ConnectionID != "" }) // written down after 2 s
	f.publish("over", "ok", nil)
	f.outcome("over")
	for id, state := range map[string]lifecycle.State{
		"waits": lifecycle.StateRetrying, "silent": lifecycle.StateRunning, "over": lifecycle.StateCompleted, "absent": "",
	} {
		got := f.control(id, "interrupt")
		if got.Status != control.StatusNotRunning || got.State != string(state) || got.Message == "" {
			t.Errorf("interrupt of %s: %+v", id, got)
		}
	}
	for _, op := range []string{"", "stop", `cancel","op":"x`} {
		if got := f.control("silent", op); got.Status != control.StatusRefused {
			t.Errorf("%q: %+v", op, got)
		}
	}
	f.say("silent", nil, closing)
	f.completed("silent")
}

func TestJobsThatWaitForTheirRetryKeepNoOperatorWaiting(t *testing.T) {
	t.Parallel()
	const waiting = 300
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) {
		c.Worker.Concurrency = 4
		c.Retry.Initial, c.Retry.Max = time.Hour, time.Hour
		c.Alerts.Threshold = 1000
	}})
	// 300 jobs that fail after the confirm.
	for i := range waiting {
		f.publish(fmt.Sprintf("bad%d", i), "fail-serverError", fields{"audio": pcm(time.Second)})
	}
	seen := 0
	f.watch(f.names.EventsStream(), f.names.EventsFilter("retrying", ""), func(msg jetstream.Msg) bool {
		if strings.HasPrefix(msg.Subject(), f.names.Events("retrying", "bad")) {
			seen++
		}
		return seen >= waiting
	})
	f.publish("healthy", "ok", nil)
	f.completed("healthy")
}
