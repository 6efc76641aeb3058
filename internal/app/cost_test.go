package app_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/cost"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
)

// used is what counts in the ledger, by session id.
func (f *fleet) used() map[string]usage.Record {
	f.t.Helper()
	found := map[string]usage.Record{}
	for _, msg := range f.all(f.names.UsageStream(), f.names.AllUsage()) {
		var r usage.Record
		if err := json.Unmarshal(msg.Data(), &r); err != nil {
			f.t.Fatal(err)
		}
		if before, ok := found[r.ID()]; ok && (!before.Estimated || r.Estimated) {
			f.t.Errorf("session %s is in the ledger twice: %+v and %+v", r.ID(), before, r)
		}
		found[r.ID()] = r
	}
	return found
}

// balanced holds the ledger against the backend's session log and the counters against the
// records. The simulated backend notes both ends of a session when it is scheduled: so
// much later may each of them be.
func (f *fleet) balanced(labels ...string) map[string]usage.Record {
	f.t.Helper()
	return f.balancedWithin(250*time.Millisecond+2*f.lateness(), labels...)
}

// sessionsEnd waits until the backend has noticed that each session was closed.
func (f *fleet) sessionsEnd() {
	f.t.Helper()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for slices.ContainsFunc(f.backend.SessionLog(), func(s simulator.Session) bool { return !s.Confirmed.IsZero() && s.Closed.IsZero() }) {
		select {
		case <-look.C:
		case <-f.ctx.Done():
			f.t.Fatal("a session is still open at the backend")
		}
	}
}

// balancedWithin is balanced with another tolerance of exact times: that of a fleet
// that has more to do than the machine can.
func (f *fleet) balancedWithin(tolerance time.Duration, labels ...string) map[string]usage.Record {
	f.t.Helper()
	used, byConnection := f.used(), map[string]usage.Record{}
	for _, r := range used {
		if r.Credits != max((r.ConnectedMS+5999)/6000, 1) {
			f.t.Errorf("%s: %d credits for %d ms", r.ID(), r.Credits, r.ConnectedMS)
		}
		byConnection[r.ConnectionID] = r
	}
	f.sessionsEnd()
	confirmed := 0
	for _, s := range f.backend.SessionLog() {
		if s.Confirmed.IsZero() {
			continue
		}
		confirmed++
		r, ok := byConnection[s.ConnectionID]
		if !ok {
			f.t.Errorf("session %s of %s is not in the ledger", s.ConnectionID, s.AvatarID)
			continue
		}
		off := time.Duration(r.ConnectedMS)*time.Millisecond - s.Closed.Sub(s.Confirmed)
		if !r.Estimated && off.Abs() > tolerance || r.Estimated && off < 0 {
			f.t.Errorf("%s (estimated %t) is %d ms, the backend's session log says %s", r.ID(), r.Estimated, r.ConnectedMS, s.Closed.Sub(s.Confirmed))
		}
	}
	if len(byConnection) != confirmed {
		f.t.Errorf("%d sessions in the ledger, the backend confirmed %d", len(byConnection), confirmed)
	}
	compared, err := cost.NewStore(f.js, f.names, labels).Compare(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	if len(compared.Differences) > 0 || compared.Records != int64(len(used)) {
		f.t.Errorf("the counters are not what the records add up to: %+v", compared)
	}
	f.summed(compared.Totals, labels...)
	return used
}

// summed checks that the counters, and the records that are not in them yet, add up
// to what all records do.
func (f *fleet) summed(want usage.Totals, labels ...string) {
	f.t.Helper()
	rows, err := cost.NewStore(f.js, f.names, labels).Sum(f.ctx, cost.Query{By: cost.ByDay})
	if err != nil {
		f.t.Fatal(err)
	}
	var sum usage.Totals
	for _, r := range rows {
		sum = sum.Plus(r.Totals)
	}
	if sum != want {
		f.t.Errorf("the counters add up to %+v, the records to %+v", sum, want)
	}
}

func TestEverySessionIsInTheLedgerOnceHoweverItEnds(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	w := f.worker(worker{config: func(c *config.Config) {
		c.Cost.Labels = []string{"customer"}
		c.Worker.DrainTimeout = 0
		c.Backend.StallTimeout = 4 * time.Second // of the mute one; the others are cancelled and handed back before it
		c.Backend.MaxSession = 20 * time.Second
	}})
	acme := fields{"labels": fields{"customer": "acme", "other": "x"}}
	f.publish("done", "ok", acme)
	f.publish("fails", "fail-serverError", fields{"max_attempts": 1})
	f.publish("flaky", "flaky-upstreamError-1", nil)
	f.publish("cut", "drop-1", fields{"max_attempts": 2})
	f.publish("refused", "fail-avatarNotFound", nil) // never confirmed
	f.publish("mute", "hang", fields{"max_attempts": 1})
	for id, want := range map[string]lifecycle.State{
		"done": lifecycle.StateCompleted, "fails": lifecycle.StateDeadLettered, "flaky": lifecycle.StateCompleted,
		"cut": lifecycle.StateDeadLettered, "refused": lifecycle.StateDeadLettered, "mute": lifecycle.StateDeadLettered,
	} {
		if r := f.outcome(id); r.Outcome != want {
			t.Errorf("%s is %s, want %s", id, r.Outcome, want)
		}
	}
	connected := func(r lifecycle.Record) bool { return r.ConnectionID != "" }
	f.publish("cancelled", "slow-20000", nil)
	f.state("cancelled", connected)
	f.cancel("cancelled")
	f.outcome("cancelled")
	f.publish("released", "slow-3000", nil)
	f.state("released", connected)
	w.stop() // the job is handed back at once
	f.worker(worker{config: func(c *config.Config) { c.Cost.Labels = []string{"customer"} }})
	f.outcome("released")
	used := f.balanced("customer")
	for id, code := range map[string]string{
		"done.run1.s1": "completed", "fails.run1.s1": "serverError", "flaky.run1.s1": "upstreamError", "flaky.run1.s2": "completed",
		"cut.run1.s1": "connectionClosed", "cut.run1.s2": "connectionClosed", "mute.run1.s1": "connectionClosed",
		"cancelled.run1.s1": "cancelled", "released.run1.s1": "released", "released.run1.s2": "completed",
	} {
		if r, ok := used[id]; !ok || r.OutcomeCode != code || r.Estimated {
			t.Errorf("%s is %+v, want outcome %s", id, r, code)
		}
	}
	r := used["done.run1.s1"]
	if r.Labels["other"] != "x" || r.AppID != "app" || r.Queue != "default" || r.AvatarID != "ok" || r.Attempt != 1 || r.WorkerID == "" || r.Region == "" || r.ConfirmedAt.IsZero() {
		t.Errorf("the record is not whole: %+v", r)
	}
	rows, err := cost.NewStore(f.js, f.names, []string{"customer"}).Sum(f.ctx, cost.Query{By: "label:customer"})
	if err != nil || len(rows) != 2 || rows[1].Key != "acme" || rows[1].Credits != 1 || rows[0].FailedCredits != 5 {
		t.Errorf("by customer: %+v, %v", rows, err)
	}
}

func TestAJobIsHeldAndNoMoneyIsLostWhileUsageRecordsCanNotBeWritten(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]func(*jetstream.StreamConfig){
		"all bytes used": func(c *jetstream.StreamConfig) { c.Discard, c.MaxBytes = jetstream.DiscardNew, 100 },
		"small messages": func(c *jetstream.StreamConfig) { c.MaxMsgSize = 100 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, nil)
			w := f.worker(worker{config: fourAtATime})
			f.publish("under-way", "slow-500", nil)
			f.state("under-way", func(r lifecycle.Record) bool { return r.ConnectionID != "" })
			restore := f.change(f.names.UsageStream(), refuse)
			f.until("not ready for the usage record", func() bool { return w.app.Ready() != nil })
			f.publish("later", "ok-later", fields{"output": fields{"discard": fields{}}})
			f.heldForStorage("later", "ok-later")
			f.notReadyFor(w, f.names.UsageStream())
			if body := f.alert(event.AlertStorage); body["what"] != "discard" {
				t.Errorf("alert: %v", body)
			}
			restore()
			for _, id := range []string{"under-way", "later"} {
				f.completed(id)
			}
			f.until("ready again", func() bool { return w.app.Ready() == nil })
			f.balanced()
			f.noDeadLetters()
			if n := len(f.sessions("slow-500")); n != 1 {
				t.Errorf("the job that was under way had %d sessions", n)
			}
		})
	}
}

func TestASessionLostWithItsWorkerIsInTheLedgerWithItsUpperBound(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	first := f.worker(worker{})
	first.stop() // the streams are there
	confirmed := time.Now().Add(-20 * time.Second)
	f.orphanOf("known", fields{"id": "known", "avatar_id": "ok-known", "audio": speech()}, func(r *lifecycle.Record) {
		r.ConnectionID, r.ConfirmedAt, r.StartedAt = "c-known", confirmed, confirmed.Add(-time.Second)
	})
	f.orphanOf("unknown", fields{"id": "unknown", "avatar_id": "ok-unknown", "audio": speech()}, func(r *lifecycle.Record) {
		r.StartedAt = confirmed
	})
	f.worker(worker{})
	f.outcome("known")
	f.outcome("unknown")
	used := f.used()
	for id, connection := range map[string]string{"known.run1.s1": "c-known", "unknown.run1.s1": ""} {
		r := used[id]
		if !r.Estimated || r.ConnectionID != connection || r.ConnectedMS < 20_000 || r.ConnectedMS > 60_000 || r.OutcomeCode != "workerLost" {
			t.Errorf("%s is %+v", id, r)
		}
	}
	compared, err := cost.NewStore(f.js, f.names, nil).Compare(f.ctx)
	if err != nil || len(compared.Differences) > 0 || compared.Totals.Sessions != 4 || compared.Totals.EstimatedCredits == 0 {
		t.Errorf("%+v, %v", compared, err)
	}
}

func TestABudgetEndsWhereItIsSpentAndRaisedItsJobsGoOn(t *testing.T) {
	t.Parallel()
	const jobs, budget = 200, 50
	f := newFleet(t, func(o *simulator.Options) { o.Speed, o.SessionLogLimit = 0, 2000 })
	limited := func(c *config.Config) {
		c.Budgets = []config.Budget{{Key: "label.customer", Credits: budget, Per: "month", Warn: 0.8}, {Key: "app_id", Credits: 10_000, Per: "day"}}
		c.Worker.Concurrency = 8
	}
	for range 3 {
		f.worker(worker{config: limited})
	}
	for i := range jobs {
		f.publish(fmt.Sprintf("b%d", i), "ok", fields{"labels": fields{"customer": "acme"}})
	}
	f.publish("other", "ok", fields{"labels": fields{"customer": "b"}})
	f.outcome("other") // another customer's is not held
	f.counted(lifecycle.StateHeld, jobs-budget)
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	if err := f.backend.WaitOpen(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if n := f.backend.Totals().Confirmed; n > budget+1 { // each is one credit, and one is the other's
		t.Errorf("%d sessions for a budget of %d credits", n, budget)
	}
	held := f.firstHeld()
	if held.HeldReason != lifecycle.HeldBudget || held.HeldText() == "" {
		t.Errorf("held for %q: %s", held.HeldReason, held.HeldText())
	}
	if n := len(f.all(f.names.EventsStream(), f.names.Alerts("budget", "warning"))); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
	f.setBudget("label.customer", "month", 1000)
	f.counted(lifecycle.StateCompleted, jobs+1)
	f.balancedWithin(time.Second, "customer")
}

// A worker may die between the session that spends a budget and the alert.
func TestAnAlertOfABudgetThatWasNotPublishedIsPublishedByTheNextWorkerOnce(t *testing.T) {
	t.Parallel()
	f := newFleet(t, func(o *simulator.Options) { o.Speed = 0 })
	limited := worker{config: func(c *config.Config) { c.Budgets = []config.Budget{{Key: "app_id", Credits: 1, Per: "month"}} }}
	w := f.worker(limited)
	f.publish("spends", "ok", nil)
	f.outcome("spends")
	spent := f.names.Alerts("budget", "spent")
	first := f.alert("budget")
	until, err := time.Parse(time.RFC3339, fmt.Sprint(first["until"]))
	if first["key"] != "app_id" || first["value"] != first["app_id"] || first["credits"] != 1.0 || first["spent"] == nil || first["per"] != "month" || err != nil || until.Day() != 1 {
		t.Errorf("%v", first)
	}
	w.stop()
	f.forgetAlerts(spent)
	for range 2 { // the second of them has nothing to say
		w = f.worker(limited)
		if again := f.alert("budget"); again["message"] != first["message"] {
			t.Errorf("%v, want %v", again, first)
		}
		f.publish("held", "ok", nil)
		f.event("held", "held")
		w.stop()
	}
	if n := len(f.all(f.names.EventsStream(), spent)); n != 1 {
		t.Errorf("%d alerts, want 1", n)
	}
}

// forgetAlerts has the stream of events be as if an alert had never been published.
func (f *fleet) forgetAlerts(subject string) {
	f.t.Helper()
	stream, err := f.js.Stream(f.ctx, f.names.EventsStream())
	if err != nil {
		f.t.Fatal(err)
	}
	c := stream.CachedInfo().Config
	c.Duplicates = 100 * time.Millisecond
	if _, err := f.js.UpdateStream(f.ctx, c); err != nil {
		f.t.Fatal(err)
	}
	natstest.ForgetIDs(f.t, f.js, f.names.EventsStream(), f.names.Alerts("probe", "probe"))
	if err := stream.Purge(f.ctx, jetstream.WithPurgeSubject(subject)); err != nil {
		f.t.Fatal(err)
	}
	fleet, err := f.js.KeyValue(f.ctx, f.names.FleetBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	keys, err := fleet.ListKeysFiltered(f.ctx, "alert.budget.>")
	if err != nil {
		f.t.Fatal(err)
	}
	n := 0
	for key := range keys.Keys() {
		n++
		if err := fleet.Purge(f.ctx, key); err != nil {
			f.t.Fatal(err)
		}
	}
	if n != 1 {
		f.t.Errorf("%d alerts of budgets are noted, want 1", n)
	}
}

func TestAHeldJobNamesTheBudgetThatHoldsItNow(t *testing.T) {
	t.Parallel()
	f := newFleet(t, func(o *simulator.Options) { o.Speed = 0 })
	f.worker(worker{config: func(c *config.Config) {
		c.Budgets = []config.Budget{{Key: "label.customer", Credits: 1, Per: "month"}, {Key: "app_id", Credits: 2, Per: "day"}}
	}})
	for i := range 4 {
		f.publish(fmt.Sprintf("b%d", i), "ok", fields{"labels": fields{"customer": "acme"}})
	}
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	heldFor := func(jobs int, key string) {
		t.Helper()
		f.records(ctx, func(records map[string]lifecycle.Record) bool {
			n := 0
			for _, r := range records {
				if r.State == lifecycle.StateHeld && strings.Contains(r.HeldText(), key) {
					n++
				}
			}
			return n == jobs
		}, fmt.Sprintf("%d jobs held for the budget of %s", jobs, key))
	}
	heldFor(3, "label.customer")
	f.setBudget("label.customer", "month", 1000)
	heldFor(2, "app_id")
}

// cancel asks the worker that runs the job to end it.
func (f *fleet) cancel(id string) {
	f.t.Helper()
	if reply := f.control(id, "cancel"); reply.Status != "requested" && reply.Status != "cancelled" {
		f.t.Fatalf("%+v", reply)
	}
}

// counted waits until so many jobs are in a state, as long as they become more.
func (f *fleet) counted(state lifecycle.State, want int) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	stuck := time.AfterFunc(patience, cancel)
	defer stuck.Stop()
	most := 0
	f.records(ctx, func(records map[string]lifecycle.Record) bool {
		n := 0
		for _, r := range records {
			if r.State == state {
				n++
			}
		}
		if n > most {
			most = n
			stuck.Reset(patience)
		}
		return n >= want
	}, fmt.Sprintf("%d jobs %s", want, state))
}

// records follows the records until they are as wanted.
func (f *fleet) records(ctx context.Context, wanted func(map[string]lifecycle.Record) bool, what string) map[string]lifecycle.Record {
	f.t.Helper()
	kv, err := f.js.KeyValue(ctx, f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	watch, err := kv.Watch(ctx, "*")
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() {
		_ = watch.Stop() // it may have ended by itself
		for range watch.Updates() {
		} // the library's goroutine waits until the last one is taken
	}()
	records := map[string]lifecycle.Record{}
	for !wanted(records) {
		select {
		case entry := <-watch.Updates():
			var r lifecycle.Record
			if entry != nil && json.Unmarshal(entry.Value(), &r) == nil {
				records[r.JobID] = r
			}
		case <-ctx.Done():
			states := map[lifecycle.State]int{}
			for _, r := range records {
				states[r.State]++
			}
			f.t.Fatalf("never: %s; they are %v", what, states)
		}
	}
	return records
}

func (f *fleet) firstHeld() lifecycle.Record {
	f.t.Helper()
	var held lifecycle.Record
	f.records(f.ctx, func(records map[string]lifecycle.Record) bool {
		for _, r := range records {
			if r.State == lifecycle.StateHeld {
				held = r
				return true
			}
		}
		return false
	}, "a job held")
	return held
}

func (f *fleet) setBudget(key, per string, credits int64) {
	f.t.Helper()
	kv, err := f.js.KeyValue(f.ctx, f.names.FleetBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	data, err := json.Marshal(budget.Setting{Credits: credits})
	if err == nil {
		_, err = kv.Put(f.ctx, budget.SettingKey(key, per), data)
	}
	if err != nil {
		f.t.Fatal(err)
	}
}
