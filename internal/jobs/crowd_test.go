package jobs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// size is short for the normal run, and long where the whole case is wanted.
func size(short, long int) int {
	if os.Getenv("AVATAR_LONG") != "" {
		return long
	}
	return short
}

// lineOf is a way to NATS on which bytes come late by d each way.
func (h *env) lineOf(d time.Duration) (url string) {
	h.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", strings.TrimPrefix(h.url, "nats://"))
			if err != nil {
				_ = client.Close()
				continue
			}
			go late(server, client, d)
			go late(client, server, d)
		}
	}()
	return "nats://" + l.Addr().String()
}

// late copies until one side closes.
func late(to, from net.Conn, d time.Duration) {
	type piece struct {
		data []byte
		due  time.Time
	}
	pieces := make(chan piece, 4096)
	go func() {
		defer to.Close()
		for p := range pieces {
			<-time.After(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil {
				_ = from.Close()
			}
		}
	}()
	defer close(pieces)
	for {
		data := make([]byte, 32<<10)
		n, err := from.Read(data)
		if n > 0 {
			pieces <- piece{data[:n], time.Now().Add(d)}
		}
		if err != nil {
			return
		}
	}
}

// publishAll publishes messages without waiting for each.
func (h *env) publishAll(n int, msg func(i int) *nats.Msg) {
	h.t.Helper()
	for i := range n {
		if _, err := h.js.PublishMsgAsync(msg(i)); err != nil {
			h.t.Fatal(err)
		}
	}
	select {
	case <-h.js.PublishAsyncComplete():
	case <-time.After(natstest.Patience):
		h.t.Fatal("not everything was published")
	}
}

// undelivered is how many jobs of the queue were never delivered.
func (h *env) undelivered() uint64 {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := h.handles.Jobs.Consumer(ctx, "default")
	if err != nil {
		h.t.Fatal(err)
	}
	return c.CachedInfo().NumPending
}

// unpaid refuses the sessions of app-bad.
func unpaid() *script {
	return runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
		if a.AppID == "app-bad" {
			return failure(errors.CodeCreditsExhausted, errors.PhaseToken)
		}
		_, err := speakAll(ctx, a)
		return err
	})
}

// All held jobs come again at once, the smallest plan serves them, and NATS is far.
func TestJobsHeldForLongKeepNoOtherAppWaiting(t *testing.T) {
	h := newEnv(t)
	n := size(1000, 8000)
	now := time.Now().UTC()
	past, since := now.Add(-time.Second), now.Add(-time.Hour)
	h.publishAll(n, func(i int) *nats.Msg {
		return &nats.Msg{Subject: h.names.Jobs("default"), Data: []byte(job(fmt.Sprintf("b%d", i), `"app_id":"app-bad"`))}
	})
	h.publishAll(n, func(i int) *nats.Msg {
		id := fmt.Sprintf("b%d", i)
		data, err := json.Marshal(&lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: uint64(i + 1), State: lifecycle.StateHeld, HeldReason: lifecycle.HeldCircuit, HeldCode: errors.CodeCreditsExhausted,
			Queue: "default", AppID: "app-bad", AvatarID: "a", Region: "us-west", Attempt: 1, MaxAttempts: 5,
			CreatedAt: past, UpdatedAt: past, NextAttemptAt: &past, HeldSince: &since, Holds: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		return &nats.Msg{Subject: "$KV." + h.names.StateBucket() + "." + id, Data: data}
	})
	open, err := json.Marshal(circuit.Circuit{
		App: "app-bad", Region: "us-west", State: circuit.Open, Code: errors.CodeCreditsExhausted,
		Cooldown: 5 * time.Minute, OpenedAt: since, RetryAt: now.Add(5 * time.Minute),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.handles.Fleet.Put(t.Context(), "circuit.app-bad.us-west", open); err != nil {
		t.Fatal(err)
	}
	runner := unpaid()
	h.start(runner, func(o *options) {
		o.url = h.lineOf(5 * time.Millisecond)
		o.AckWait, o.Concurrency, o.MaxHold = 30*time.Second, 2, 24*time.Hour
		o.Circuit = circuit.Config{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 5 * time.Minute}
	})
	h.eventually("the worker looks at held jobs", func() bool { return h.delivered() > 20 })
	for i := range 3 {
		id := fmt.Sprintf("good%d", i)
		h.submit("default", job(id, `"app_id":"app-good"`))
		natstest.EventuallyWithin(h.t, 2*time.Minute, fmt.Sprintf("job %d of another app is done, behind %d held ones", i, n), func() bool {
			r := h.record(id)
			return r != nil && r.State.Final()
		})
	}
	if got := len(runner.ran()); got != 3 {
		t.Errorf("%d sessions, want those of the other app", got)
	}
}

func TestUnpaidJobsInTheQueueKeepNoOtherAppWaiting(t *testing.T) {
	h := newEnv(t)
	n := size(2000, 100_000)
	h.publishAll(n, func(i int) *nats.Msg {
		return &nats.Msg{Subject: h.names.Jobs("default"), Data: []byte(job(fmt.Sprintf("b%d", i), `"app_id":"app-bad"`))}
	})
	h.start(unpaid(), func(o *options) {
		o.AckWait = 30 * time.Second
		o.Circuit = circuit.Config{Failures: 5, Cooldown: 10 * time.Second, MaxCooldown: 5 * time.Minute}
	})
	// Until all are held a new job waits for its turn, like any other.
	natstest.EventuallyWithin(h.t, time.Duration(size(60, 600))*time.Second, "every job was looked at once", func() bool { return h.undelivered() == 0 })
	for i := range size(3, 30) {
		from, id := time.Now(), fmt.Sprintf("good%d", i)
		h.submit("default", job(id, `"app_id":"app-good"`))
		h.finalWithin(id, time.Minute)
		if took := time.Since(from); took > natstest.Unhurried(10*time.Second) {
			t.Errorf("job %d of another app waited %s behind %d held ones", i, took, n)
		}
	}
}

// warnings starts a worker's log that has warnings and errors only.
func warnings(l *logged) func(*options) {
	return func(o *options) { o.Logger = zerolog.New(l).Level(zerolog.WarnLevel) }
}

func TestThousandsOfJobsWaitForASessionLimitInSilence(t *testing.T) {
	h := newEnv(t)
	n := size(3000, 10_000)
	log := &logged{}
	sessions := newOpenEnded()
	for range 3 {
		h.start(sessions, maxSessions(4), shortDrain, warnings(log), func(o *options) { o.AckWait, o.Concurrency = 20*time.Second, 40 })
	}
	h.fill("default", n)
	for range 4 {
		receive(t, sessions.began, "session")
	}
	h.eventually("every job was looked at once", func() bool { return h.undelivered() == 0 })
	for range 3 {
		id := sessions.oneOpen()
		close(sessions.ending(id))
		h.outcome(id, lifecycle.StateCompleted)
		receive(t, sessions.began, "next session")
	}
	if most := sessions.peak(); most > 4 {
		t.Errorf("%d sessions at once, the limit is 4", most)
	}
	if log.count("\n") != 0 {
		t.Errorf("the log has %d lines:\n%s", log.count("\n"), log)
	}
}

func TestStartWithHundredsOfLimitedAppsTakesFewRequests(t *testing.T) {
	h := newEnv(t)
	limits := map[string]int{}
	for i := range 300 {
		limits[fmt.Sprintf("app-%d", i)] = 40
	}
	for range 2 { // the first start makes something, or the second finds it
		w := h.start(&script{}, func(o *options) { o.MaxSessions = limits })
		h.submit("default", job("", `"app_id":"app-7"`))
		h.settled()
		if n := w.nc.Stats().OutMsgs; n > 300 {
			t.Errorf("%d requests until the first job was done", n)
		}
		w.end()
	}
}

func TestIdleQueuesCostFewRequests(t *testing.T) {
	queues := make([]string, 300)
	for i := range queues {
		queues[i] = fmt.Sprintf("q%d", i)
	}
	h := newEnv(t, queues...)
	w := h.start(&script{}, func(o *options) { o.AckWait = 10 * time.Second })
	h.submit("q3", job("first"))
	h.outcome("first", lifecycle.StateCompleted)
	from := time.Now()
	h.submit("q287", job("second"))
	h.outcome("second", lifecycle.StateCompleted)
	if took := time.Since(from); took > natstest.Unhurried(5*time.Second) {
		t.Errorf("a job of an idle queue waited %s", took)
	}
	// What is empty is looked at less and less often.
	sent := w.nc.Stats().OutMsgs
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for range 15 {
		<-second.C
		rate := w.nc.Stats().OutMsgs - sent
		if sent += rate; rate < 300 {
			return
		}
	}
	t.Error("an idle worker goes on making more than 300 requests a second")
}

// Good jobs among messages that look like the server's are done about as fast as
// without them.
func TestMessagesThatLookLikeTheServersDelayNoJob(t *testing.T) {
	h := newEnv(t)
	good, odd := 20, 600
	if natstest.Raced {
		odd = 60
	}
	var ratio float64
	for round := range 3 { // a busy machine may make one measurement worthless
		others := h.timeAmong(fmt.Sprintf("others%d-", round), good, odd, "")
		among := h.timeAmong(fmt.Sprintf("among%d-", round), good, odd, "404")
		ratio = float64(among) / float64(others)
		t.Logf("%d jobs: among %d such messages %s, among as many others %s: ratio %.2f", good, odd, among, others, ratio)
		if ratio <= 1.5 {
			return
		}
	}
	t.Errorf("among %d such messages %d jobs take %.2f times as long as among other messages that are no jobs", odd, good, ratio)
}

// timeAmong returns how long a worker takes for so many good jobs, each with a
// session of a second, spread among messages that are no jobs, with this Status
// header if it is not empty.
func (h *env) timeAmong(name string, good, odd int, status string) time.Duration {
	h.t.Helper()
	each := odd/good + 1
	h.publishAll(odd+good, func(i int) *nats.Msg {
		msg := nats.NewMsg(h.names.Jobs("default"))
		if i%each == each-1 {
			msg.Data = []byte(job(fmt.Sprintf("%s%d", name, i/each)))
			return msg
		}
		if status != "" {
			msg.Header.Set("Status", status)
		}
		return msg
	})
	from := time.Now()
	w := h.start(&script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		connect(a)
		select {
		case <-time.After(time.Second): // speech takes its time
		case <-ctx.Done():
			return jobs.Report{}, context.Cause(ctx)
		}
		return speakAll(ctx, a)
	}})
	for i := range good {
		h.outcome(fmt.Sprintf("%s%d", name, i), lifecycle.StateCompleted)
	}
	took := time.Since(from)
	w.end()
	return took
}

// A publisher's message with a Status header is a message, whatever the server
// says with one.
func TestMessagesThatLookLikeTheServersAreJobs(t *testing.T) {
	h := newEnv(t)
	const good, odd = 20, 600
	runner := &script{}
	h.start(runner)
	statuses := []string{"404", "408", "409", "503", "100"}
	h.publishAll(odd+good, func(i int) *nats.Msg {
		msg := nats.NewMsg(h.names.Jobs("default"))
		if k := i / (odd/good + 1); i%(odd/good+1) == 0 {
			msg.Data = []byte(job(fmt.Sprintf("good%d", k)))
			return msg
		}
		msg.Header.Set("Status", statuses[i%len(statuses)])
		msg.Header.Set("Description", "No Messages")
		return msg
	})
	for i := range good {
		h.outcome(fmt.Sprintf("good%d", i), lifecycle.StateCompleted)
	}
	h.settled()
	if n := h.messages(h.names.DLQStream()); n != odd {
		t.Errorf("%d dead letters, want one for each of %d", n, odd)
	}
	if n := len(h.events(h.names.Errors("job", string(errors.CodeInvalidJob)))); n != odd {
		t.Errorf("%d error events with invalidJob, want %d", n, odd)
	}
	if n := len(runner.ran()); n != good {
		t.Errorf("%d sessions, want %d", n, good)
	}
}
