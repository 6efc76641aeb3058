package app_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"avatarworker/internal/app"
	"avatarworker/internal/audio/clip"
	"avatarworker/internal/config"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

// patience bounds every wait of a test.
const patience = 60 * time.Second

// fields are those of a job in JSON.
type fields = map[string]any

// fleet is a queue, a backend and the workers between them.
type fleet struct {
	t       testing.TB
	ctx     context.Context
	server  *natsserver.Server
	url     string // for workers; "": the server's
	backend *simulator.Server
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names

	lateness func() time.Duration // how late the machine has woken this process, at most
}

// newFleet starts NATS and a backend; change may be nil.
func newFleet(t testing.TB, change func(*simulator.Options)) *fleet {
	t.Helper()
	return newFleetWith(t, natsserver.Options{StoreDir: t.TempDir(), Port: natsserver.RandomPort}, change)
}

func newFleetWith(t testing.TB, o natsserver.Options, change func(*simulator.Options)) *fleet {
	t.Helper()
	f := &fleet{t: t, server: natstest.StartWith(t, o)}
	f.open(f.server.ClientURL(), change)
	return f
}

// open connects the fleet to NATS and starts its backend.
func (f *fleet) open(url string, change func(*simulator.Options)) {
	t := f.t
	t.Helper()
	f.names, f.lateness = topology.Names{Prefix: "avatar"}, natstest.Lateness(t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	f.ctx = ctx
	options := simulator.Options{Addr: "127.0.0.1:0"}
	if change != nil {
		change(&options)
	}
	f.backend = simulator.New(options)
	if err := f.backend.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.backend.Stop)
	f.nc = natstest.ConnectURL(t, url)
	js, err := jetstream.New(f.nc)
	if err != nil {
		t.Fatal(err)
	}
	f.js = js
}

// config is a worker's, made for tests: short waits, small streams in memory.
func (f *fleet) config() *config.Config {
	if f.url != "" {
		return f.configAt(f.url)
	}
	return f.configAt(f.server.ClientURL())
}

func (f *fleet) configAt(url string) *config.Config {
	c := config.Defaults()
	c.NATS.URL = url
	c.NATS.Storage = "memory"
	small := config.Limits{MaxAge: time.Hour, MaxBytes: 128 << 20}
	c.Streams = config.Streams{
		Jobs: config.SizeLimit{MaxBytes: 128 << 20}, DLQ: small, Events: small, Frames: small,
		Audio: small, AudioFiles: small, Recordings: small,
	}
	c.Worker.Name = "w"
	c.App.ID, c.App.APIKey = "app", "key-for-tests"
	c.Backend.ConsoleURL, c.Backend.IngressURL = f.backend.ConsoleURL(), f.backend.IngressURL()
	c.Backend.StallTimeout, c.Backend.HandshakeTimeout = 5*time.Second, 2*time.Second
	c.Retry.Initial, c.Retry.Max = 20*time.Millisecond, 100*time.Millisecond
	c.Circuit.Cooldown = 100 * time.Millisecond
	c.Lease.AckWait = 8 * time.Second
	c.Audio.EgressMargin = 200 * time.Millisecond
	c.Admin.Addr = ""
	return c
}

// worker says how one is started; the zero value is fine.
type worker struct {
	config     func(*config.Config)
	log        io.Writer // nil: the test's log
	spans      sdktrace.SpanExporter
	checkEvery time.Duration // how often it looks for what was deleted; 0: as by default
}

// running is a worker under way.
type running struct {
	app   *app.App
	stop  func() // drains it and waits for its end
	drain func() // begins that only
	done  chan struct{}
}

// worker starts a worker and returns when it takes jobs.
func (f *fleet) worker(w worker) *running {
	f.t.Helper()
	c := f.config()
	if w.config != nil {
		w.config(c)
	}
	log := zerolog.New(zerolog.NewTestWriter(f.t)).Level(zerolog.InfoLevel)
	if w.log != nil {
		log = zerolog.New(w.log)
	}
	ready := make(chan struct{})
	longest := func() float64 { return 0.99 } // so that a test knows how long a retry waits
	a, err := app.New(app.Options{Config: c, Logger: log, Version: "1.2.3", OnReady: func() { close(ready) }, Spans: w.spans, CheckEvery: w.checkEvery, Random: longest})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{app: a, drain: cancel, done: make(chan struct{})}
	var ended error
	go func() {
		defer close(r.done)
		ended = a.Run(ctx)
	}()
	r.stop = func() {
		cancel()
		<-r.done
		if ended != nil {
			f.t.Errorf("worker: %v", ended)
		}
	}
	f.t.Cleanup(r.stop)
	select {
	case <-ready:
	case <-r.done:
		f.t.Fatalf("the worker ended: %v", ended)
	case <-time.After(patience):
		f.t.Fatal("the worker did not become ready")
	}
	return r
}

// speech is an utterance of the clip.
func speech() fields { return fields{"inline": base64.StdEncoding.EncodeToString(clip.WAV)} }

// pcm is an utterance of so much silence at 16 kHz.
func pcm(length time.Duration) fields {
	return fields{"inline": base64.StdEncoding.EncodeToString(silence(length)), "sample_rate": 16000, "format": "pcm_s16le"}
}

func silence(length time.Duration) []byte { return make([]byte, 2*int(length.Milliseconds())*16) }

// uploaded is pcm in an object.
func (f *fleet) uploaded(length time.Duration) fields {
	f.t.Helper()
	store, err := f.js.ObjectStore(f.ctx, f.names.AudioFilesBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := store.PutBytes(f.ctx, length.String(), silence(length)); err != nil {
		f.t.Fatal(err)
	}
	return fields{"object": length.String(), "sample_rate": 16000, "format": "pcm_s16le"}
}

// publish publishes a job made of the clip and of extra fields, and returns its
// bytes.
func (f *fleet) publish(id, avatar string, extra fields) []byte {
	f.t.Helper()
	job := fields{"id": id, "avatar_id": avatar}
	if extra["utterances"] == nil && extra["live"] == nil && extra["audio"] == nil {
		job["audio"] = speech()
	}
	for k, v := range extra {
		job[k] = v
	}
	data, err := json.Marshal(job)
	if err != nil {
		f.t.Fatal(err)
	}
	f.publishRaw(&nats.Msg{Subject: f.names.Jobs("default"), Data: data})
	return data
}

func (f *fleet) publishRaw(msg *nats.Msg) {
	f.t.Helper()
	if _, err := f.js.PublishMsg(f.ctx, msg); err != nil {
		f.t.Fatal(err)
	}
}

// orphanOf makes a job that a lost worker was running in its first
// session.
func (f *fleet) orphanOf(id string, job fields, change func(*lifecycle.Record)) {
	f.t.Helper()
	data, err := json.Marshal(job)
	if err != nil {
		f.t.Fatal(err)
	}
	ack, err := f.js.PublishMsg(f.ctx, &nats.Msg{Subject: f.names.Jobs("default"), Data: data})
	if err != nil {
		f.t.Fatal(err)
	}
	r := lifecycle.Record{
		JobID: id, Run: 1, StreamSeq: ack.Sequence, Session: 1, State: lifecycle.StateRunning, Queue: "default",
		AppID: "app", AvatarID: "ok-" + id, Attempt: 1, MaxAttempts: 5, WorkerID: "w-long-gone",
	}
	change(&r)
	record, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	kv, err := f.js.KeyValue(f.ctx, f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := kv.Create(f.ctx, id, record); err != nil {
		f.t.Fatal(err)
	}
}

// watch reads what a stream keeps and gets under filter until enough says so.
func (f *fleet) watch(stream, filter string, enough func(jetstream.Msg) bool) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	consumer, err := f.js.OrderedConsumer(ctx, stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}, InactiveThreshold: 5 * time.Second})
	if err != nil {
		f.t.Fatal(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		f.t.Fatal(err)
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			f.t.Fatalf("waiting on %s: %v", filter, err)
		}
		if enough(msg) {
			return
		}
	}
}

// event waits for a job's event of one of these types, and returns all of its
// events up to there.
func (f *fleet) event(id string, types ...string) []jetstream.Msg {
	f.t.Helper()
	var all []jetstream.Msg
	f.watch(f.names.EventsStream(), f.names.EventsFilter("", id), func(msg jetstream.Msg) bool {
		all = append(all, msg)
		for _, typ := range types {
			if msg.Subject() == f.names.Events(typ, id) {
				return true
			}
		}
		return false
	})
	return all
}

// outcome waits until everything that follows from a job's outcome was published,
// and returns its record.
func (f *fleet) outcome(id string) lifecycle.Record {
	f.t.Helper()
	f.event(id, "completed", "dead_lettered", "expired", "cancelled")
	return f.record(id)
}

func (f *fleet) record(id string) lifecycle.Record {
	f.t.Helper()
	kv, err := f.js.KeyValue(f.ctx, f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	entry, err := kv.Get(f.ctx, id)
	if err != nil {
		f.t.Fatalf("record of %s: %v", id, err)
	}
	var r lifecycle.Record
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		f.t.Fatal(err)
	}
	return r
}

// state waits until a job's record says so.
func (f *fleet) state(id string, is func(lifecycle.Record) bool) lifecycle.Record {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	kv, err := f.js.KeyValue(ctx, f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	return natstest.Value(f.t, kv, id, is)
}

// all reads what a stream keeps under filter now.
func (f *fleet) all(stream, filter string) []jetstream.Msg {
	f.t.Helper()
	s, err := f.js.Stream(f.ctx, stream)
	if err != nil {
		f.t.Fatal(err)
	}
	info, err := s.Info(f.ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		f.t.Fatal(err)
	}
	var want uint64
	for _, n := range info.State.Subjects {
		want += n
	}
	var out []jetstream.Msg
	if want > 0 {
		f.watch(stream, filter, func(msg jetstream.Msg) bool {
			out = append(out, msg)
			return uint64(len(out)) == want
		})
	}
	return out
}

func (f *fleet) frames(id string) []jetstream.Msg {
	f.t.Helper()
	return f.all(f.names.FramesStream(), f.names.Frames(id))
}

// errorEvents are a job's.
func (f *fleet) errorEvents(id string) []event.Error {
	f.t.Helper()
	var out []event.Error
	for _, msg := range f.all(f.names.EventsStream(), f.names.AllErrors()) {
		var e event.Error
		if err := json.Unmarshal(msg.Data(), &e); err != nil {
			f.t.Fatal(err)
		}
		if e.JobID == id {
			out = append(out, e)
		}
	}
	return out
}

// deadLetters are a job's.
func (f *fleet) deadLetters(id string) []jetstream.Msg {
	f.t.Helper()
	var out []jetstream.Msg
	for _, msg := range f.all(f.names.DLQStream(), f.names.AllDLQ()) {
		if msg.Headers().Get("Avatar-Job-Id") == id {
			out = append(out, msg)
		}
	}
	return out
}

// completed is the body of a job's completed event.
func (f *fleet) completed(id string) event.Completed {
	f.t.Helper()
	events := f.event(id, "completed", "dead_lettered", "expired", "cancelled")
	last := events[len(events)-1]
	var c event.Completed
	if err := json.Unmarshal(last.Data(), &c); err != nil {
		f.t.Fatal(err)
	}
	if last.Subject() != f.names.Events("completed", id) {
		f.t.Fatalf("job %s ended with %s: %s", id, last.Subject(), last.Data())
	}
	return c
}

// control asks on a job's control subject.
func (f *fleet) control(id, op string) control.Reply {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, natstest.Patience)
	defer cancel()
	msg, err := f.nc.RequestWithContext(ctx, f.names.Control(id), []byte(`{"op":"`+op+`"}`))
	if err != nil {
		f.t.Fatalf("%s of %s: %v", op, id, err)
	}
	var reply control.Reply
	if err := json.Unmarshal(msg.Data, &reply); err != nil {
		f.t.Fatal(err)
	}
	return reply
}

// sessions are those of an avatar in the backend's session log. It is written a
// moment after the worker's close, so open ones get a second to be closed.
func (f *fleet) sessions(avatar string) []simulator.Session {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for enough := time.After(time.Second); ; {
		open := false
		var out []simulator.Session
		for _, s := range f.backend.SessionLog() {
			if s.AvatarID == avatar {
				out = append(out, s)
				open = open || s.Closed.IsZero()
			}
		}
		if !open {
			return out
		}
		select {
		case <-ticker.C:
		case <-enough:
			return out
		}
	}
}

// recording reads an object of the recordings.
func (f *fleet) recording(name string) []byte {
	f.t.Helper()
	store, err := f.js.ObjectStore(f.ctx, f.names.RecordingsBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	data, err := store.GetBytes(f.ctx, name)
	if err != nil {
		f.t.Fatalf("recording %s: %v", name, err)
	}
	return data
}

// inRecordings counts what the bucket of recordings keeps: chunks, and objects'
// entries.
func (f *fleet) inRecordings() uint64 {
	f.t.Helper()
	stream, err := f.js.Stream(f.ctx, "OBJ_"+f.names.RecordingsBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	return stream.CachedInfo().State.Msgs
}

// objects are the names in the recordings bucket.
func (f *fleet) objects() []string {
	f.t.Helper()
	store, err := f.js.ObjectStore(f.ctx, f.names.RecordingsBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	list, err := store.List(f.ctx)
	if err != nil && !strings.Contains(err.Error(), "no objects") {
		f.t.Fatal(err)
	}
	var names []string
	for _, o := range list {
		names = append(names, o.Name)
	}
	return names
}

// envelopes takes a recording apart.
func envelopes(t testing.TB, recording []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for len(recording) > 0 {
		n, size := binary.Uvarint(recording)
		if size <= 0 || uint64(len(recording)-size) < n {
			t.Fatalf("envelope %d of the recording is broken", len(out)+1)
		}
		out = append(out, recording[size:size+int(n)])
		recording = recording[size+int(n):]
	}
	return out
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
