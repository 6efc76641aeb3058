package jobs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/ledger"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
)

// link forwards TCP to NATS and can be cut without telling either side.
type link struct {
	stalled  sync.RWMutex // held while nothing is read
	listener net.Listener
	wg       sync.WaitGroup
	mu       sync.Mutex
	silent   bool
	conns    []net.Conn
}

func newLink(t *testing.T, url string) *link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &link{listener: l}
	target := strings.TrimPrefix(url, "nats://")
	k.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", target)
			if err != nil {
				_ = c.Close() // nobody is there
				continue
			}
			k.mu.Lock()
			k.conns = append(k.conns, c, to)
			k.mu.Unlock()
			k.wg.Go(func() { k.pipe(to, c) })
			k.wg.Go(func() { k.pipe(c, to) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close() // nothing depends on it any more
		k.drop()
		k.wg.Wait()
	})
	return k
}

func (k *link) url() string { return "nats://" + k.listener.Addr().String() }

// pipe copies one way; while the link is silent what comes is lost.
func (k *link) pipe(to, from net.Conn) {
	defer func() { _, _ = to.Close(), from.Close() }() // both ends, in any order
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		k.stalled.RLock() // waits while it is stalled
		k.mu.Lock()
		silent := k.silent
		k.mu.Unlock()
		k.stalled.RUnlock()
		if n > 0 && !silent {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// silence swallows everything from now on, both ways.
func (k *link) silence(on bool) {
	k.mu.Lock()
	k.silent = on
	k.mu.Unlock()
	if !on {
		k.drop() // what was lost would leave half a message
	}
}

func (k *link) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.conns {
		_ = c.Close() // the point is to break it
	}
	k.conns = nil
}

func TestLostLeaseEndsTheSessionInTimeAndSettlesNothing(t *testing.T) {
	h := newEnv(t)
	window := natstest.Unhurried(3 * time.Second)
	k := newLink(t, h.url)
	var lost time.Time
	began, ended := make(chan struct{}, 4), make(chan time.Time, 4)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- struct{}{}
		err := untilDone(ctx)
		if a.Session == 1 && !errors.Is(err, lease.ErrLost) {
			t.Errorf("ended by %v", err)
		}
		ended <- time.Now()
		return err
	}), h.leaseOf(window), func(o *options) { o.url, o.Drain = k.url(), time.Millisecond })
	h.submit("default", job("j1"))
	receive(t, began, "session")
	lost = time.Now()
	k.silence(true)
	if took := receive(t, ended, "end").Sub(lost); took > window {
		t.Errorf("the session ended %s after the last answer, later than its lease", took)
	}
	before := h.record("j1")
	if before.State != lifecycle.StateRunning || before.Attempt != 1 || before.Crashes != 0 {
		t.Errorf("the record was settled: %+v", before)
	}
	// The cut-off worker comes back and goes on with the job: no crash.
	go func() {
		receive(t, began, "next session")
		w.stop()
	}()
	k.silence(false)
	r := h.until("j1", func(r *lifecycle.Record) bool { return r.Session == 2 })
	if r.Crashes != 0 || r.Attempt != 1 {
		t.Errorf("a cut counted: %d crashes, attempt %d", r.Crashes, r.Attempt)
	}
}

func TestAJobStartsAgainOnlyOnceItsRecordHasWhatItsLastSessionUsed(t *testing.T) {
	h := newEnv(t)
	k := newLink(t, h.url)
	began, ended := make(chan int, 4), make(chan struct{}, 4)
	w := h.start(&script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		connect(a)
		began <- a.Session
		defer func() { ended <- struct{}{} }()
		return jobs.Report{Connected: time.Second}, untilDone(ctx)
	}}, h.leaseOf(natstest.Unhurried(3*time.Second)), func(o *options) {
		o.url, o.Drain = k.url(), time.Millisecond
	}, h.ledger)
	h.submit("default", job("j1"))
	receive(t, began, "session")
	h.until("j1", func(r *lifecycle.Record) bool { return !r.ConfirmedAt.IsZero() })
	k.silence(true)
	receive(t, ended, "end")
	// A take-over fits into the bucket, and what the session used does not.
	entry, err := h.handles.State.Get(t.Context(), "j1")
	if err != nil {
		t.Fatal(err)
	}
	h.largest(int32(len(entry.Value())) + 8)
	before := h.delivered()
	k.silence(false)
	h.eventually("delivered twice more, or begun", func() bool { return h.delivered() >= before+2 || len(began) > 0 })
	select {
	case s := <-began:
		t.Errorf("session %d began, and what the one before it used would die with this worker", s)
	default:
	}
	h.largest(-1)
	if s := receive(t, began, "next session"); s != 2 {
		t.Errorf("session %d", s)
	}
	w.end()
	if r := h.state("j1", lifecycle.StateReleased); r.Crashes != 0 || r.Unsettled != 2 {
		t.Errorf("%d crashes, %d sessions without a result", r.Crashes, r.Unsettled)
	}
	used := h.used()
	for _, id := range []string{"j1.run1.s1", "j1.run1.s2"} {
		if u, ok := used[id]; !ok || u.Estimated || u.ConnectedMS != 1000 {
			t.Errorf("%s: in the ledger: %t: %+v", id, ok, u)
		}
	}
}

func TestAReleaseThatFindsAnOlderRecordEnds(t *testing.T) {
	h := newEnv(t)
	k := newLink(t, h.url)
	began, ended := make(chan int, 4), make(chan struct{}, 4)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- a.Session
		defer func() { ended <- struct{}{} }()
		return untilDone(ctx)
	}), h.leaseOf(natstest.Unhurried(3*time.Second)), func(o *options) { o.url, o.Drain = k.url(), time.Millisecond })
	h.submit("default", job("j1"))
	receive(t, began, "session")
	h.until("j1", func(r *lifecycle.Record) bool { return !r.ConfirmedAt.IsZero() })
	k.silence(true)
	receive(t, ended, "end")
	// The record's node comes back without what was written last.
	r := h.record("j1")
	h.forgetful(time.Hour)
	h.put(r)
	k.silence(false)
	if s := receive(t, began, "next session"); s != 2 {
		t.Errorf("session %d", s)
	}
	w.end()
}

func TestAWorkerStopsInTimeThoughItsLedgerTakesNothing(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 2), make(chan struct{})
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-leave
		_, err := speakAll(ctx, a)
		return err
	}), h.ledger)
	h.submit("default", job("j1", spoken(2)))
	receive(t, began, "session")
	if err := h.js.DeleteStream(t.Context(), h.names.UsageStream()); err != nil {
		t.Fatal(err)
	}
	h.leaseOfWorker("another", time.Minute) // it lives, and has the job
	r := h.record("j1")
	r.Session, r.WorkerID = 2, "another"
	h.put(r)
	close(leave)
	h.eventually("released", func() bool { return len(h.events("avatar.events.released.j1")) == 1 })
	w.end()
}

func TestWhatTheRunBeforeUsedIsInTheLedgerBeforeTheNextBegins(t *testing.T) {
	h := newEnv(t)
	at := time.Now().UTC()
	h.put(&lifecycle.Record{ // its worker died before it had done what follows
		JobID: "j1", Run: 1, StreamSeq: 999, Session: 1, Attempt: 1, MaxAttempts: 5, WorkerID: "gone", AppID: "app1", Queue: "default",
		State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted, CreatedAt: at, UpdatedAt: at, ConfirmedAt: at, ConnectionID: "c",
		Usage: []usage.Session{{Session: 1, Connected: time.Second, OutcomeCode: usage.CodeCompleted}},
	})
	h.start(&script{}, h.ledger)
	h.submit("default", job("j1"), "Avatar-Run", "2")
	h.until("j1", func(r *lifecycle.Record) bool { return r.Run == 2 && r.Outcome == lifecycle.StateCompleted })
	h.settled()
	if u, ok := h.used()["j1.run1.s1"]; !ok || u.ConnectedMS != 1000 || u.ConnectionID != "c" {
		t.Errorf("in the ledger: %t: %+v", ok, u)
	}
}

// ledger gives a worker the ledger.
func (h *env) ledger(o *options) {
	o.Ledger = func(now func() time.Time) ledger.Ledger {
		return usage.NewLedger(usage.Options{JS: h.js, Names: h.names, Now: now, Window: time.Minute})
	}
}

// used returns the usage records by their ids.
func (h *env) used() map[string]usage.Record {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	records := make(map[string]usage.Record)
	err := usage.Scan(ctx, h.js, h.names.UsageStream(), h.names.AllUsage(), time.Time{}, func(msg jetstream.Msg) error {
		var r usage.Record
		err := json.Unmarshal(msg.Data(), &r)
		records[msg.Headers().Get(jetstream.MsgIDHeader)] = r
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return records
}

// slowStore holds each look at the storage up until it is let go on.
type slowStore struct {
	looked  chan struct{}
	proceed chan struct{}
}

func (s slowStore) Reserve(ctx context.Context, _ *jobspec.Job, _ int) error {
	s.looked <- struct{}{}
	select {
	case <-s.proceed:
	case <-ctx.Done():
	}
	return nil
}
func (slowStore) Started(*jobspec.Job)      {}
func (slowStore) Ended(*jobspec.Job, error) {}
func (slowStore) Err() error                { return nil }

func TestNoJobIsTakenOverUnderALeaseThatIsLost(t *testing.T) {
	h := newEnv(t)
	consumer := h.handles.Consumers["default"].CachedInfo().Config
	consumer.AckWait = time.Minute // the message stays with the worker
	if _, err := h.handles.Jobs.UpdateConsumer(t.Context(), consumer); err != nil {
		t.Fatal(err)
	}
	k, renewed := newLink(t, h.url), newRenewals()
	store := slowStore{looked: make(chan struct{}, 9), proceed: make(chan struct{})}
	s := &script{}
	h.start(s, func(o *options) { o.url, o.Observer, o.Storage = k.url(), renewed, store })
	h.submit("default", job("j1"))
	receive(t, store.looked, "look at the storage")
	k.silence(true)
	for receive(t, renewed.done, "renewal") {
	}
	k.silence(false)
	for !receive(t, renewed.done, "renewal of the next lease") {
	}
	close(store.proceed)
	if r := h.outcome("j1", lifecycle.StateCompleted); r.Session != 1 || !strings.HasSuffix(r.WorkerID, "-2") {
		t.Errorf("%d sessions, the last by %s: the job was taken over under the lease that was lost", r.Session, r.WorkerID)
	}
	h.settled()
}

func TestWorkerThatVanishedCostsACrashAndNoAttempt(t *testing.T) {
	h := newEnv(t)
	began := make(chan struct{}, 2)
	dead := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		return untilDone(ctx)
	}))
	h.submit("default", job("j1"))
	receive(t, began, "session")
	if err := dead.nc.Flush(); err != nil { // the started event is on its way
		t.Fatal(err)
	}
	dead.kill()
	h.start(&script{})
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	// Progress gave the crash back to the budget; the outcome has all of them.
	if r.Crashes != 1 || r.CrashesPast != 1 || r.Session != 2 || r.Attempt != 1 {
		t.Errorf("%d crashes, session %d, attempt %d", r.Crashes, r.Session, r.Attempt)
	}
	said := []any{}
	for _, started := range h.events(h.names.Events(event.TypeStarted, "j1")) {
		said = append(said, started.body["crashes"])
	}
	if fmt.Sprint(said) != "[<nil> 1]" {
		t.Errorf("the started events say %v crashes", said)
	}
	h.wantTypes("j1", "started", "started", "completed")
}

// abandoned is a job that some worker is said to run.
func (h *env) abandoned(id string, change func(*lifecycle.Record), more ...string) {
	r := &lifecycle.Record{
		JobID: id, Run: 1, Session: 1, State: lifecycle.StateRunning, Queue: "default", AppID: "app1", AvatarID: "a",
		Attempt: 1, MaxAttempts: 5, WorkerID: "vanished", UpdatedAt: time.Now().UTC(),
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	info, err := h.handles.Jobs.Info(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	// Before the job: a worker of the test may take it at once.
	r.StreamSeq = info.State.LastSeq + 1
	change(r)
	h.put(r)
	if seq := h.submit("default", job(id, more...)); seq != r.StreamSeq {
		h.t.Fatalf("job %s has sequence %d, not %d", id, seq, r.StreamSeq)
	}
}

// leaseOfWorker writes a lease as a worker with that id has it.
func (h *env) leaseOfWorker(id string, life time.Duration) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := h.handles.State.Create(ctx, lease.Prefix+id, []byte("{}"), jetstream.KeyTTL(life)); err != nil {
		h.t.Fatal(err)
	}
}

func TestTakeOversCountACrashOnlyOnceTheLeaseIsGone(t *testing.T) {
	h := newEnv(t)
	const life = 5 * time.Second
	h.leaseOfWorker("alive", life)
	since := time.Now()
	for _, id := range []string{"alive", "vanished"} {
		h.abandoned("j-"+id, func(r *lifecycle.Record) { r.WorkerID = id })
	}
	h.abandoned("j-released", func(r *lifecycle.Record) { r.WorkerID, r.State = "alive", lifecycle.StateReleased })
	began := make(chan string, 10)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- fmt.Sprintf("%s %d", a.Job.ID, h.record(a.Job.ID).Crashes)
		return failure(errors.CodeAvatarNotFound, errors.PhaseHandshake)
	}))
	got := map[string]bool{receive(t, began, "first"): true, receive(t, began, "second"): true}
	if !got["j-released 0"] || !got["j-vanished 1"] {
		t.Errorf("sessions and their crashes: %v after %s", got, time.Since(since))
	}
	if last := receive(t, began, "the one of the worker whose lease was valid"); last != "j-alive 1" || time.Since(since) < life {
		t.Errorf("%s after %s, with a lease of %s", last, time.Since(since), life)
	}
}

func TestJobThatKillsItsWorkersBecomesWorkerLost(t *testing.T) {
	h := newEnv(t)
	h.abandoned("j1", func(r *lifecycle.Record) { r.Crashes = 4 })
	runner := &script{}
	h.start(runner)
	r := h.outcome("j1", lifecycle.StateDeadLettered)
	h.settled()
	if r.Crashes != 5 || r.LastError.Code != errors.CodeWorkerLost || r.Reason != lifecycle.ReasonWorkerLost || len(runner.ran()) != 0 {
		t.Errorf("%d crashes, %s, %s", r.Crashes, r.LastError.Code, r.Reason)
	}
}

func TestSupersededSessionDropsItsResult(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 2), make(chan struct{})
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-leave
		_, err := speakAll(ctx, a)
		return err
	}))
	h.submit("default", job("j1", spoken(2)))
	receive(t, began, "session")
	h.leaseOfWorker("another", time.Minute) // it lives: the job is not taken over again
	r := h.record("j1")
	r.Session, r.WorkerID = 2, "another"
	h.put(r)
	close(leave)
	h.eventually("released", func() bool { return len(h.events("avatar.events.released.j1")) == 1 })
	if e := h.events("avatar.events.released.j1")[0]; e.body["reason"] != "superseded" || e.body["session"] != 1.0 {
		t.Errorf("%v", e.body)
	}
	if len(h.events("avatar.events.completed.j1")) != 0 || h.record("j1").Checkpoint != 0 {
		t.Error("its result was kept")
	}
}

func TestDrainLetsSessionsFinish(t *testing.T) {
	h := newEnv(t)
	began, leave := make(chan struct{}, 2), make(chan struct{})
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		began <- struct{}{}
		<-leave
		_, err := speakAll(ctx, a)
		return err
	}))
	h.submit("default", job("j1"))
	receive(t, began, "session")
	w.stop()
	h.eventually("draining", func() bool { return w.Ready() != nil })
	h.submit("default", job("later"))
	close(leave)
	w.end()
	if w.runErr != nil || h.record("j1").Outcome != lifecycle.StateCompleted || h.record("later") != nil {
		t.Errorf("run: %v; %+v; %+v", w.runErr, h.record("j1"), h.record("later"))
	}
}

func TestAWorkerEndsSoonAfterItsDrainTimeThoughNATSIsGone(t *testing.T) {
	h := newEnv(t)
	began := make(chan struct{}, 2)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		began <- struct{}{}
		return untilDone(ctx)
	}), noDrain, func(o *options) { o.SettleTimeout = time.Hour })
	for i := range cap(began) {
		h.submit("default", job(fmt.Sprint("j", i)))
		receive(t, began, "session")
	}
	if err := h.server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	w.stop()
	receive(t, w.done, "end of the worker")
}

func TestDrainPastItsTimeHandsBackWithoutCost(t *testing.T) {
	h := newEnv(t)
	began := make(chan struct{}, 2)
	w := h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		if err := speak(ctx, a, 1); err != nil {
			return err
		}
		began <- struct{}{}
		return untilDone(ctx)
	}), func(o *options) { o.Drain = 50 * time.Millisecond })
	h.submit("default", job("j1", spoken(3)))
	receive(t, began, "session")
	w.end()
	r := h.record("j1")
	if w.runErr != nil || r.State != lifecycle.StateReleased || r.Attempt != 1 || r.Checkpoint != 1 {
		t.Fatalf("run: %v; %+v", w.runErr, r)
	}
	from := make(chan int, 1)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		from <- a.Checkpoint
		_, err := speakAll(ctx, a)
		return err
	}))
	r = h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	h.wantTypes("j1", "started", "released", "started", "completed")
	if r.Attempt != 1 || r.Crashes != 0 || receive(t, from, "checkpoint") != 1 || r.Checkpoint != 3 {
		t.Errorf("%+v", r)
	}
}

func TestWhatALaterSessionDoesIsTheJobsChoice(t *testing.T) {
	h := newEnv(t)
	half := func(r *lifecycle.Record) { r.Checkpoint, r.Speaking = 1, 2 }
	h.abandoned("resume", half, spoken(2))
	h.abandoned("restart", half, spoken(2), `"on_redelivery":"restart"`)
	h.abandoned("give_up", half, spoken(2), `"on_redelivery":"give_up"`)
	var mu sync.Mutex
	from := map[string]int{}
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		mu.Lock()
		from[a.Job.ID] = a.Checkpoint
		mu.Unlock()
		_, err := speakAll(ctx, a)
		return err
	}))
	h.outcome("resume", lifecycle.StateCompleted)
	h.outcome("restart", lifecycle.StateCompleted)
	r := h.outcome("give_up", lifecycle.StateDeadLettered)
	h.settled()
	mu.Lock()
	defer mu.Unlock()
	if from["resume"] != 1 || from["restart"] != 0 || len(from) != 2 || r.Reason != lifecycle.ReasonPermanent {
		t.Errorf("began after %v; %+v", from, r.LastError)
	}
}

func TestProgressGivesTheBudgetBack(t *testing.T) {
	h := newEnv(t)
	h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		connect(a)
		if a.Number%2 == 0 { // every second attempt speaks one more
			if err := speak(ctx, a, a.Checkpoint+1); err != nil {
				return err
			}
			if a.Checkpoint+1 == 3 {
				return nil
			}
		}
		return failure(errors.CodeConnectionClosed, errors.PhaseRuntime)
	}))
	h.submit("default", job("j1", spoken(3), `"max_attempts":2`))
	r := h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	if r.Attempt != 6 || r.UtterancesDone != 3 {
		t.Errorf("%d attempts, %d utterances", r.Attempt, r.UtterancesDone)
	}
	limits := []float64{2, 4, 4, 6, 6}
	for i, e := range h.events("avatar.errors.>") {
		if e.body["attempt"].(float64) > e.body["max_attempts"].(float64) || e.body["max_attempts"] != limits[i] {
			t.Errorf("attempt %v of %v, want of %v", e.body["attempt"], e.body["max_attempts"], limits[i])
		}
	}
}

func TestDeletedConsumerIsRestored(t *testing.T) {
	h := newEnv(t)
	w := h.start(&script{})
	h.submit("default", job("j1"))
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := h.handles.Jobs.DeleteConsumer(ctx, "default"); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j2"))
	h.outcome("j2", lifecycle.StateCompleted)
	h.settled()
	h.eventually("ready again", func() bool { return w.Ready() == nil })
}

func TestTraceContextIsCarriedOn(t *testing.T) {
	h := newEnv(t)
	h.start(&script{})
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	h.submit("default", job("j1"), "traceparent", parent, "tracestate", "k=v")
	h.outcome("j1", lifecycle.StateCompleted)
	h.settled()
	for _, e := range h.events("avatar.events.*.j1") {
		if got := e.header["traceparent"]; len(got) != 1 || !strings.HasPrefix(got[0], "00-4bf92f3577b34da6a3ce929d0e0e4736-") {
			t.Errorf("%s carries %v", e.subject, got)
		}
	}
}
