// Package fleet publishes a worker's presence and follows the presence of other
// workers: who is there, and what they do. It serves people and hints only; it
// must not decide whether a session may run. It owns the keys of presences in
// AVATAR_FLEET.
package fleet

import (
	"context"
	"encoding/json"
	"maps"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

const (
	// interval is how often a worker publishes its presence, at least.
	interval = 10 * time.Second
	// freshFor is how long a presence counts after it was stored.
	freshFor = 3 * interval
	// expiresAfter is when the server removes the presence of a worker that died.
	expiresAfter = 15 * time.Minute
	// minInterval bounds how often changes are published.
	minInterval = 200 * time.Millisecond
	// removeTimeout bounds the removal of the presence when the worker stops.
	removeTimeout = time.Second
)

// Prefix begins the keys of presences in AVATAR_FLEET.
const Prefix = "worker."

// Presence describes a worker in AVATAR_FLEET.
type Presence struct {
	Worker    string         `json:"worker"`
	WorkerID  string         `json:"worker_id"`
	Version   string         `json:"version,omitempty"`
	StartedAt time.Time      `json:"started_at"`
	At        time.Time      `json:"at"`
	Queues    map[string]int `json:"queues"` // weight by queue
	Slots     int            `json:"slots"`
	Running   int            `json:"running"`        // connected sessions
	Busy      map[string]int `json:"busy,omitempty"` // jobs that the worker holds, by queue
	Apps      map[string]int `json:"apps,omitempty"` // connected sessions, by app
	Draining  bool           `json:"draining,omitempty"`
	// AudioConvert and AudioMaxBytes are for publishers, what speech the worker
	// accepts: audio.convert and audio.max_bytes.
	AudioConvert  bool  `json:"audio_convert,omitempty"`
	AudioMaxBytes int64 `json:"audio_max_bytes,omitempty"`
	// NotReady is why the worker takes no jobs, or not all.
	NotReady string `json:"not_ready,omitempty"`
	// Keys are the apps whose API key the backend has not refused from this worker.
	Keys []string `json:"keys,omitempty"`
	// RefusedKeys are the apps whose API key the backend refuses from this
	// worker.
	RefusedKeys []string `json:"refused_keys,omitempty"`
}

// Fresh reports whether a presence stored at that time still counts at now. Both
// are times of the server's clock.
func Fresh(stored, now time.Time) bool { return now.Sub(stored) < freshFor }

// Options configure a Fleet. All fields are required.
type Options struct {
	Store *kv.Store // AVATAR_FLEET
	Self  Presence  // the constant fields and the initial values
	// Fill completes a presence before it is published.
	Fill func(*Presence)
	// Now is the time by the server's clock.
	Now func() time.Time
	Log zerolog.Logger
}

// Fleet is one worker's view of all workers.
type Fleet struct {
	o       Options
	changed chan struct{}

	mu       sync.Mutex
	self     Presence
	revision uint64
	others   map[string]peer // by key
}

// peer is the presence of another worker.
type peer struct {
	Presence
	stored time.Time // by the server's clock
}

// New returns a Fleet that has published nothing yet.
func New(o Options) *Fleet {
	o.Self.Apps = make(map[string]int)
	return &Fleet{o: o, self: o.Self, changed: make(chan struct{}, 1), others: make(map[string]peer)}
}

// Run publishes and follows until ctx ends, then removes this worker's presence.
func (f *Fleet) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { f.watch(ctx) })
	f.publish(ctx)
	wg.Wait()
	f.remove(context.WithoutCancel(ctx))
}

// Rename publishes a new presence under another worker ID and removes the old
// one.
func (f *Fleet) Rename(ctx context.Context, workerID string) {
	if f.WorkerID() != workerID {
		f.remove(ctx)
	}
	f.mu.Lock()
	f.self.WorkerID, f.revision = workerID, 0
	f.mu.Unlock()
	f.Publish()
}

// Connected counts one connected session of the app until the returned function
// is called.
func (f *Fleet) Connected(app string) (closed func()) {
	f.count(app, 1)
	return func() { f.count(app, -1) }
}

func (f *Fleet) count(app string, n int) {
	f.mu.Lock()
	before := f.self.Apps[app]
	if f.self.Apps[app] += n; f.self.Apps[app] == 0 {
		delete(f.self.Apps, app)
	}
	f.self.Running += n
	f.mu.Unlock()
	if before == 0 || before+n == 0 { // a change that other workers depend on
		f.Publish()
	}
}

// Drain publishes that the worker drains.
func (f *Fleet) Drain() {
	f.mu.Lock()
	f.self.Draining = true
	f.mu.Unlock()
	f.Publish()
}

// Publish causes the presence to be published soon.
func (f *Fleet) Publish() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// WorkerID returns the ID that the presence has now.
func (f *Fleet) WorkerID() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.self.WorkerID
}

// Self returns this worker's presence as it is now.
func (f *Fleet) Self() Presence {
	f.mu.Lock()
	p := f.self
	p.Apps = maps.Clone(f.self.Apps)
	f.mu.Unlock()
	p.At = f.o.Now().UTC()
	f.o.Fill(&p)
	return p
}

// each calls add with the presence of every other live worker.
func (f *Fleet) each(add func(Presence)) {
	now := f.o.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, other := range f.others {
		if Fresh(other.stored, now) {
			add(other.Presence)
		}
	}
}

// HasOpenSession reports whether this worker or another one has a connected session
// of the app, as far as is known.
func (f *Fleet) HasOpenSession(app string) bool {
	f.mu.Lock()
	here := f.self.Apps[app]
	f.mu.Unlock()
	open := here > 0
	f.each(func(p Presence) { open = open || p.Apps[app] > 0 })
	return open
}

// InHand returns how many of the queue's jobs the other workers held when they
// last published.
func (f *Fleet) InHand(queue string) int {
	n := 0
	f.each(func(p Presence) { n += p.Busy[queue] })
	return n
}

// Others lists the other live workers.
func (f *Fleet) Others() []Presence {
	var list []Presence
	f.each(func(p Presence) { list = append(list, p) })
	return list
}

func (f *Fleet) publish(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.changed:
		case <-timer.C:
		}
		wait := interval
		if err := f.put(ctx); err != nil && ctx.Err() == nil {
			wait = interval / 4
			f.o.Log.Debug().Err(err).Msg("could not publish this worker's presence; trying again")
		}
		if retry.Pause(ctx, minInterval, nil) != nil {
			return
		}
		timer.Reset(wait)
	}
}

// put writes the presence. If it was removed, alone or with its
// bucket, it is written again.
func (f *Fleet) put(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, interval)
	defer cancel()
	p := f.Self()
	key := Key(p.WorkerID)
	f.mu.Lock()
	revision := f.revision
	f.mu.Unlock()
	next, err := f.o.Store.PutTTL(ctx, key, p, revision, expiresAfter)
	if err != nil {
		var stored Presence
		if revision, readErr := f.o.Store.Get(ctx, key, &stored); readErr == nil {
			next, err = f.o.Store.PutTTL(ctx, key, p, revision, expiresAfter)
		}
	}
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.self.WorkerID == p.WorkerID {
		f.revision = next
	}
	return nil
}

func (f *Fleet) remove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	f.mu.Lock()
	key := Key(f.self.WorkerID)
	f.mu.Unlock()
	// Read it first: the last write may have landed without a reply.
	var stored Presence
	revision, err := f.o.Store.Get(ctx, key, &stored)
	if err == nil && revision != 0 {
		err = f.o.Store.Remove(ctx, key, revision)
	}
	if err != nil {
		f.o.Log.Debug().Err(err).Msg("could not remove this worker's presence; it expires by itself")
	}
}

// watch follows the bucket. It starts a new watch if one ends, for example
// because the bucket was made again.
func (f *Fleet) watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := f.follow(ctx); err != nil && ctx.Err() == nil {
			f.o.Log.Debug().Err(err).Msg("could not watch the other workers' presence; trying again")
		}
		if retry.Pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

func (f *Fleet) follow(ctx context.Context) error {
	watch, err := f.o.Store.Watch(ctx, Prefix+">")
	if err != nil {
		return err
	}
	defer watch.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case entry, open := <-watch.Updates():
			if !open {
				return nil
			}
			if entry != nil {
				f.update(entry)
			}
		}
	}
}

func (f *Fleet) update(entry jetstream.KeyValueEntry) {
	other := peer{stored: entry.Created()}
	gone := entry.Operation() != jetstream.KeyValuePut || json.Unmarshal(entry.Value(), &other.Presence) != nil
	f.mu.Lock()
	defer f.mu.Unlock()
	if gone || entry.Key() == Key(f.self.WorkerID) {
		delete(f.others, entry.Key())
		return
	}
	f.others[entry.Key()] = other
}

// Key is the key of a worker's presence.
func Key(workerID string) string { return Prefix + topology.Token(workerID) }
