package jobs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace/noop"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/alert"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) {
	natstest.Parallel(12)
	natstest.Main(m)
}

const testAckWait = 3 * time.Second

// env is one NATS with everything in it, and the workers of a test.
type env struct {
	t        testing.TB
	server   *natsserver.Server
	url      string
	nc       *nats.Conn // the test's own
	js       jetstream.JetStream
	names    topology.Names
	settings topology.Settings
	handles  topology.Handles
	storage  jetstream.StorageType
}

func newEnv(t testing.TB, queues ...string) *env {
	t.Helper()
	if t, ok := t.(*testing.T); ok {
		t.Parallel() // they mostly wait
	}
	h := &env{t: t, server: natstest.Start(t), storage: jetstream.MemoryStorage}
	h.open(queues)
	return h
}

func (h *env) open(queues []string) {
	h.t.Helper()
	h.url = h.server.ClientURL()
	h.nc = natstest.ConnectURL(h.t, h.url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	var err error
	if h.js, err = jetstream.New(h.nc); err != nil {
		h.t.Fatal(err)
	}
	h.settings = topology.DefaultSettings()
	h.settings.AckWait = testAckWait
	h.settings.Storage = h.storage
	if len(queues) > 0 {
		h.settings.Queues = queues
	}
	h.ensure()
}

// openOnDisk is open with files that outlive the server.
func (h *env) openOnDisk() {
	h.t.Helper()
	h.storage = jetstream.FileStorage
	h.open(nil)
}

func portOf(t testing.TB, url string) int {
	t.Helper()
	port, err := strconv.Atoi(url[strings.LastIndexByte(url, ':')+1:])
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func (h *env) ensure() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	var err error
	if h.handles, _, err = topology.Ensure(ctx, h.js, h.names, h.settings); err != nil {
		h.t.Fatal(err)
	}
}

// worker is one worker of a test with its Runner.
type worker struct {
	*jobs.Worker
	h      *env
	id     string
	nc     *nats.Conn
	stop   context.CancelFunc
	done   chan struct{}
	runErr error
}

// options are what a test may change of a worker.
type options struct {
	jobs.Options
	url     string // another way to NATS
	natsOpt []nats.Option
}

// start runs a worker until the test ends.
func (h *env) start(runner jobs.Runner, change ...func(*options)) *worker {
	h.t.Helper()
	w := h.prepare(runner, change...)
	w.run()
	return w
}

func (w *worker) run() {
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		w.runErr = w.Run(ctx)
	}()
	w.h.t.Cleanup(func() { w.end() })
}

// end drains the worker and waits for it.
func (w *worker) end() {
	w.stop()
	select {
	case <-w.done:
	case <-time.After(natstest.Patience):
		var stacks bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&stacks, 1) // to memory
		w.h.t.Errorf("worker %s did not stop:\n%s", w.id, stacks.String())
	}
}

var workerNumber = struct {
	sync.Mutex
	n int
}{}

func (h *env) prepare(runner jobs.Runner, change ...func(*options)) *worker {
	h.t.Helper()
	table, err := errors.NewTable(nil)
	if err != nil {
		h.t.Fatal(err)
	}
	workerNumber.Lock()
	workerNumber.n++
	id := fmt.Sprintf("w-%d", workerNumber.n)
	workerNumber.Unlock()
	o := options{url: h.url}
	queues := make([]fetch.Queue, 0, len(h.settings.Queues))
	for _, q := range h.settings.Queues {
		queues = append(queues, fetch.Queue{Name: q, Weight: 1})
	}
	o.Stores = jobs.Stores{Names: h.names}
	o.Profile = jobs.Profile{
		Name: "w", ID: id, Version: "test", Queues: queues, Concurrency: 16,
		AckWait: testAckWait, Drain: 5 * time.Second,
	}
	o.Accounts = jobs.Accounts{
		DefaultApp: "app1", DefaultRegion: "us-west",
		KnownApp: func(app string) bool { return strings.HasPrefix(app, "app") },
	}
	o.Policy = jobs.Policy{
		Retry:   lifecycle.RetryPolicy{MaxAttempts: 5, Initial: 20 * time.Millisecond, Max: 200 * time.Millisecond},
		Circuit: circuit.Config{Failures: 5, Cooldown: 500 * time.Millisecond, MaxCooldown: 4 * time.Second},
		MaxHold: time.Hour,
		Alerts:  alert.Config{Threshold: 5, Window: time.Minute},
		Table:   table,
	}
	o.Parts = jobs.Parts{
		Runner: runner, DeadLetters: &letters{js: h.js, names: h.names},
		Observer: nopObserver{}, Tracer: noop.NewTracerProvider().Tracer(""),
		Logger: zerolog.New(zerolog.NewTestWriter(h.t)).Level(zerolog.ErrorLevel),
		Now:    time.Now, Random: rand.Float64,
	}
	if _, ok := h.t.(*testing.B); ok {
		o.Logger = zerolog.Nop()
	}
	for _, f := range change {
		f(&o)
	}
	w := &worker{h: h, id: o.ID}
	opts := append([]nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond), nats.ReconnectBufSize(-1),
		nats.ReconnectHandler(func(*nats.Conn) {
			if w.Worker != nil {
				w.Reconnected()
			}
		}),
	}, o.natsOpt...)
	w.nc = natstest.ConnectURL(h.t, o.url, opts...)
	js, err := jetstream.New(w.nc)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	handles, _, err := topology.Ensure(ctx, js, h.names, h.settings)
	if err != nil {
		h.t.Fatal(err)
	}
	o.NC, o.JS = w.nc, js
	o.Jobs, o.Events, o.State, o.Fleet = handles.Jobs, handles.Events, handles.State, handles.Fleet
	if o.Consumer == nil {
		o.Consumer = func(ctx context.Context, queue string) error {
			_, _, err := topology.EnsureConsumer(ctx, handles.Jobs, h.names, h.settings, queue)
			return err
		}
	}
	if w.Worker, err = jobs.New(ctx, o.Options); err != nil {
		h.t.Fatal(err)
	}
	return w
}

// kill takes the worker away as a crash would: its connection closes and it
// says nothing more. Its sessions end when their leases do.
func (w *worker) kill() { w.nc.Close() }

// script is a Runner that a test writes.
type script struct {
	run    func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error)
	finish func(ctx context.Context, job *jobspec.Job, f jobs.Finished) error

	mu   sync.Mutex
	runs []string // job/session/attempt
}

func (s *script) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	s.mu.Lock()
	s.runs = append(s.runs, fmt.Sprintf("%s/s%d/a%d", a.Job.ID, a.Session, a.Number))
	s.mu.Unlock()
	if s.run == nil {
		return speakAll(ctx, a)
	}
	return s.run(ctx, a)
}

func (s *script) Finish(ctx context.Context, job *jobspec.Job, f jobs.Finished) error {
	if s.finish == nil {
		return nil
	}
	return s.finish(ctx, job, f)
}

func (s *script) ran() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.runs...)
}

// runnerFunc makes a Runner of a function that says how an attempt ends.
func runnerFunc(f func(ctx context.Context, a *jobs.Attempt) error) *script {
	return &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) { return jobs.Report{}, f(ctx, a) }}
}

// speakAll is a session that works.
func speakAll(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	connect(a)
	for n := a.Checkpoint + 1; n <= len(a.Job.AudioSpecs()); n++ {
		if err := speak(ctx, a, n); err != nil {
			return jobs.Report{}, err
		}
	}
	return jobs.Report{Connected: time.Millisecond}, nil
}

func connect(a *jobs.Attempt) {
	a.Progress.Connected(fmt.Sprintf("c-%s-%d", a.Job.ID, a.Session), "us-west")
}

func speak(ctx context.Context, a *jobs.Attempt, n int) error {
	if err := a.Progress.Speaking(ctx, n, 0); err != nil {
		return err
	}
	a.Progress.FirstFrame()
	return a.Progress.Delivered(ctx, event.Utterance{ReqID: fmt.Sprintf("r%d", n), Frames: 2, Bytes: 100})
}

// failure is what a Runner says of a code in the phase where it happens.
func failure(code errors.Code, phase errors.Phase) error {
	return errors.Newf(code, phase, "scripted %s", code)
}

// untilDone is a session that goes on until its context ends.
func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return errors.Wrap(errors.CodeConnectionClosed, errors.PhaseRuntime, context.Cause(ctx), "ended")
}

// letters is a DeadLetters over the real stream.
type letters struct {
	js    jetstream.JetStream
	names topology.Names
	fail  func() error
}

func (l *letters) Last(ctx context.Context) (uint64, error) {
	return dlq.NewWriter(l.js, l.names).Last(ctx)
}

func (l *letters) Write(ctx context.Context, d lifecycle.DeadLetter) error {
	if l.fail != nil {
		if err := l.fail(); err != nil {
			return err
		}
	}
	msg := nats.NewMsg(l.names.DLQ(string(d.Error.Class), string(d.Error.Code)))
	msg.Data = d.Data
	msg.Header.Set("Avatar-Job-Id", d.Job.ID)
	msg.Header.Set("Avatar-Reason", d.Reason)
	msg.Header.Set("Avatar-Attempts", fmt.Sprint(d.Attempts))
	_, err := l.js.PublishMsg(ctx, msg, jetstream.WithMsgID(fmt.Sprintf("%s.run%d.dead", d.Job.ID, d.Job.Run)))
	return err
}

// nopObserver is an Observer that observes nothing.
type nopObserver struct{}

func (nopObserver) JobDone(string, lifecycle.State)                     {}
func (nopObserver) AttemptDone(errors.Code, errors.Class, errors.Phase) {}
func (nopObserver) TakenOver(string)                                    {}
func (nopObserver) FirstStarted(string, time.Duration)                  {}
func (nopObserver) SessionOpened(string)                                {}
func (nopObserver) SessionClosed(string, time.Duration)                 {}
func (nopObserver) TotalsAdded(bool)                                    {}
func (nopObserver) Used(string, string, time.Duration, int64)           {}
func (nopObserver) Utterance(event.Utterance)                           {}
func (nopObserver) FramesOut(string, int, int64)                        {}
func (nopObserver) LeaseExtended(bool)                                  {}
func (nopObserver) SlotsBusy(int, int)                                  {}
func (nopObserver) Postponed(string, lifecycle.State, time.Duration)    {}
func (nopObserver) CircuitOpen(string, string, bool)                    {}
func (nopObserver) DeadLettered(errors.Code)                            {}
func (nopObserver) Alerted(string, errors.Code)                         {}

// job is the body of a job, with more fields as in `"app_id":"x"`.
func job(id string, more ...string) string {
	fields := append([]string{`"avatar_id":"a"`}, more...)
	if id != "" {
		fields = append(fields, fmt.Sprintf(`"id":%q`, id))
	}
	body := strings.Join(fields, ",")
	if !strings.Contains(body, `"utterances"`) && !strings.Contains(body, `"audio"`) {
		body += `,"audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000}`
	}
	return "{" + body + "}"
}

// spoken is the utterances field of a job with n of them.
func spoken(n int) string {
	one := `{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000}`
	return `"utterances":[` + strings.TrimSuffix(strings.Repeat(one+",", n), ",") + `]`
}

// submit publishes a job; header alternates names and values.
func (h *env) submit(queue, body string, header ...string) uint64 {
	h.t.Helper()
	msg := nats.NewMsg(h.names.Jobs(queue))
	msg.Data = []byte(body)
	for i := 0; i+1 < len(header); i += 2 {
		msg.Header.Set(header[i], header[i+1])
	}
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	ack, err := h.js.PublishMsg(ctx, msg)
	if err != nil {
		h.t.Fatal(err)
	}
	return ack.Sequence
}

// record reads a job's record; nil: there is none.
func (h *env) record(id string) *lifecycle.Record {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	entry, err := h.handles.State.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		h.t.Fatal(err)
	}
	var r lifecycle.Record
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		h.t.Fatal(err)
	}
	return &r
}

// put writes a record as some other worker would have.
func (h *env) put(r *lifecycle.Record) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	data, err := json.Marshal(r)
	if err == nil {
		_, err = h.handles.State.Put(ctx, r.JobID, data)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// until waits for the record of the job to be as wanted.
func (h *env) until(id string, wanted func(*lifecycle.Record) bool) *lifecycle.Record {
	h.t.Helper()
	return natstest.Value(h.t, h.handles.State, id, wanted)
}

// outcome waits for the job's outcome.
func (h *env) outcome(id string, want lifecycle.State) *lifecycle.Record {
	h.t.Helper()
	r := h.until(id, func(r *lifecycle.Record) bool { return r.State.Final() })
	if r.Outcome != want || r.State != want {
		data, _ := json.Marshal(r)
		h.t.Fatalf("outcome of %s is %s, want %s: %s", id, r.Outcome, want, data)
	}
	return r
}

func (h *env) state(id string, want lifecycle.State) *lifecycle.Record {
	h.t.Helper()
	return h.until(id, func(r *lifecycle.Record) bool { return r.State == want })
}

// storedEvent is one message of the events stream.
type storedEvent struct {
	subject string
	id      string
	header  nats.Header
	body    map[string]any
}

// events lists the events so far whose subject matches.
func (h *env) events(filter string) []storedEvent {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	c, err := h.js.OrderedConsumer(ctx, h.names.EventsStream(), jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}})
	if err != nil {
		h.t.Fatal(err)
	}
	info, err := c.Info(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = h.handles.Events.DeleteConsumer(context.Background(), info.Name) }() // it would go by itself, later
	n := int(info.NumPending)
	list := make([]storedEvent, 0, n)
	if n == 0 {
		return list
	}
	batch, err := c.Fetch(n, jetstream.FetchMaxWait(5*time.Second))
	if err != nil {
		h.t.Fatal(err)
	}
	for msg := range batch.Messages() {
		e := storedEvent{subject: msg.Subject(), id: msg.Headers().Get("ce-id"), header: msg.Headers()}
		if err := json.Unmarshal(msg.Data(), &e.body); err != nil {
			h.t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// types are the event types of a job, in order: error for error events.
func (h *env) types(id string) []string {
	h.t.Helper()
	var list []string
	for _, e := range h.events("avatar.>") {
		if e.body["job_id"] != id {
			continue
		}
		if strings.HasPrefix(e.subject, "avatar.errors.") {
			list = append(list, "error")
		} else if rest, ok := strings.CutPrefix(e.subject, "avatar.events."); ok {
			list = append(list, strings.TrimSuffix(rest, "."+id))
		}
	}
	return list
}

// wantTypes waits for as many events of a job as are wanted: the last ones follow
// its outcome.
func (h *env) wantTypes(id string, want ...string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("%d events of %s", len(want), id), func() bool { return len(h.types(id)) >= len(want) })
	if got := h.types(id); fmt.Sprint(got) != fmt.Sprint(want) {
		h.t.Errorf("events of %s are %v, want %v", id, got, want)
	}
}

// settled waits until the queue is empty: everything is acknowledged.
func (h *env) settled() {
	h.t.Helper()
	h.eventually("the jobs stream is empty", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		s, err := h.js.Stream(ctx, h.names.JobsStream())
		return err == nil && s.CachedInfo().State.Msgs == 0 // an error: NATS is away, look again
	})
}

func (h *env) messages(stream string) uint64 {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	s, err := h.js.Stream(ctx, stream)
	if err != nil {
		h.t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

// eventually waits for something that only the server knows.
func (h *env) eventually(what string, holds func() bool) {
	h.t.Helper()
	natstest.Eventually(h.t, what, holds)
}

// receive takes one value, or fails.
func receive[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(natstest.Patience):
		t.Fatalf("never came: %s", what)
		panic("unreachable")
	}
}
