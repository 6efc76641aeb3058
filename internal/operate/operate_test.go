package operate_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/operate"
	"avatarworker/internal/topology"
)

func TestOpenSaysWhatIsMissing(t *testing.T) {
	js := natstest.JetStream(t)
	if _, err := operate.Open(t.Context(), js.Conn(), js, topology.Names{}); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestPausesAreReplacedAndEnded(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	for _, err := range []error{
		second(o.Paused(t.Context(), "none")), second(o.Pause(t.Context(), "none", time.Hour)), second(o.Resume(t.Context(), "none")),
	} {
		if !errors.Is(err, operate.ErrNoQueue) {
			t.Errorf("got %v", err)
		}
	}
	if was, err := o.Resume(t.Context(), "default"); was || err != nil {
		t.Errorf("a queue that is not paused: %t, %v", was, err)
	}
	for _, length := range []time.Duration{time.Hour, 2 * time.Hour, operate.Forever, time.Minute} {
		until, err := o.Pause(t.Context(), "default", length)
		if err != nil {
			t.Fatal(err)
		}
		got, err := o.Paused(t.Context(), "default")
		if err != nil || !got.Equal(until) || time.Until(until)-length > time.Minute || length-time.Until(until) > time.Minute {
			t.Errorf("paused until %s, for %s; %s, %v", until, length, got, err)
		}
	}
	if was, err := o.Resume(t.Context(), "default"); !was || err != nil {
		t.Errorf("%t, %v", was, err)
	}
	if until, err := o.Paused(t.Context(), "default"); err != nil || !until.IsZero() {
		t.Errorf("paused until %s, %v", until, err)
	}
}

func second[T any](_ T, err error) error { return err }

// Each state of a job has its answer to a retry, and only one that waits is changed.
func TestRetryAnswersByState(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	f.submit("waits")
	later := time.Now().Add(time.Hour).UTC()
	failed := &event.Error{Code: errors.CodeServerError}
	f.put(lifecycle.Record{JobID: "runs", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateRunning})
	f.put(lifecycle.Record{JobID: "done", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted})
	f.put(lifecycle.Record{JobID: "dead", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered, LastError: failed})
	f.put(lifecycle.Record{JobID: "lost", Run: 1, StreamSeq: 99, Queue: "default", State: lifecycle.StateRetrying, NextAttemptAt: &later, LastError: failed})
	f.put(lifecycle.Record{JobID: "due", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateRetrying, NextAttemptAt: &later, LastError: failed})
	f.put(lifecycle.Record{JobID: "held", Run: 1, StreamSeq: 1, Queue: "default", AppID: "a1", State: lifecycle.StateHeld, NextAttemptAt: &later, HeldCode: errors.CodeCreditsExhausted})
	f.openCircuit("a1", "")
	for id, want := range map[string]string{
		"waits": operate.StatusWaiting, "runs": operate.StatusRunning, "done": operate.StatusFinished, "dead": operate.StatusFinished, "lost": operate.StatusLost,
		"held": operate.StatusHeld, "none": operate.StatusUnknown,
	} {
		before, _ := f.h.State.Get(t.Context(), id) // some have none
		r, err := o.Retry(t.Context(), id, false)
		if err != nil || r.Status != want || r.JobID != id || r.Message == "" && want != operate.StatusRunning {
			t.Errorf("%s: %+v, %v; want %s", id, r, err, want)
		}
		if after, _ := f.h.State.Get(t.Context(), id); before != nil && after.Revision() != before.Revision() {
			t.Errorf("%s: its record was changed", id)
		}
	}
	if r, err := o.Retry(t.Context(), "held", true); err != nil || r.Status != operate.StatusDelivered {
		t.Errorf("with a probe: %+v, %v", r, err)
	}
	// Its message was never delivered, so there is nothing to deliver again; what was
	// written stays.
	_, _ = o.Retry(t.Context(), "due", false)
	if r := f.state("due", lifecycle.StateRetrying); r.NextAttemptAt == nil || r.NextAttemptAt.After(time.Now().Add(time.Minute)) {
		t.Errorf("its next attempt is at %v", r.NextAttemptAt)
	}
}

func TestRetryLeavesAJobHeldWhileItsBudgetIsSpent(t *testing.T) {
	f := newFleet(t)
	f.submit("j1")
	f.put(lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 1, Queue: "default", AppID: "a1", Labels: map[string]string{"customer": "acme"}, State: lifecycle.StateHeld,
		HeldReason: lifecycle.HeldBudget, HeldWhy: "the budget is spent", HeldCode: errors.CodeCreditsExhausted,
	})
	batch, err := f.h.Consumers["default"].Fetch(1)
	if err != nil {
		t.Fatal(err)
	}
	for msg := range batch.Messages() {
		if err := msg.NakWithDelay(time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	spending := budget.Spending{Key: "label.customer", Value: "acme", Per: budget.Day, Credits: 10, Spent: 10, Until: time.Now().Add(time.Hour)}
	retry := func(credits int64, failed error) operate.Retried {
		t.Helper()
		spending.Credits = credits
		o := f.operator().WithBudgets(func(context.Context) ([]budget.Spending, error) { return []budget.Spending{spending}, failed }, usage.Tariff{Minimum: 1})
		r, err := o.Retry(t.Context(), "j1", false)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	before, err := f.h.State.Get(t.Context(), "j1")
	if err != nil {
		t.Fatal(err)
	}
	if r := retry(10, nil); r.Status != operate.StatusHeld || !strings.Contains(r.Message, `label.customer "acme" is spent`) {
		t.Errorf("spent: %+v", r)
	}
	if after, err := f.h.State.Get(t.Context(), "j1"); err != nil || after.Revision() != before.Revision() {
		t.Errorf("its record was changed: %v", err)
	}
	if r := retry(20, nil); r.Status != operate.StatusDelivered || r.Message != "" {
		t.Errorf("raised: %+v", r)
	}
	spending.Spent = 0
	if r := retry(20, errors.New("no ledger")); r.Status != operate.StatusDelivered || !strings.Contains(r.Message, "no ledger") {
		t.Errorf("not known: %+v", r)
	}
}

func (f *fleet) openCircuit(app, region string) {
	f.t.Helper()
	data, err := json.Marshal(circuit.Circuit{App: app, Region: region, State: circuit.Open, Code: errors.CodeCreditsExhausted, OpenedAt: time.Now(), RetryAt: time.Now().Add(time.Hour), Cooldown: time.Hour})
	if err != nil {
		f.t.Fatal(err)
	}
	key := circuit.Prefix + topology.Token(app) + "." + topology.Token(region)
	if _, err := f.h.Fleet.Put(f.t.Context(), key, data); err != nil {
		f.t.Fatal(err)
	}
}

func TestCancelOfAnUnknownJobIsNotNotedUnlessAskedFor(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	if r, err := o.Cancel(t.Context(), "none", false); err != nil || r.Status != operate.StatusUnknown || r.JobID != "none" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := f.h.State.Get(t.Context(), "none"); !errors.Is(err, jetstream.ErrKeyNotFound) {
		t.Errorf("it was noted: %v", err)
	}
	f.submit("waits")
	for id, ifUnknown := range map[string]bool{"waits": false, "later": true} {
		if r, err := o.Cancel(t.Context(), id, ifUnknown); err != nil || r.Status != control.StatusRequested {
			t.Errorf("%s: %+v, %v", id, r, err)
		}
	}
	f.submit("later")
	f.start("w-1", works)
	for _, id := range []string{"waits", "later"} {
		if r := f.outcome(id); r.Outcome != lifecycle.StateCancelled || r.Session != 0 {
			t.Errorf("%s: %s after %d sessions", id, r.Outcome, r.Session)
		}
	}
	if r, err := o.Cancel(t.Context(), "waits", false); err != nil || r.Status != control.StatusCancelled {
		t.Errorf("repeated: %+v, %v", r, err)
	}
}

// deadLetter makes a job a dead letter, and returns the sequence of that.
func (f *fleet) deadLetter(id string) uint64 {
	f.t.Helper()
	stop := f.start("w-"+id, func(context.Context, *jobs.Attempt) error {
		return errors.Newf(errors.CodeAvatarNotFound, errors.PhaseConnect, "scripted")
	})
	f.submit(id)
	f.oneOutcomeEach([]string{id})
	stop()
	info, err := f.h.DLQ.Info(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return info.State.LastSeq
}

func (f *fleet) replay(letter uint64) {
	f.t.Helper()
	if r, err := dlq.NewStore(f.js, f.names, nil).Replay(f.t.Context(), letter, dlq.ReplayOptions{}); err != nil || r.Status != dlq.StatusReplayed {
		f.t.Fatalf("%+v, %v", r, err)
	}
}

func (f *fleet) revision(id string) uint64 {
	f.t.Helper()
	entry, err := f.h.State.Get(f.t.Context(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	return entry.Revision()
}

func TestAReplayedJobThatWaitsIsCancelledAndOpensNoSession(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	letter := f.deadLetter("j")
	before := f.revision("j")
	if r, err := o.Cancel(t.Context(), "j", true); err != nil || r.Status != control.StatusFinished || f.revision("j") != before {
		t.Fatalf("before its replay: %+v, %v", r, err)
	}
	f.replay(letter)
	if r, err := o.Retry(t.Context(), "j", false); err != nil || r.Status != operate.StatusWaiting || !strings.Contains(r.Message, "run 2") {
		t.Errorf("retry: %+v, %v", r, err)
	}
	for range 2 {
		if r, err := o.Cancel(t.Context(), "j", false); err != nil || r.Status != control.StatusRequested {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if r := f.outcome("j"); r.Run != 1 || r.Outcome != lifecycle.StateDeadLettered || r.CancelThrough != 2 {
		t.Errorf("the record of the run before: %+v", r)
	}
	f.start("w-2", works)
	r := f.until("j", func(r lifecycle.Record) bool { return r.Run == 2 && r.State.Final() })
	if r.Outcome != lifecycle.StateCancelled || r.Session != 0 || r.AvatarID != "a" {
		t.Fatalf("%s after %d sessions: %+v", r.Outcome, r.Session, r)
	}
	f.eventOfRun("j", 2, "cancelled")
	if r, err := o.Cancel(t.Context(), "j", false); err != nil || r.Status != control.StatusCancelled {
		t.Errorf("at its end: %+v, %v", r, err)
	}
}

// eventOfRun waits for an event of that run of a job.
func (f *fleet) eventOfRun(id string, run int, kind string) {
	f.t.Helper()
	natstest.Eventually(f.t, kind, func() bool {
		msg, err := f.h.Events.GetLastMsgForSubject(f.t.Context(), f.names.EventsFilter(kind, id))
		return err == nil && strings.HasPrefix(msg.Header.Get("ce-id"), fmt.Sprintf("%s.run%d.", id, run))
	})
}

func TestAReplayedJobThatRunsIsCancelled(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	f.replay(f.deadLetter("j"))
	begun := make(chan struct{})
	f.start("w-2", func(ctx context.Context, _ *jobs.Attempt) error {
		close(begun)
		<-ctx.Done()
		return errors.Wrap(errors.CodeConnectionClosed, errors.PhaseRuntime, context.Cause(ctx), "ended")
	})
	<-begun
	if r, err := o.Cancel(t.Context(), "j", false); err != nil || r.Status != control.StatusCancelled {
		t.Errorf("%+v, %v", r, err)
	}
	f.eventOfRun("j", 2, "cancelled")
}

// What is cancelled ends with the run that was the last one then.
func TestALaterReplayOfACancelledJobRuns(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	f.replay(f.deadLetter("j"))
	if r, err := o.Cancel(t.Context(), "j", false); err != nil || r.Status != control.StatusRequested {
		t.Fatalf("%+v, %v", r, err)
	}
	msg := &nats.Msg{Subject: f.names.Jobs("default"), Header: nats.Header{"Avatar-Job-Id": {"j"}, "Avatar-Run": {"3"}}, Data: []byte(jobBody)}
	if _, err := f.js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
	f.start("w-2", works)
	if r := f.until("j", func(r lifecycle.Record) bool { return r.Run == 3 && r.State.Final() }); r.Outcome != lifecycle.StateCompleted {
		t.Errorf("%s", r.Outcome)
	}
}

func TestDrainOfAWorkerThatIsNotThere(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	if _, err := o.Drain(t.Context(), "none"); !errors.Is(err, operate.ErrNoWorker) || !strings.HasSuffix(err.Error(), "'avatarworker status' lists the workers") {
		t.Errorf("got %v", err)
	}
	if err := o.Empty(t.Context(), "none"); err != nil {
		t.Errorf("one without a lease has ended: %v", err)
	}
	if _, err := f.h.State.Put(t.Context(), "lease.w-9", []byte(`{}`)); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := o.Empty(short, "w-9"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("its lease is valid: %v", err)
	}
	if err := f.h.State.Delete(t.Context(), "lease.w-9"); err != nil {
		t.Fatal(err)
	}
	if err := o.Empty(t.Context(), "w-9"); err != nil {
		t.Error(err)
	}
}

func TestAProbeWakesTheJobThatIsHeldLongest(t *testing.T) {
	f := newFleet(t)
	o := f.operator()
	f.openCircuit("a1", "us-west")
	f.openCircuit("a1", "eu")
	open, err := o.OpenCircuits(t.Context(), "a1", nil)
	if err != nil || len(open) != 2 {
		t.Fatalf("%+v, %v", open, err)
	}
	region := "eu"
	if open, err = o.OpenCircuits(t.Context(), "a1", &region); err != nil || len(open) != 1 {
		t.Fatalf("%+v, %v", open, err)
	}
	if _, err := o.CloseCircuit(t.Context(), "a1", "eu"); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{second(o.CloseCircuit(t.Context(), "a1", "eu")), probeError(o, t, open[0])} {
		if !errors.Is(err, circuit.ErrNone) {
			t.Errorf("a closed circuit: %v", err)
		}
	}
	if after, id, err := o.ProbeCircuit(t.Context(), circuit.Circuit{App: "a1", Region: "us-west", Code: errors.CodeCreditsExhausted}); err != nil || id != "" || after.RetryAt.After(time.Now().Add(time.Minute)) {
		t.Errorf("without a job: %+v, %q, %v", after, id, err)
	}
	f.submit("j")
	batch, err := f.h.Consumers["default"].Fetch(1)
	if err != nil {
		t.Fatal(err)
	}
	for range batch.Messages() { // a worker has it
	}
	later := time.Now().Add(time.Hour).UTC()
	for id, age := range map[string]time.Duration{"new": time.Minute, "old": time.Hour, "other-region": 2 * time.Hour} {
		r := lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: 1, Queue: "default", AppID: "a1", Region: "us-west", State: lifecycle.StateHeld, NextAttemptAt: &later,
			HeldCode: errors.CodeCreditsExhausted, PublishedAt: time.Now().Add(-age).UTC(),
		}
		if id == "other-region" {
			r.Region = "eu"
		}
		f.put(r)
	}
	if _, id, err := o.ProbeCircuit(t.Context(), circuit.Circuit{App: "a1", Region: "us-west", Code: errors.CodeCreditsExhausted}); err != nil || id != "old" {
		t.Errorf("woke %q, %v", id, err)
	}
}

func probeError(o *operate.Operator, t *testing.T, c circuit.Circuit) error {
	t.Helper()
	_, _, err := o.ProbeCircuit(t.Context(), c)
	return err
}

// A worker may get the job before it learns that the circuit takes a probe, and then
// holds it once more.
func TestAProbedJobIsDeliveredUntilAWorkerTakesIt(t *testing.T) {
	f := newFleet(t)
	f.openCircuit("a1", "")
	f.submit("j")
	deliver := func() jetstream.Msg {
		batch, err := f.h.Consumers["default"].Fetch(1, jetstream.FetchMaxWait(natstest.Patience))
		if err != nil {
			t.Error(err)
			return nil
		}
		return <-batch.Messages()
	}
	hold := func() bool {
		msg := deliver()
		return msg != nil && msg.NakWithDelay(time.Hour) == nil
	}
	if !hold() {
		t.Fatal("the job was not delivered")
	}
	later := time.Now().Add(time.Hour).UTC()
	f.put(lifecycle.Record{JobID: "j", Run: 1, StreamSeq: 1, Queue: "default", AppID: "a1", State: lifecycle.StateHeld, NextAttemptAt: &later, HeldCode: errors.CodeCreditsExhausted})
	again := make(chan bool, 1)
	go func() { again <- hold() && deliver() != nil }()
	if r, err := f.operator().Retry(t.Context(), "j", true); err != nil || r.Status != operate.StatusDelivered {
		t.Errorf("%+v, %v", r, err)
	}
	if !<-again {
		t.Error("the job was delivered once only")
	}
}
