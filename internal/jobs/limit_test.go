package jobs_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/natsserver/natstest"
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
	open  map[string]bool
	most  int
}

func newOpenEnded() *openEnded {
	return &openEnded{began: make(chan string, 1000), end: make(map[string]chan struct{}), open: make(map[string]bool)}
}

func (s *openEnded) ending(id string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end[id] == nil {
		s.end[id] = make(chan struct{})
	}
	return s.end[id]
}

// lives notes that the job's session is open, or that it is not any more.
func (s *openEnded) lives(id string, open bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if open {
		s.open[id] = true
	} else {
		delete(s.open, id)
	}
	s.most = max(s.most, len(s.open))
}

// oneOpen is the job of a session that is open; "": there is none.
func (s *openEnded) oneOpen() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.open {
		return id
	}
	return ""
}

func (s *openEnded) peak() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most
}

func (s *openEnded) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	connect(a)
	s.lives(a.Job.ID, true)
	defer s.lives(a.Job.ID, false)
	end := s.ending(a.Job.ID)
	s.began <- a.Job.ID
	select {
	case <-end:
		return jobs.Report{}, nil
	case <-ctx.Done():
		return jobs.Report{}, untilDone(ctx)
	}
}

func (s *openEnded) Finish(context.Context, *jobspec.Job, jobs.Finished) error { return nil }

func shortDrain(o *options) { o.Drain = time.Millisecond }

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

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines.String()
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.lines.String(), text)
}

// delivered is how often jobs of the queue were delivered so far.
func (h *env) delivered() uint64 {
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
	h := newEnv(t)
	sessions := newOpenEnded()
	h.start(sessions, maxSessions(1), shortDrain, func(o *options) { o.AckWait = 20 * time.Second })
	const backlog = 1500
	h.fill("default", backlog)
	id := receive(t, sessions.began, "session")
	h.eventually("all were handed back once", func() bool { return h.delivered() >= backlog })
	time.Sleep(4 * time.Second) //nolint:forbidigo // the first ones come again with the short delays of a small backlog
	from, before := time.Now(), h.delivered()
	time.Sleep(3 * time.Second) //nolint:forbidigo // what is measured is a rate
	if rate := float64(h.delivered()-before) / time.Since(from).Seconds(); rate > 120 || rate < 1 {
		t.Errorf("%.0f jobs are looked at each second, want about 50", rate)
	}
	before = h.delivered()
	h.submit("default", job("other", `"app_id":"app2"`))
	if got := receive(t, sessions.began, "session of another app"); got != "other" {
		t.Fatal(got)
	}
	if n := h.delivered() - before; n > 4*backlog { // the server delivers again first what is late
		t.Errorf("a job of another app came after %d deliveries of those that wait", n)
	}
	for range 5 { // with so many waiting, a slot that is freed does not stay free
		before = h.delivered()
		close(sessions.ending(id))
		id = receive(t, sessions.began, "next session")
		if n := h.delivered() - before; n > backlog {
			t.Errorf("%d jobs were handed back while a slot was free", n)
		}
	}
}

func TestWeightsHoldBesideABacklogBehindMaxSessions(t *testing.T) {
	h := newEnv(t, "a", "b")
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
	off := 30
	if natstest.Raced { // and takes jobs as the machine lets it
		off = 50
	}
	if got := started["a"]; got < 200-off || got > 200+off {
		t.Errorf("queue a had %d starts of 400, want about 200", got)
	}
}

func TestSeveralAppsThatWaitLeaveAPlaceForTheOthers(t *testing.T) {
	h := newEnv(t)
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
	case <-time.After(natstest.Patience):
		t.Fatalf("no job of an app without a limit began in %s", time.Since(from))
	}
}

func TestJobThatWaitsForALimitLeavesTheOnlySlotToOthers(t *testing.T) {
	h := newEnv(t)
	one := func(o *options) {
		o.MaxSessions, o.Concurrency, o.Drain = map[string]int{"app1": 1}, 1, time.Millisecond
	}
	elsewhere := newOpenEnded()
	h.start(elsewhere, one)
	h.submit("default", job("holder", `"app_id":"app1"`))
	receive(t, elsewhere.began, "session that the limit allows")
	here := newOpenEnded()
	w := h.start(here, one)
	h.submit("default", job("waits", `"app_id":"app1"`))
	h.eventually("one waits", func() bool { return w.Running() == 1 })
	h.submit("default", job("free", `"app_id":"app2"`))
	if id := receive(t, here.began, "session of another app"); id != "free" {
		t.Errorf("%s began", id)
	}
}

var _ jobs.Runner = (*openEnded)(nil)
