package app_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/dlq"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/operate"
)

// published is when a job's outcome was published, and when its last usage record was
// stored.
func (f *fleet) published(id string) (outcome, usage time.Time) {
	f.t.Helper()
	at := func(msg jetstream.Msg) time.Time {
		meta, err := msg.Metadata()
		if err != nil {
			f.t.Fatal(err)
		}
		return meta.Timestamp
	}
	events := f.event(id, "completed", "dead_lettered", "expired", "cancelled")
	for _, msg := range f.all(f.names.UsageStream(), f.names.AllUsage()) {
		if strings.HasPrefix(msg.Headers().Get("Nats-Msg-Id"), id+".") {
			usage = at(msg)
		}
	}
	return at(events[len(events)-1]), usage
}

func TestWhileTheUsageStreamIsAwayNoOutcomeIsPublishedAndNothingIsLost(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{checkEvery: time.Hour, config: func(c *config.Config) { // it is not made again
		fourAtATime(c)
		c.Backend.StallTimeout = 2 * time.Second
	}})
	ids := []string{"slow-ok", "fails"}
	f.publish("slow-ok", "slow-1500", nil)
	f.publish("fails", "hang", fields{"max_attempts": 1})
	for _, id := range ids {
		f.state(id, func(r lifecycle.Record) bool { return r.ConnectionID != "" })
	}
	usage := f.recorded(f.names.UsageStream())
	if err := f.js.DeleteStream(f.ctx, f.names.UsageStream()); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids { // the sessions have ended, and their records say how
		f.state(id, func(r lifecycle.Record) bool { return r.State.Final() || r.Outcome != "" })
	}
	// The stream has refused their usage records: that counts at once, and not only
	// when what the worker last heard of the stream is old.
	f.publish("later", "ok-later", fields{"output": fields{"discard": fields{}}})
	f.heldForStorage("later", "ok-later")
	f.notReadyFor(w, f.names.UsageStream())
	for _, kind := range []string{"completed", "dead_lettered"} {
		for _, id := range ids {
			if events := f.all(f.names.EventsStream(), f.names.Events(kind, id)); len(events) > 0 {
				t.Errorf("%s of %s was published before its usage record was stored", kind, id)
			}
		}
	}
	if letters := f.deadLetters("fails"); len(letters) > 0 {
		t.Error("a dead letter was written before the usage record was stored")
	}
	if _, err := f.js.CreateStream(f.ctx, usage); err != nil {
		t.Fatal(err)
	}
	f.completed("slow-ok")
	f.completed("later")
	if r := f.outcome("fails"); r.Outcome != lifecycle.StateDeadLettered {
		t.Errorf("fails is %s", r.Outcome)
	}
	f.until("ready again", func() bool { return w.app.Ready() == nil })
	for _, id := range append(ids, "later") {
		if outcome, usage := f.published(id); usage.IsZero() || usage.After(outcome) {
			t.Errorf("%s: the outcome was published at %s, the usage record was stored at %s", id, outcome, usage)
		}
	}
	f.balanced()
}

func TestWhileUsageRecordsAreDeniedNoSessionBegins(t *testing.T) {
	t.Parallel()
	url, admin := natstest.Denying(t, "avatar.usage.>")
	f := &fleet{t: t, url: url}
	f.open(admin, nil)
	w := f.worker(worker{config: fourAtATime})
	f.publish("j", "ok-j", fields{"output": fields{"discard": fields{}}})
	f.heldForStorage("j", "ok-j")
	f.notReadyFor(w, f.names.UsageStream())
	f.notReadyFor(w, "permission")
	if n := len(f.used()); n > 0 {
		t.Errorf("%d records of sessions that never were", n)
	}
	f.noDeadLetters()
}

// What an operator runs again is another session: of another run, or of another
// attempt of the same.
func TestAnOperatorsReplayAndRetryAreInTheLedgerOnceEach(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) {
		fourAtATime(c)
		c.Retry.Initial, c.Retry.Max = time.Hour, time.Hour // only an operator ends it
	}})
	f.publish("again", "fail-serverError", fields{"max_attempts": 1})
	f.publish("now", "flaky-upstreamError-1", nil)
	f.outcome("again")
	f.state("now", func(r lifecycle.Record) bool { return r.State == lifecycle.StateRetrying })
	letters := dlq.NewStore(f.js, f.names, nil)
	for e, err := range letters.List(f.ctx, dlq.Filter{Jobs: []string{"again"}}, 1) {
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second one finds it done
			if _, err := letters.Replay(f.ctx, e.Seq, dlq.ReplayOptions{}); err != nil && !strings.Contains(err.Error(), dlq.ErrNoLetter.Error()) {
				t.Fatal(err)
			}
		}
	}
	o, err := operate.Open(f.ctx, f.js.Conn(), f.js, f.names)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := o.Retry(f.ctx, "now", false); err != nil || !r.Done() {
		t.Fatalf("%+v, %v", r, err)
	}
	f.completed("now")
	f.state("again", func(r lifecycle.Record) bool { return r.Run == 2 && r.State == lifecycle.StateDeadLettered })
	f.until("the letter of run 2", func() bool { return len(f.deadLetters("again")) == 1 })
	used := f.balanced()
	for _, id := range []string{"again.run1.s1", "again.run2.s1", "now.run1.s1", "now.run1.s2"} {
		if _, ok := used[id]; !ok {
			t.Errorf("%s is not in the ledger: %+v", id, used)
		}
	}
	if len(used) != 4 {
		t.Errorf("%d sessions in the ledger", len(used))
	}
	if n := len(f.sessions("fail-serverError")) + len(f.sessions("flaky-upstreamError-1")); n != 4 {
		t.Errorf("the backend had %d sessions", n)
	}
}
