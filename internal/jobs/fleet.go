package jobs

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

const (
	// presenceEvery is how often a worker says that it is there, at least; with
	// short leases more often.
	presenceEvery = 10 * time.Second
	// presenceFresh is how long what a worker said is believed.
	presenceFresh = 3 * presenceEvery
	// presencePause bounds how often changes are told.
	presencePause = 200 * time.Millisecond
)

// Presence is what a worker tells of itself in AVATAR_FLEET.
type Presence struct {
	Worker    string         `json:"worker"`
	WorkerID  string         `json:"worker_id"`
	Version   string         `json:"version,omitempty"`
	StartedAt time.Time      `json:"started_at"`
	At        time.Time      `json:"at"`
	Queues    map[string]int `json:"queues"` // weight by queue
	Slots     int            `json:"slots"`
	Running   int            `json:"running"`        // sessions that live
	Busy      map[string]int `json:"busy,omitempty"` // jobs in hand, by queue
	Apps      map[string]int `json:"apps,omitempty"` // sessions that live, by app
	Draining  bool           `json:"draining,omitempty"`

	// What it takes as speech, for publishers: audio.convert and audio.max_bytes.
	// No bytes: it is of a version that does not say.
	AudioConvert  bool  `json:"audio_convert,omitempty"`
	AudioMaxBytes int64 `json:"audio_max_bytes,omitempty"`
}

// Fresh tells whether the worker was there a moment ago, by its own clock and
// that of now; workers, whose clocks may differ, go by when its news came.
func (p Presence) Fresh(now time.Time) bool { return now.Sub(p.At) < presenceFresh }

// fleet is what workers tell each other: it publishes this worker's presence
// and watches the others' and the circuits.
type fleet struct {
	kv       jetstream.KeyValue
	store    *Store
	circuits *Circuits
	now      func() time.Time
	log      zerolog.Logger
	nudge    chan struct{}
	busy     func() map[string]int // jobs in hand, by queue
	heard    func(since time.Time) // told when most of the cluster has heard this worker
	window   time.Duration         // a lease
	begun    time.Time             // when it was made
	synced   chan struct{}         // closed when it knows who was there at the start

	mu     sync.Mutex
	self   Presence
	others map[string]peer // by key
	listed bool            // all that was in the bucket at the start is in others
	clock  serverClock
}

func newFleet(kv jetstream.KeyValue, store *Store, circuits *Circuits, self Presence, window time.Duration,
	now func() time.Time, log zerolog.Logger,
) *fleet {
	self.Apps = make(map[string]int)
	return &fleet{
		kv: kv, store: store, circuits: circuits, self: self, window: window, now: now, log: log,
		nudge: make(chan struct{}, 1), begun: time.Now(), synced: make(chan struct{}), others: make(map[string]peer),
	}
}

// connected counts a session of the app that lives, until the returned
// function is called.
func (f *fleet) connected(app string) (closed func()) {
	f.count(app, 1)
	return func() { f.count(app, -1) }
}

func (f *fleet) count(app string, n int) {
	f.mu.Lock()
	before := f.self.Apps[app]
	if f.self.Apps[app] += n; f.self.Apps[app] == 0 {
		delete(f.self.Apps, app)
	}
	f.self.Running += n
	f.mu.Unlock()
	if before == 0 || before+n == 0 { // what others look at has changed
		f.tell()
	}
}

func (f *fleet) drain() {
	f.mu.Lock()
	f.self.Draining = true
	f.mu.Unlock()
	f.tell()
}

func (f *fleet) tell() {
	select {
	case f.nudge <- struct{}{}:
	default:
	}
}

// lives tells whether a session of the app is known to live anywhere.
func (f *fleet) lives(app string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.self.Apps[app] > 0 {
		return true
	}
	for _, other := range f.others {
		if other.Apps[app] > 0 && other.fresh() {
			return true
		}
	}
	return false
}

// inHand is the number of the queue's jobs that the other workers had in hand
// when they last told.
func (f *fleet) inHand(queue string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, other := range f.others {
		if other.fresh() {
			n += other.Busy[queue]
		}
	}
	return n
}

// run publishes presence and watches until ctx ends; it then takes the
// worker's presence back.
func (f *fleet) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { f.watch(ctx) })
	f.publish(ctx)
	wg.Wait()
	f.leave(context.WithoutCancel(ctx))
}

func (f *fleet) publish(ctx context.Context) {
	every := min(presenceEvery, f.window/4)
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		wait := every
		if !f.put(ctx) { // leases depend on it
			wait = min(every, f.window/10)
		}
		if pause(ctx, min(presencePause, wait), nil) != nil {
			return
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-f.nudge:
		case <-timer.C:
			if err := f.circuits.Renew(ctx); err != nil && ctx.Err() == nil {
				f.log.Warn().Err(err).Msg("could not renew the probe of a circuit")
			}
		}
	}
}

// put tells the fleet of this worker; false: nobody is known to have heard.
func (f *fleet) put(ctx context.Context) bool {
	busy := f.busy()
	f.mu.Lock()
	f.self.At, f.self.Busy = f.now(), busy
	data, err := json.Marshal(f.self)
	f.mu.Unlock()
	sent := time.Now()
	if err == nil {
		putCtx, cancel := context.WithTimeout(ctx, f.store.timeout)
		_, err = f.kv.Put(putCtx, presenceKey(f.self.WorkerID), data)
		cancel()
	}
	if err != nil && ctx.Err() == nil {
		f.log.Debug().Err(err).Msg("could not tell the fleet of this worker; it will be told again")
	}
	heard := err == nil || f.deleted(ctx, err)
	if heard {
		f.heard(sent)
	}
	return heard
}

// deleted tells whether the bucket is no more there, although most of the
// cluster is: nobody else can say so. Sessions do not end because of that.
func (f *fleet) deleted(ctx context.Context, err error) bool {
	if !errors.Is(err, jetstream.ErrNoStreamResponse) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, f.store.timeout)
	defer cancel()
	_, err = f.kv.Status(ctx)
	return errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrStreamNotFound)
}

func (f *fleet) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if err := f.strike(ctx, presenceKey(f.self.WorkerID)); err != nil {
		f.log.Debug().Err(err).Msg("could not take this worker out of the fleet's list; it will age out")
	}
}

// watch follows the bucket. A watch that ends is started again: the bucket may
// have been away.
func (f *fleet) watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := f.follow(ctx); err != nil && ctx.Err() == nil {
			f.log.Warn().Err(err).Msg("could not watch the fleet's bucket; trying again")
		}
		if pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

func (f *fleet) follow(ctx context.Context) error {
	watcher, err := f.kv.WatchFiltered(ctx, []string{"circuit.>", "worker.>"})
	if err != nil {
		return err
	}
	news := false // what was there before is no news
	for {
		select {
		case <-ctx.Done():
			return watcher.Stop()
		case entry, open := <-watcher.Updates():
			if !open {
				return nil
			}
			if entry == nil {
				news = true
				f.sync(func() { f.listed = true })
				continue
			}
			f.learn(ctx, entry, news)
		}
	}
}

func (f *fleet) learn(ctx context.Context, entry jetstream.KeyValueEntry, news bool) {
	key := entry.Key()
	switch {
	case strings.HasPrefix(key, "circuit."):
		var c Circuit
		if err := json.Unmarshal(entry.Value(), &c); err == nil {
			c.revision = entry.Revision()
			f.circuits.Learn(key, c, news)
		}
	case key == presenceKey(f.self.WorkerID):
		f.sync(func() { f.clock = serverClock{stored: entry.Created(), seen: time.Now()} })
		f.sweep(ctx)
	default:
		f.learnPresence(key, entry, news)
	}
}

func presenceKey(workerID string) string { return "worker." + keyToken(workerID) }

// keyToken makes one token of a key out of any text: as it is where that is
// possible, else encoded.
func keyToken(s string) string {
	for _, r := range s {
		plain := r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !plain {
			return "=" + base64.RawURLEncoding.EncodeToString([]byte(s))
		}
	}
	if s == "" {
		return "="
	}
	return s
}
