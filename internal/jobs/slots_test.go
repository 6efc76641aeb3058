package jobs_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/jobs"
)

// maxSessions limits app1.
func maxSessions(n int) func(*options) {
	return func(o *options) { o.MaxSessions = map[string]int{"app1": n} }
}

// openEnded is a session that lives until the test ends it, or its worker does.
type openEnded struct {
	began chan string // job ids
	mu    sync.Mutex
	end   map[string]chan struct{}
	open  int
	most  int
}

func newOpenEnded() *openEnded {
	return &openEnded{began: make(chan string, 1000), end: make(map[string]chan struct{})}
}

func (s *openEnded) ending(id string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end[id] == nil {
		s.end[id] = make(chan struct{})
	}
	return s.end[id]
}

func (s *openEnded) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open += n
	s.most = max(s.most, s.open)
}

func (s *openEnded) peak() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most
}

func (s *openEnded) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	connect(a)
	s.count(1)
	defer s.count(-1)
	end := s.ending(a.Job.ID)
	s.began <- a.Job.ID
	select {
	case <-end:
		return jobs.Report{}, nil
	case <-ctx.Done():
		return jobs.Report{}, untilDone(ctx)
	}
}

func (s *openEnded) Finish(context.Context, *jobs.Job, jobs.Finished) error { return nil }

func shortDrain(o *options) { o.Drain = time.Millisecond }

// slots opens the stream of the tokens.
func (h *house) slots() jetstream.Stream {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stream, err := h.js.Stream(ctx, h.names.SlotsStream())
	if err != nil {
		h.t.Fatal(err)
	}
	return stream
}

// logged collects a worker's log.
type logged struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.Write(p)
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.lines.String(), text)
}

func TestDeletedSlotConsumerIsMendedAndToldOnce(t *testing.T) {
	h := newHouse(t)
	var log logged
	h.start(&script{}, maxSessions(1), func(o *options) { o.Logger = zerolog.New(&log) })
	h.submit("default", job("j1"))
	h.outcome("j1", jobs.StateCompleted)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := h.slots().DeleteConsumer(ctx, "app1"); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j2"))
	h.outcome("j2", jobs.StateCompleted)
	if lost, back := log.count("cannot fetch session slots"), log.count("fetching session slots again"); lost != 1 || back != 1 {
		t.Errorf("told %d times that it can't, %d times that it can", lost, back)
	}
}

func TestSlotsTakenOutOfTheStreamComeBack(t *testing.T) {
	h := newHouse(t)
	h.start(&script{}, maxSessions(2))
	h.submit("default", job("j1"))
	h.outcome("j1", jobs.StateCompleted)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := h.slots().Purge(ctx); err != nil {
		t.Fatal(err)
	}
	h.submit("default", job("j2"))
	h.outcome("j2", jobs.StateCompleted)
	if n := h.messages(h.names.SlotsStream()); n != 2 {
		t.Errorf("%d tokens", n)
	}
}

func TestLargerLimitCountsOnceTheOldWorkersAreGone(t *testing.T) {
	h := newHouse(t)
	before, after := newOpenEnded(), newOpenEnded()
	old := h.start(before, maxSessions(1), shortDrain)
	h.submit("default", job("j1"))
	receive(t, before.began, "first session")
	h.submit("default", job("j2")) // waits there for a slot, while the new worker adds one
	h.eventually("a job waits for a slot", func() bool { return old.Running() == 2 })
	h.start(after, maxSessions(2), shortDrain)
	h.eventually("the old worker was handed the new slot", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		c, err := h.slots().Consumer(ctx, "app1")
		return err == nil && c.CachedInfo().Delivered.Consumer >= 3
	})
	old.end()
	h.submit("default", job("j3"))
	receive(t, after.began, "session in one slot")
	receive(t, after.began, "session in the other slot")
	h.submit("default", job("j4"))
	select {
	case id := <-after.began:
		t.Errorf("%s is one too many", id)
	case <-time.After(2 * time.Second):
	}
}

func TestSmallerLimitHoldsAlthoughTokensAreLeftOver(t *testing.T) {
	h := newHouse(t)
	h.start(&script{}, maxSessions(4)).end()
	if n := h.messages(h.names.SlotsStream()); n != 4 {
		t.Fatalf("%d tokens", n)
	}
	sessions := newOpenEnded()
	h.start(sessions, maxSessions(1), shortDrain)
	h.start(sessions, maxSessions(1), shortDrain)
	for n := range 5 {
		h.submit("default", job(fmt.Sprintf("j%d", n)))
	}
	for range 5 {
		id := receive(t, sessions.began, "session")
		close(sessions.ending(id))
	}
	h.settled()
	if n := sessions.peak(); n != 1 {
		t.Errorf("%d sessions at once", n)
	}
}

// delivered is how often jobs of the queue were delivered so far.
func (h *house) delivered() uint64 {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := h.handles.Jobs.Consumer(ctx, "default")
	if err != nil {
		h.t.Fatal(err)
	}
	return c.CachedInfo().Delivered.Consumer
}

func TestBacklogBehindMaxSessionsDoesNotCircle(t *testing.T) {
	h := newHouse(t)
	sessions := newOpenEnded()
	h.start(sessions, maxSessions(1), shortDrain, func(o *options) { o.AckWait = 20 * time.Second })
	const backlog = 1500
	h.fill("default", backlog)
	id := receive(t, sessions.began, "session")
	h.eventually("all were handed back once", func() bool { return h.delivered() >= backlog })
	time.Sleep(4 * time.Second) //nolint:forbidigo // the first ones come again with the short delays of a small backlog
	from, before := time.Now(), h.delivered()
	time.Sleep(3 * time.Second) //nolint:forbidigo // what is measured is a rate
	if rate := float64(h.delivered()-before) / time.Since(from).Seconds(); rate > 120 || rate < 10 {
		t.Errorf("%.0f jobs are looked at each second, want about 50", rate)
	}
	from = time.Now()
	h.submit("default", job("other", `"app_id":"app2"`))
	if got := receive(t, sessions.began, "session of another app"); got != "other" {
		t.Fatal(got)
	}
	if took := time.Since(from); took > 2*time.Second {
		t.Errorf("a job of another app waited %s", took)
	}
	for range 5 { // with so many waiting, a slot that is freed does not stay free
		from = time.Now()
		close(sessions.ending(id))
		id = receive(t, sessions.began, "next session")
		if took := time.Since(from); took > 1500*time.Millisecond {
			t.Errorf("the slot stayed free for %s", took)
		}
	}
}

func TestWeightsHoldBesideABacklogBehindMaxSessions(t *testing.T) {
	h := newHouse(t, "a", "b")
	held := newOpenEnded()
	var mu sync.Mutex
	started, n := map[string]int{}, 0
	enough := make(chan struct{})
	h.start(&script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
		if a.AppID == "app1" {
			return held.Run(ctx, a)
		}
		time.Sleep(30 * time.Millisecond) //nolint:forbidigo // a session takes a moment
		mu.Lock()
		defer mu.Unlock()
		if n++; n <= 400 {
			started[a.Job.Queue]++
		}
		if n == 400 {
			close(enough)
		}
		return jobs.Report{}, nil
	}}, maxSessions(1), shortDrain, func(o *options) { o.Concurrency = 6; o.AckWait = 20 * time.Second })
	for i := range 150 {
		h.submit("a", job(fmt.Sprintf("limited-%d", i), `"app_id":"app1"`))
	}
	receive(t, held.began, "the one session of the limited app")
	h.eventually("all others were handed back", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err := h.handles.Jobs.Consumer(ctx, "a")
		return err == nil && c.CachedInfo().Delivered.Consumer >= 150
	})
	h.fill("a", 420, `"app_id":"app2"`)
	h.fill("b", 420, `"app_id":"app2"`)
	receive(t, enough, "400 starts")
	mu.Lock()
	defer mu.Unlock()
	if got := started["a"]; got < 170 || got > 230 {
		t.Errorf("queue a had %d starts of 400, want about 200", got)
	}
}

func TestSeveralAppsThatWaitLeaveAPlaceForTheOthers(t *testing.T) {
	h := newHouse(t)
	limits := func(o *options) {
		o.MaxSessions = map[string]int{"app1": 4, "app2": 4, "app3": 4}
		o.AckWait = 20 * time.Second
		o.Drain = time.Millisecond
	}
	elsewhere := newOpenEnded()
	h.start(elsewhere, limits) // takes all slots
	for n := range 4 {
		for _, app := range []string{"app1", "app2", "app3"} {
			h.submit("default", job(fmt.Sprintf("%s-%d", app, n), fmt.Sprintf(`"app_id":%q`, app)))
		}
	}
	for range 12 {
		receive(t, elsewhere.began, "session that holds a slot")
	}
	here := newOpenEnded()
	waiting := h.start(here, limits, func(o *options) { o.Concurrency = 3 })
	for n := range 12 {
		for _, app := range []string{"app1", "app2", "app3"} {
			h.submit("default", job(fmt.Sprintf("%s-more%d", app, n), fmt.Sprintf(`"app_id":%q`, app)))
		}
	}
	h.eventually("jobs wait in the second worker", func() bool { return waiting.Running() >= 2 })
	from := time.Now()
	for n := range 8 { // more than the four places that the first worker has left
		h.submit("default", job(fmt.Sprintf("free-%d", n), `"app_id":"app4"`))
	}
	select {
	case id := <-here.began:
		if !strings.HasPrefix(id, "free-") {
			t.Errorf("%s has no slot", id)
		}
	case <-time.After(15 * time.Second):
		t.Fatalf("no job of an app without a limit began in %s", time.Since(from))
	}
}

func TestShorterLeaseOfASlotConsumerIsKeptAndTold(t *testing.T) {
	h := newHouse(t)
	h.start(&script{}, maxSessions(1)).end() // makes the consumer, with a lease of a second
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := h.handles.Jobs.DeleteConsumer(ctx, "default"); err != nil {
		t.Fatal(err)
	}
	h.settings.AckWait = time.Minute
	h.ensure()
	var log logged
	sessions := newOpenEnded()
	longer := func(o *options) { o.AckWait = time.Minute }
	h.start(sessions, maxSessions(1), shortDrain, longer, func(o *options) { o.Logger = zerolog.New(&log) })
	if n := log.count("consumer app1 of stream AVATAR_SLOTS: ack_wait is 1s, wanted 1m0s"); n != 1 {
		t.Errorf("the difference was told %d times", n)
	}
	h.submit("default", job("j1"))
	receive(t, sessions.began, "session")
	h.submit("default", job("j2"))
	c, err := h.slots().Consumer(ctx, "app1")
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second) //nolint:forbidigo // three leases
	info, err := c.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if info.NumRedelivered > 0 {
		t.Errorf("the slot's lease ran out while its session lives")
	}
}

func TestJobThatRunsAloneTakesItsSlotFirst(t *testing.T) {
	h := newHouse(t)
	elsewhere, here := newOpenEnded(), newOpenEnded()
	h.start(elsewhere, maxSessions(1), shortDrain, func(o *options) { o.Concurrency = 1 })
	h.submit("default", job("holder"))
	receive(t, elsewhere.began, "session that has the slot")
	h.abandoned("killer", func(r *jobs.Record) { r.Crashes, r.State = 2, jobs.StateReleased })
	msg, err := h.handles.Consumers["default"].Next(jetstream.FetchMaxWait(5 * time.Second)) // delivered before
	if err == nil {
		err = msg.Nak()
	}
	if err != nil {
		t.Fatal(err)
	}
	w := h.start(here, maxSessions(1), shortDrain)
	h.eventually("it waits", func() bool { return w.Running() == 1 })
	h.submit("default", job("other", `"app_id":"app2"`))
	if id := receive(t, here.began, "session beside a job that waits for its slot"); id != "other" {
		t.Fatal(id)
	}
	time.Sleep(1200 * time.Millisecond) //nolint:forbidigo // the request that was under way when it came is over
	h.submit("default", job("another", `"app_id":"app2"`))
	if id := receive(t, here.began, "a later session beside it"); id != "another" {
		t.Fatal(id)
	}
	close(elsewhere.ending("holder"))
	close(here.ending("other"))
	close(here.ending("another"))
	if id := receive(t, here.began, "session of the job that runs alone"); id != "killer" {
		t.Fatal(id)
	}
	close(here.ending("killer"))
	h.outcome("killer", jobs.StateCompleted)
	h.submit("default", job("after", `"app_id":"app2"`))
	select {
	case <-here.began: // pulling goes on
	case <-elsewhere.began:
	case <-time.After(10 * time.Second):
		t.Error("nothing starts after it")
	}
}

func TestSlotIsNotKeptWhileAnotherJobRunsAlone(t *testing.T) {
	h := newHouse(t)
	elsewhere, here := newOpenEnded(), newOpenEnded()
	h.start(elsewhere, maxSessions(1), shortDrain, func(o *options) { o.Concurrency = 1 })
	h.submit("default", job("holder"))
	receive(t, elsewhere.began, "session that has the slot")
	w := h.start(here, maxSessions(1), shortDrain)
	h.submit("default", job("running", `"app_id":"app2"`))
	receive(t, here.began, "session that goes on")
	h.submit("default", job("limited"))
	h.eventually("it waits for its slot", func() bool { return w.Running() == 2 })
	h.abandoned("killer", func(r *jobs.Record) { r.Crashes, r.State, r.AppID = 2, jobs.StateReleased, "app2" }, `"app_id":"app2"`)
	h.eventually("one waits to be alone", func() bool { return w.Running() == 3 })
	close(elsewhere.ending("holder"))
	if id := receive(t, elsewhere.began, "session in the slot"); id != "limited" {
		t.Error(id)
	}
}

var _ jobs.Runner = (*openEnded)(nil)
