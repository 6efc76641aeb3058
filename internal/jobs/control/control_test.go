package control_test

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

const waitLimit = 20 * time.Second

// fakeJobs is a worker's view of its jobs and of the records of the fleet.
type fakeJobs struct {
	records *records
	look    func(jobID string) // called by Lookup; nil: nothing

	mu  sync.Mutex
	own map[string]control.Running
}

// records are shared by the workers of a fleet.
type records struct {
	mu    sync.Mutex
	byJob map[string]control.JobState
	made  int
	noted map[string]int
}

func newRecords() *records {
	return &records{byJob: make(map[string]control.JobState), noted: make(map[string]int)}
}

func (r *records) set(jobID string, s control.JobState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byJob[jobID] = s
}

func (r *records) notes(jobID string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.noted[jobID]
}

func (f *fakeJobs) Own(jobID string) (control.Running, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	job, ok := f.own[jobID]
	return job, ok
}

func (f *fakeJobs) run(jobID string, job control.Running) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.own == nil {
		f.own = make(map[string]control.Running)
	}
	f.own[jobID] = job
	f.records.set(jobID, control.JobState{Known: true, State: "running", Held: true})
}

func (f *fakeJobs) end(jobID, state string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.own, jobID)
	f.records.set(jobID, control.JobState{Known: true, State: state})
}

func (f *fakeJobs) Lookup(_ context.Context, jobID string) (control.JobState, error) {
	if f.look != nil {
		f.look(jobID)
	}
	f.records.mu.Lock()
	defer f.records.mu.Unlock()
	if jobID == "unreadable" {
		return control.JobState{}, errors.New("no answer")
	}
	return f.records.byJob[jobID], nil
}

func (f *fakeJobs) NoteCancel(_ context.Context, jobID string) (control.Reply, error) {
	r := f.records
	r.mu.Lock()
	defer r.mu.Unlock()
	if jobID == "unwritable" {
		return control.Reply{}, errors.New("no answer")
	}
	s := r.byJob[jobID]
	if !s.Known {
		r.made++
		r.byJob[jobID] = control.JobState{Known: true, State: "released"}
	}
	r.noted[jobID]++
	if s.State == "completed" {
		return control.Reply{Status: control.StatusFinished, Outcome: "completed"}, nil
	}
	return control.Reply{Status: control.StatusRequested}, nil
}

type session struct {
	cancel, interrupt func(ctx context.Context) control.Reply
}

func (s session) Cancel(ctx context.Context) control.Reply    { return s.cancel(ctx) }
func (s session) Interrupt(ctx context.Context) control.Reply { return s.interrupt(ctx) }

func prompt() session {
	return session{
		cancel: func(context.Context) control.Reply { return control.Reply{Status: control.StatusCancelled} },
		interrupt: func(context.Context) control.Reply {
			return control.Reply{Status: control.StatusInterrupted, ReqID: "r1", LastSeq: 3}
		},
	}
}

func validID(id string) bool { return !strings.Contains(id, "=") && id != "" }

func serve(t *testing.T, nc *nats.Conn, jobs control.Jobs, change func(*control.Options)) *control.Server {
	t.Helper()
	o := control.Options{
		NC: nc, Subject: "avatar.control.*", Jobs: jobs, Valid: validID,
		Recheck: 20 * time.Millisecond, Patience: 60 * time.Millisecond,
	}
	if change != nil {
		change(&o)
	}
	s, err := control.Serve(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func ask(t *testing.T, nc *nats.Conn, jobID, body string) control.Reply {
	t.Helper()
	reply, err := request(nc, jobID, body)
	if err != nil {
		t.Fatalf("%s to %s: %v", body, jobID, err)
	}
	return reply
}

func request(nc *nats.Conn, jobID, body string) (r control.Reply, err error) {
	msg, err := nc.Request("avatar.control."+jobID, []byte(body), waitLimit)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(msg.Data, &r)
}

const (
	cancel    = `{"op":"cancel"}`
	interrupt = `{"op":"interrupt"}`
)

func receive[T any](t *testing.T, from <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(waitLimit):
		t.Fatalf("no %s", what)
	}
	return v
}

func TestEveryRequestHasTheReplyThatItsJobGives(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	all := newRecords()
	one, two := &fakeJobs{records: all}, &fakeJobs{records: all}
	serve(t, natstest.Connect(t, srv), one, nil)
	serve(t, natstest.Connect(t, srv), two, nil)
	one.run("runs", prompt())
	all.set("waits", control.JobState{Known: true, State: "retrying"})
	all.set("done", control.JobState{Known: true, State: "completed"})
	// Its worker died: the record says that it runs, and no lease is valid.
	all.set("orphan", control.JobState{Known: true, State: "running"})
	nc := natstest.Connect(t, srv)
	long := `{"op":"cancel","why":"` + strings.Repeat("x", 4096) + `"}`
	deep := strings.Repeat("[", 2000) + strings.Repeat("]", 2000)
	for _, c := range []struct{ job, body, status, rest string }{
		{"runs", cancel, control.StatusCancelled, ""},
		{"runs", interrupt, control.StatusInterrupted, "r1"},
		{"runs", `{"op":"interrupt","by":["me"]}`, control.StatusInterrupted, "r1"},
		{"waits", cancel, control.StatusRequested, ""},
		{"waits", interrupt, control.StatusNotRunning, "retrying"},
		{"done", cancel, control.StatusFinished, "completed"},
		{"orphan", cancel, control.StatusRequested, ""},
		{"orphan", interrupt, control.StatusNotRunning, "running"},
		{"unknown", interrupt, control.StatusNotRunning, ""},
		{"unknown", cancel, control.StatusRequested, ""},
		{"unreadable", cancel, control.StatusRefused, "ask again"},
		{"unwritable", cancel, control.StatusRefused, "ask again"},
		{"=20", cancel, control.StatusRefused, "no job has such an id"},
		{"runs", "", control.StatusRefused, `want {"op"`},
		{"runs", "null", control.StatusRefused, `want {"op"`},
		{"runs", "[]", control.StatusRefused, `want {"op"`},
		{"runs", deep, control.StatusRefused, `want {"op"`},
		{"runs", long, control.StatusRefused, `want {"op"`},
		{"runs", cancel + cancel, control.StatusRefused, `want {"op"`},
		{"runs", `{"op":"dance"}`, control.StatusRefused, `want {"op"`},
		{"waits", `{"op":["cancel"]}`, control.StatusRefused, `want {"op"`},
	} {
		for range 4 { // whichever worker of the group has it
			r := ask(t, nc, c.job, c.body)
			if r.JobID != c.job || r.Status != c.status || !strings.Contains(r.State+r.Outcome+r.ReqID+r.Message, c.rest) {
				t.Errorf("%.40s to %s: %+v, want %s", c.body, c.job, r, c.status)
			}
		}
	}
	if all.made != 1 {
		t.Errorf("%d records made, want that of the unknown job", all.made)
	}
}

func TestAReplyIsTheJSONThatItWas(t *testing.T) {
	t.Parallel()
	for want, r := range map[string]control.Reply{
		`{"job_id":"j","status":"cancelled"}`:                                {JobID: "j", Status: control.StatusCancelled},
		`{"job_id":"j","status":"finished","outcome":"completed"}`:           {JobID: "j", Status: control.StatusFinished, Outcome: "completed"},
		`{"job_id":"j","status":"interrupted","req_id":"r","last_seq":7}`:    {JobID: "j", Status: control.StatusInterrupted, ReqID: "r", LastSeq: 7},
		`{"job_id":"j","status":"not_running","state":"held","message":"m"}`: {JobID: "j", Status: control.StatusNotRunning, State: "held", Message: "m"},
	} {
		if got, err := json.Marshal(r); err != nil || string(got) != want {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
}

func TestAJobThatAnotherWorkerRunsIsLeftToIt(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	all := newRecords()
	looks := make(chan string, 64)
	other := &fakeJobs{records: all, look: func(id string) { looks <- id }}
	serve(t, natstest.Connect(t, srv), other, nil)
	all.set("far", control.JobState{Known: true, State: "running", Held: true})
	nc := natstest.Connect(t, srv)

	// Its worker has not answered after the last look: the wish is in the record.
	if r := ask(t, nc, "far", cancel); r.Status != control.StatusRequested || all.notes("far") != 1 {
		t.Errorf("%+v, noted %d times", r, all.notes("far"))
	}
	if n := len(looks); n != 3 {
		t.Errorf("looked %d times, want 3", n)
	}
	// It ended between its worker's look and this one's.
	first := make(chan struct{})
	var once sync.Once
	late := &fakeJobs{records: newRecords(), look: func(string) { once.Do(func() { close(first) }) }}
	late.records.set("far", control.JobState{Known: true, State: "running", Held: true})
	srv2 := natstest.Start(t)
	serve(t, natstest.Connect(t, srv2), late, nil)
	go func() {
		<-first
		late.records.set("far", control.JobState{Known: true, State: "completed"})
	}()
	if r := ask(t, natstest.Connect(t, srv2), "far", interrupt); r.Status != control.StatusNotRunning || r.State != "completed" {
		t.Errorf("%+v", r)
	}
}

func TestAJobThatEndsBeforeItsRequestIsHandledIsAnsweredFor(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	began, blocked := make(chan struct{}), make(chan struct{})
	leave := sync.OnceFunc(func() { close(blocked) })
	defer leave()
	jobs.run("j", session{interrupt: func(context.Context) control.Reply {
		close(began)
		<-blocked
		return control.Reply{Status: control.StatusInterrupted}
	}})
	serve(t, natstest.Connect(t, srv), jobs, nil)
	nc := natstest.Connect(t, srv)
	replies := make(chan control.Reply, 2)
	send := func(body string) {
		go func() {
			r, err := request(nc, "j", body)
			if err != nil {
				t.Error(err)
			}
			replies <- r
		}()
	}
	send(interrupt)
	receive(t, began, "interrupt")
	send(cancel)
	jobs.end("j", "completed")
	leave()
	got := []string{receive(t, replies, "reply").Status, receive(t, replies, "reply").Status}
	slices.Sort(got)
	if !slices.Equal(got, []string{control.StatusFinished, control.StatusInterrupted}) {
		t.Errorf("replies %v", got)
	}
}

func TestRequestsToAJobAreHandledOneAtATimeAndInOrder(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	var inHand, most atomic.Int32
	var mu sync.Mutex
	var order []string
	began, blocked := make(chan struct{}, 64), make(chan struct{})
	leave := sync.OnceFunc(func() { close(blocked) })
	defer leave()
	enter := func(what string) {
		most.Store(max(most.Load(), inHand.Add(1)))
		began <- struct{}{}
		<-blocked
		mu.Lock()
		order = append(order, what)
		mu.Unlock()
		inHand.Add(-1)
	}
	jobs.run("j", session{
		cancel: func(context.Context) control.Reply { enter("c"); return control.Reply{Status: control.StatusCancelled} },
		interrupt: func(context.Context) control.Reply {
			enter("i")
			return control.Reply{Status: control.StatusInterrupted}
		},
	})
	jobs.run("other", prompt())
	serve(t, natstest.Connect(t, srv), jobs, func(o *control.Options) { o.JobQueue = 6 })
	nc := natstest.Connect(t, srv)
	inbox, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	const sent = "iciicci"
	for i, op := range sent {
		body := cancel
		if op == 'i' {
			body = interrupt
		}
		if err := nc.PublishRequest("avatar.control.j", inbox.Subject, []byte(body)); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			receive(t, began, "request in hand")
		}
	}
	// Six wait: the next one is refused, and another job's is not.
	if r := ask(t, nc, "j", cancel); r.Status != control.StatusRefused || r.Message != "busy: ask again" {
		t.Errorf("one too many: %+v", r)
	}
	if r := ask(t, nc, "other", cancel); r.Status != control.StatusCancelled {
		t.Errorf("another job: %+v", r)
	}
	leave()
	for range sent {
		if _, err := inbox.NextMsg(waitLimit); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(order, ""); got != sent || most.Load() != 1 {
		t.Errorf("handled %s, %d at a time; want %s one at a time", got, most.Load(), sent)
	}
}

func TestRecordsOfUnknownNamesAreBounded(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	serve(t, natstest.Connect(t, srv), jobs, func(o *control.Options) { o.NotesPerMinute = 3 })
	nc := natstest.Connect(t, srv)
	jobs.records.set("known", control.JobState{Known: true, State: "retrying"})
	for i := range 6 {
		want := control.StatusRequested
		if i >= 3 {
			want = control.StatusRefused
		}
		if r := ask(t, nc, fmt.Sprint("unknown", i), cancel); r.Status != want || i >= 3 && !strings.Contains(r.Message, "ask again") {
			t.Errorf("%d: %+v", i, r)
		}
		// Neither a job that is known counts, nor one that was noted.
		for _, id := range []string{"known", "unknown0"} {
			if r := ask(t, nc, id, cancel); r.Status != control.StatusRequested {
				t.Errorf("%s: %+v", id, r)
			}
		}
		if r := ask(t, nc, fmt.Sprint("never", i), interrupt); r.Status != control.StatusNotRunning {
			t.Errorf("interrupt: %+v", r)
		}
	}
	if jobs.records.made != 3 {
		t.Errorf("%d records made", jobs.records.made)
	}
}

// What a flood of names that no job has may cost: a bounded number of goroutines
// and of bytes. The worker's own jobs are served meanwhile.
func TestAFloodOfUnknownNamesKeepsNothingElseWaiting(t *testing.T) {
	srv := natstest.Start(t)
	blocked := make(chan struct{})
	release := sync.OnceFunc(func() { close(blocked) })
	defer release()
	jobs := &fakeJobs{records: newRecords(), look: func(string) { <-blocked }}
	jobs.run("honest", prompt())
	s := serve(t, natstest.Connect(t, srv), jobs, nil)
	nc := natstest.Connect(t, srv)
	inbox, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	before, heap := runtime.NumGoroutine(), heapBytes()
	const n = 60_000
	most := 0
	for i := range n {
		body := cancel
		if i%2 == 0 {
			body = interrupt
		}
		if err := nc.PublishRequest(fmt.Sprintf("avatar.control.unknown-%d", i), inbox.Subject, []byte(body)); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			most = max(most, runtime.NumGoroutine())
		}
		if i%10_000 == 0 {
			if r := ask(t, nc, "honest", interrupt); r.Status != control.StatusInterrupted {
				t.Errorf("an honest request: %+v", r)
			}
		}
	}
	refused := 0
	for refused < n-16-1024 {
		if _, err := inbox.NextMsg(waitLimit); err != nil {
			t.Fatalf("after %d refusals: %v", refused, err)
		}
		refused++
	}
	most = max(most, runtime.NumGoroutine())
	if most > before+64+16+20 {
		t.Errorf("%d goroutines, %d before", most, before)
	}
	if grown := heapBytes() - heap; grown > 48<<20 {
		t.Errorf("%d MiB more in use", grown>>20)
	}
	release()
	for refused < n {
		if _, err := inbox.NextMsg(waitLimit); err != nil {
			t.Fatalf("after %d replies: %v", refused, err)
		}
		refused++
	}
	s.Close()
	if jobs.records.made > 1000 {
		t.Errorf("%d records made", jobs.records.made)
	}
}

func heapBytes() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Nothing waits in the pool for another worker's answer.
func TestJobsOfOtherWorkersDoNotFillThePool(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	s := serve(t, natstest.Connect(t, srv), jobs, func(o *control.Options) {
		o.OtherPool, o.Recheck, o.Patience = 1, time.Hour, time.Hour
	})
	nc := natstest.Connect(t, srv)
	for i := range 2000 {
		id := fmt.Sprint("far", i)
		jobs.records.set(id, control.JobState{Known: true, State: "running", Held: true})
		if err := nc.PublishRequest("avatar.control."+id, nats.NewInbox(), []byte(cancel)); err != nil {
			t.Fatal(err)
		}
	}
	for began := time.Now(); ; { // the queue may be full for a moment
		r := ask(t, nc, "near", interrupt)
		if r.Status == control.StatusNotRunning {
			break
		}
		if r.Message != "busy: ask again" || time.Since(began) > waitLimit {
			t.Fatalf("%+v", r)
		}
	}
	s.Close()
}

func TestCloseWaitsForTheRequestInHandAndRefusesTheRest(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	began, blocked := make(chan struct{}), make(chan struct{})
	leave := sync.OnceFunc(func() { close(blocked) })
	defer leave()
	jobs.run("j", session{cancel: func(ctx context.Context) control.Reply {
		if _, ok := ctx.Deadline(); !ok || ctx.Err() != nil {
			t.Errorf("the work for a request is not bounded, or has ended: %v", ctx.Err())
		}
		close(began)
		<-blocked
		return control.Reply{Status: control.StatusCancelled}
	}})
	jobs.run("other", prompt())
	s := serve(t, natstest.Connect(t, srv), jobs, nil)
	nc := natstest.Connect(t, srv)
	inbox, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := nc.PublishRequest("avatar.control.j", inbox.Subject, []byte(cancel)); err != nil {
			t.Fatal(err)
		}
	}
	receive(t, began, "request in hand")
	if r := ask(t, nc, "other", cancel); r.Status != control.StatusCancelled { // the ones before have come, too
		t.Errorf("%+v", r)
	}
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	for { // until nothing is subscribed any more
		if _, err := nc.Request("avatar.control.j", []byte(interrupt), waitLimit); errors.Is(err, nats.ErrNoResponders) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-closed:
		t.Fatal("closed while a request was in hand")
	default:
	}
	leave()
	receive(t, closed, "end of Close")
	s.Close() // again is harmless
	var got []string
	for range 3 {
		msg, err := inbox.NextMsg(waitLimit)
		if err != nil {
			t.Fatal(err)
		}
		var r control.Reply
		if err := json.Unmarshal(msg.Data, &r); err != nil {
			t.Fatal(err)
		}
		got = append(got, r.Status)
	}
	if !slices.Equal(got, []string{control.StatusRefused, control.StatusRefused, control.StatusCancelled}) {
		t.Errorf("replies %v", got)
	}
}

func TestARequestWithoutAReplySubjectIsObeyed(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	jobs := &fakeJobs{records: newRecords()}
	cancelled := make(chan struct{}, 1)
	jobs.run("j", session{cancel: func(context.Context) control.Reply {
		cancelled <- struct{}{}
		return control.Reply{}
	}})
	serve(t, natstest.Connect(t, srv), jobs, nil)
	if err := natstest.Connect(t, srv).Publish("avatar.control.j", []byte(cancel)); err != nil {
		t.Fatal(err)
	}
	receive(t, cancelled, "cancel")
}
