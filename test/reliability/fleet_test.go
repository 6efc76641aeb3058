package reliability

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
	"avatarworker/test/reliability/invariant"
)

// fleet is a queue, a backend, and workers between them that a test breaks.
type fleet struct {
	t        *testing.T
	nc       *nats.Conn // the test's own
	js       jetstream.JetStream
	names    topology.Names
	backend  *simulator.Server
	env      map[string]string // of every worker
	lease    time.Duration
	attempts int

	mu       sync.Mutex
	accepted []string
	faults   []invariant.Fault
	delays   []invariant.Span
	records  map[string]lifecycle.Record // as last seen
	changed  chan struct{}               // closed and replaced when a record changes
}

// apiKey may appear in no line that a worker logs.
const apiKey = "key-for-tests"

// newFleet runs everything but the workers until the test ends. urls is where
// the workers find NATS; empty: a server of the test's own.
func newFleet(t *testing.T, urls string, lease time.Duration) *fleet {
	t.Helper()
	return newFleetAt(t, urls, lease, 1, simulator.Options{Addr: "127.0.0.1:0"})
}

func newFleetAt(t *testing.T, urls string, lease time.Duration, replicas int, backend simulator.Options) *fleet {
	t.Helper()
	return newFleetIn(t, cell{}, urls, lease, replicas, backend)
}

// newFleetIn is newFleetAt of one cell; the zero cell is a fleet that has NATS for
// itself.
func newFleetIn(t *testing.T, c cell, urls string, lease time.Duration, replicas int, backend simulator.Options) *fleet {
	t.Helper()
	own := urls == ""
	if own {
		urls = natstest.Start(t).ClientURL()
	}
	f := &fleet{
		t: t, names: c.names(), lease: lease, attempts: 5,
		records: map[string]lifecycle.Record{}, changed: make(chan struct{}),
	}
	f.backend = simulator.New(backend)
	if err := f.backend.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.backend.Stop)
	f.nc = natstest.ConnectURL(t, urls, append(c.operator(), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))...)
	var err error
	if f.js, err = jetstream.New(f.nc); err != nil {
		t.Fatal(err)
	}
	settings := fleetSettings(lease, replicas)
	settings.Placement = c.placement()
	if own { // which nobody stops: what a busy disk delays is not what the test is about
		settings.Storage = jetstream.MemoryStorage
	}
	createStreams(t.Context(), t, f.js, f.names, settings)
	f.env = map[string]string{
		"NATS_URL": urls, "AVATAR_NATS_REPLICAS": fmt.Sprint(replicas),
		"AVATAR_APP_ID": "app", "AVATAR_APP_API_KEY": apiKey,
		"AVATAR_BACKEND_CONSOLE_URL": f.backend.ConsoleURL(), "AVATAR_BACKEND_INGRESS_URL": f.backend.IngressURL(),
		"AVATAR_BACKEND_STALL_TIMEOUT": "5s", "AVATAR_BACKEND_HANDSHAKE_TIMEOUT": "5s", "AVATAR_BACKEND_CONNECT_TIMEOUT": "5s",
		"AVATAR_RETRY_INITIAL": "50ms", "AVATAR_RETRY_MAX": "500ms", "AVATAR_RETRY_MAX_ATTEMPTS": fmt.Sprint(f.attempts),
		"AVATAR_LEASE_ACK_WAIT": lease.String(), "AVATAR_ADMIN_ADDR": "off", "AVATAR_LOG_FORMAT": "json",
	}
	maps.Copy(f.env, c.env())
	f.watch()
	f.background(f.measureDelays)
	if own { // that does not answer only where the machine is too busy
		f.measureOutages(natsAway, f.answers(f.js))
	}
	return f
}

// createStreams makes what workers need, with a bucket of records that keeps their
// history. The nodes of a cluster that has just formed may take a moment to know
// of each other.
func createStreams(ctx context.Context, t *testing.T, js jetstream.JetStream, names topology.Names, settings topology.Settings) {
	t.Helper()
	err := insist(func() error {
		if err := invariant.CreateState(ctx, js, names, settings); err != nil {
			return err
		}
		_, _, err := topology.Ensure(ctx, js, names, settings)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fleetSettings are small enough for many servers on one disk.
func fleetSettings(lease time.Duration, replicas int) topology.Settings {
	settings := topology.DefaultSettings()
	settings.AckWait, settings.Replicas = lease, replicas
	settings.JobsMaxBytes = 256 << 20
	for _, limit := range []*topology.Limit{&settings.Events, &settings.DLQ, &settings.Usage, &settings.Totals, &settings.Frames, &settings.Audio, &settings.AudioFiles, &settings.Recordings} {
		limit.MaxBytes = 128 << 20
	}
	return settings
}

// watch keeps the records as they are now, until the test ends.
func (f *fleet) watch() {
	kv, err := f.js.KeyValue(f.t.Context(), f.names.StateBucket())
	if err != nil {
		f.t.Fatal(err)
	}
	watch, err := kv.WatchAll(context.Background()) // stopped below: t.Context() ends before the clean-ups
	if err != nil {
		f.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for entry := range watch.Updates() {
			var r lifecycle.Record
			if entry == nil || strings.Contains(entry.Key(), ".") || json.Unmarshal(entry.Value(), &r) != nil {
				continue // the end of what was there, a lease, or nothing that Check would accept
			}
			f.mu.Lock()
			f.records[r.JobID] = r
			close(f.changed)
			f.changed = make(chan struct{})
			f.mu.Unlock()
		}
	}()
	f.t.Cleanup(func() {
		if err := watch.Stop(); err != nil {
			f.t.Logf("stop watching records: %v", err) // NATS may be gone by then
		}
		<-done
	})
}

// worker starts a worker process and returns when it takes jobs.
func (f *fleet) worker(name string, env ...string) *process {
	f.t.Helper()
	p := f.launch(name, env...)
	p.waitReady()
	return p
}

// launch starts a worker process.
func (f *fleet) launch(name string, env ...string) *process {
	f.t.Helper()
	return f.launchBuild(workerBinary(f.t), name, env...)
}

// launchBuild starts a worker process of some build.
func (f *fleet) launchBuild(path, name string, env ...string) *process {
	f.t.Helper()
	all := maps.Clone(f.env)
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		all[k] = v
	}
	p := startProcess(f.t, path, name, all)
	p.draining = func() {
		now := time.Now()
		f.fault(invariant.Fault{Kind: "drain", WorkerID: p.workerID(), Start: now, End: now})
	}
	return p
}

// kill kills a worker and notes it.
func (f *fleet) kill(p *process) {
	p.signal(syscall.SIGKILL)
	<-p.ended
	f.died(p)
}

// terminate ends a worker that drains by another SIGTERM, and notes it.
func (f *fleet) terminate(p *process) {
	f.t.Helper()
	p.signal(syscall.SIGTERM)
	if !p.waitEnd(time.Second) {
		f.t.Errorf("worker %s did not end at once", p.name)
	}
	f.kill(p)
}

// died notes that a worker ended without draining, just now.
func (f *fleet) died(p *process) {
	if p.workerID() == "" {
		return // it had no session yet
	}
	now := time.Now()
	f.fault(invariant.Fault{Kind: "died", WorkerID: p.workerID(), Start: now.Add(-time.Second), End: now})
}

func (f *fleet) fault(fault invariant.Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fault)
}

// silence is a second of speech, as a job has it.
func silence(seconds float64) map[string]any {
	return map[string]any{
		"inline": base64.StdEncoding.EncodeToString(make([]byte, int(seconds*16000)*2)),
		"format": "pcm_s16le", "sample_rate": 16000,
	}
}

// job makes a job of short utterances whose frames are only counted.
func job(id, avatar string, utterances int) map[string]any {
	list := make([]any, utterances)
	for i := range list {
		list[i] = silence(0.1)
	}
	return map[string]any{"id": id, "avatar_id": avatar, "utterances": list, "output": map[string]any{"discard": map[string]any{}}}
}

// withFrames makes a job publish its frames.
func withFrames(job map[string]any) map[string]any {
	job["output"] = map[string]any{"frames": map[string]any{}}
	return job
}

// publish publishes a job and notes that it was accepted.
func (f *fleet) publish(job map[string]any) {
	f.t.Helper()
	if err := f.tryPublish(f.t.Context(), job); err != nil {
		f.t.Fatal(err)
	}
}

// tryPublish publishes a job until it is accepted or ctx ends.
func (f *fleet) tryPublish(ctx context.Context, job map[string]any) error {
	id := job["id"].(string)
	job["extra_params"] = map[string]any{invariant.JobParam: id}
	data, err := json.Marshal(job)
	if err != nil {
		return err
	}
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := f.js.Publish(once, f.names.Jobs("default"), data, jetstream.WithMsgID(id))
		cancel()
		if err == nil {
			f.mu.Lock()
			f.accepted = append(f.accepted, id)
			f.mu.Unlock()
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("job %s was not accepted: %w", id, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// load publishes jobs, one every so often, until all are accepted or ctx ends.
func (f *fleet) load(ctx context.Context, total int, every time.Duration, job func(i int) map[string]any) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range total {
		if err := f.tryPublish(ctx, job(i)); err != nil {
			f.t.Error(err)
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// linger waits where time itself is what the test is about: an outage lasts,
// a fault goes on.
func linger(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// record is a job's record as last seen.
func (f *fleet) record(id string) lifecycle.Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.records[id]
}

// count counts the records that match.
func (f *fleet) count(match func(lifecycle.Record) bool) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.records {
		if match(r) {
			n++
		}
	}
	return n
}

func final(r lifecycle.Record) bool   { return r.State.Final() }
func running(r lifecycle.Record) bool { return r.State == lifecycle.StateRunning }

// await returns when at least n records match.
func (f *fleet) await(what string, n int, match func(lifecycle.Record) bool) {
	f.t.Helper()
	timeout := time.After(natstest.Patience)
	for {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		got := f.count(match)
		if got >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			f.t.Fatalf("%s: %d of %d jobs; %s", what, got, n, f.states())
		}
	}
}

// states counts the records by state.
func (f *fleet) states() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	by := map[lifecycle.State]int{}
	for _, r := range f.records {
		by[r.State]++
	}
	return fmt.Sprintf("%d accepted, records %v", len(f.accepted), by)
}

// failures logs when each attempt failed, and how.
func (f *fleet) failures(seen invariant.Seen) {
	f.t.Helper()
	for _, ev := range seen.Events {
		if ev.Type == event.TypeError {
			f.t.Logf("%s: job %s, session %d: %s", ev.Time.Format(time.StampMilli), ev.JobID, ev.Session, ev.Code)
		}
	}
}

// settle returns when every accepted job has its outcome, the queue is empty
// and the backend has no session open.
func (f *fleet) settle() {
	f.t.Helper()
	f.mu.Lock()
	n := len(f.accepted)
	f.mu.Unlock()
	f.await("outcome", n, final)
	ctx, cancel := context.WithTimeout(f.t.Context(), natstest.Patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		left, err := f.waiting(ctx)
		if err == nil && left == 0 {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.explain()
			f.t.Fatalf("%d jobs still in the queue (%v); %s", left, err, f.states())
		}
	}
	if err := f.backend.WaitOpen(ctx, 0); err != nil {
		f.t.Error(err)
	}
}

func (f *fleet) waiting(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := f.js.Stream(ctx, f.names.JobsStream())
	if err != nil {
		return 0, err
	}
	return s.CachedInfo().State.Msgs, nil
}

// check fails the test for every promise that was broken, and returns what was
// found with what was seen.
func (f *fleet) check() (invariant.Report, invariant.Seen) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 2*time.Minute)
	defer cancel()
	err := insist(func() error { return f.inStep(ctx) })
	if err != nil {
		f.t.Fatal(err)
	}
	var seen invariant.Seen
	err = insist(func() (err error) { // a stream may have no leader again
		seen, err = invariant.Read(ctx, f.js, f.names, f.backend.SessionLog())
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	run := invariant.Run{Accepted: f.accepted, MaxAttempts: f.attempts, Lease: f.lease, Faults: f.faults, Delays: f.delays}
	f.mu.Unlock()
	report := invariant.Check(run, seen)
	for i, v := range report.Violations {
		if i == 20 {
			f.t.Errorf("and %d more", len(report.Violations)-i)
			break
		}
		f.t.Error(v)
	}
	f.checkRecordings(ctx)
	f.t.Log(report)
	return report, seen
}

// inStep returns an error while a replica of what the check reads lacks something:
// the check may read from any of them.
func (f *fleet) inStep(ctx context.Context) error {
	for _, name := range []string{f.names.JobsStream(), "KV_" + f.names.StateBucket(), f.names.EventsStream(), f.names.DLQStream(), f.names.UsageStream(), f.names.TotalsStream()} {
		stream, err := f.js.Stream(ctx, name)
		if err != nil {
			return err
		}
		for _, replica := range stream.CachedInfo().Cluster.Replicas {
			if !replica.Current || replica.Offline || replica.Lag > 0 {
				return fmt.Errorf("stream %s: replica %s is not in step", name, replica.Name)
			}
		}
	}
	return nil
}

// checkRecordings reads the recording of every job that has one, as any client
// does.
func (f *fleet) checkRecordings(ctx context.Context) {
	f.t.Helper()
	f.mu.Lock()
	records := maps.Clone(f.records)
	f.mu.Unlock()
	var store jetstream.ObjectStore
	err := insist(func() (err error) {
		store, err = f.js.ObjectStore(ctx, f.names.RecordingsBucket())
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	for id, r := range records {
		if r.Recording == "" || r.Outcome != lifecycle.StateCompleted {
			continue
		}
		var data []byte
		err := insist(func() (err error) {
			data, err = store.GetBytes(ctx, r.Recording)
			return err
		})
		if err != nil {
			f.t.Errorf("job %s: recording %s: %v", id, r.Recording, err)
			continue
		}
		info, err := output.ReadRecording(bytes.NewReader(data))
		if err != nil || !info.Whole || len(info.Utterances) != r.UtterancesDone {
			f.t.Errorf("job %s: recording %s has %d utterances of %d, whole: %t: %v", id, r.Recording, len(info.Utterances), r.UtterancesDone, info.Whole, err)
			continue
		}
		for i, u := range info.Utterances {
			if u.ReqID != r.Utterances[i].ReqID {
				f.t.Errorf("job %s: utterance %d of recording %s is %s, the record says %s", id, i+1, r.Recording, u.ReqID, r.Utterances[i].ReqID)
			}
		}
	}
}
