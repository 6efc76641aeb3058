// Package limit keeps the fleet within its session limits: app.max_sessions, and
// those that limits: in the configuration sets by what a job says of itself.
// Each session that a limit allows is one key in the bucket of job records, which
// names the worker and the job that hold it. A key is free when it is absent, or
// when that worker's lease is gone.
//
// It owns these keys and knows nothing else of jobs or workers.
package limit

import (
	"context"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// ErrBusy means that enough jobs wait here already: this one is better off in the
// queue.
var ErrBusy = errors.New("all sessions that a limit allows are taken")

// rest is how long a key stays taken after its session was closed: the backend
// may count a session a moment longer than it takes to close it.
const rest = 50 * time.Millisecond

// Prefix begins the keys of session limits. No job id has a dot.
const Prefix = "limit."

// Rule limits the sessions of all jobs that have the same value under Key.
type Rule struct {
	Key string // app_id, avatar_id, region, queue, or label.<name>
	Max int
}

// Job is what a limit looks at.
type Job struct {
	ID, App, Avatar, Region, Queue string
	Labels                         map[string]string
}

// Options are what Limits are made of. All are required but where they say
// otherwise.
type Options struct {
	Store  *kv.Store          // the bucket of job records
	Bucket jetstream.KeyValue // the same, for watching
	Worker func() string      // the id of the worker's lease; "" while it has none
	// Stands reports whether the lease of the worker with this id stands.
	Stands func(ctx context.Context, workerID string) (bool, error)
	// Look is how often waiting jobs look whether the leases of those that hold
	// the keys stand.
	Look  time.Duration
	Keep  time.Duration  // how often a held key is written again; 0: the bucket keeps it
	Apps  map[string]int // max_sessions by app; may be nil
	Rules []Rule         // may be nil
	// Room is how many jobs may wait here at a time; half of it is for one limit.
	Room int
	Log  zerolog.Logger
}

// Limits is one worker's view of the keys, kept current by a watch.
type Limits struct {
	o       Options
	wg      sync.WaitGroup
	life    context.Context // of the writes that give keys back
	end     context.CancelFunc
	writing sync.Mutex // held while a key held here is written again or removed

	mu     sync.Mutex
	pools  map[string]*pool // by limit
	ours   map[place]holder // those held here
	waits  int              // jobs that wait here
	listed bool             // the watch has listed what there is
}

// pool is the keys of one limit.
type pool struct {
	holders map[int]holder // by number; one without a worker is free
	busy    int            // those with a worker
	waiting int            // jobs that wait here
	looked  time.Time      // when the holders' leases were last looked at
	changed chan struct{}  // closed and replaced when a key becomes free
}

// place is one key.
type place struct {
	limit string
	n     int
}

func (p place) key() string { return Prefix + p.limit + "." + strconv.Itoa(p.n) }

func placeOf(key string) (p place, ok bool) {
	rest, ok := strings.CutPrefix(key, Prefix)
	i := strings.LastIndexByte(rest, '.')
	if !ok || i < 0 {
		return place{}, false
	}
	n, err := strconv.Atoi(rest[i+1:])
	return place{rest[:i], n}, err == nil
}

// holder is the value of a key.
type holder struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`

	revision uint64
}

// New returns Limits that know of no key yet; Run keeps them current.
func New(o Options) *Limits {
	l := &Limits{o: o, pools: make(map[string]*pool), ours: make(map[place]holder)}
	l.life, l.end = context.WithCancel(context.Background())
	return l
}

// bound is one limit that a job is under.
type bound struct {
	name string // of the limit: <key>/<value>
	max  int
}

// Names lists the limits that the job is under.
func (l *Limits) Names(job Job) []string {
	var names []string
	for _, b := range l.bounds(job) {
		names = append(names, b.name)
	}
	return names
}

// bounds lists the limits that the job is under, in an order that all workers
// share.
func (l *Limits) bounds(job Job) []bound {
	var list []bound
	add := func(key, value string, most int) {
		if most <= 0 || value == "" {
			return
		}
		name := strings.ReplaceAll(key, ".", "/") + "/" + topology.Token(value)
		for i := range list {
			if list[i].name == name {
				list[i].max = min(list[i].max, most)
				return
			}
		}
		list = append(list, bound{name, most})
	}
	add("app_id", job.App, l.o.Apps[job.App])
	for _, rule := range l.o.Rules {
		add(rule.Key, job.value(rule.Key), rule.Max)
	}
	slices.SortFunc(list, func(a, b bound) int { return strings.Compare(a.name, b.name) })
	return list
}

func (j Job) value(key string) string {
	switch key {
	case "app_id":
		return j.App
	case "avatar_id":
		return j.Avatar
	case "region":
		return j.Region
	case "queue":
		return j.Queue
	default:
		return j.Labels[strings.TrimPrefix(key, "label.")]
	}
}

// Acquire waits for one key of each limit that the job is under, as long as
// waiting stands. release gives them back; call it only after the session is
// closed. ErrBusy means that enough jobs wait here already. A job under no limit
// waits for nothing.
func (l *Limits) Acquire(waiting context.Context, job Job) (release func(), err error) {
	bounds := l.bounds(job)
	if len(bounds) == 0 {
		return func() {}, nil
	}
	if release, _, _ = l.try(waiting, bounds, job); release != nil {
		return release, nil
	}
	if !l.enter(bounds) {
		return nil, ErrBusy
	}
	defer l.leave(bounds)
	timer := time.NewTimer(l.o.Look)
	defer timer.Stop()
	for {
		release, full, changed := l.try(waiting, bounds, job)
		if release != nil {
			return release, nil
		}
		select {
		case <-waiting.Done():
			return nil, context.Cause(waiting)
		case <-changed:
		case <-timer.C:
			l.dropLost(waiting, full.name)
			timer.Reset(l.o.Look)
		}
	}
}

// try takes one key of each limit without waiting. If it can't it returns the
// limit that is full, and a channel that is closed when that changes.
func (l *Limits) try(ctx context.Context, bounds []bound, job Job) (release func(), full bound, changed <-chan struct{}) {
	held := make([]place, 0, len(bounds))
	for _, b := range bounds {
		// Before the look, so that a change during it is seen after.
		changed = l.change(b.name)
		p, ok := l.take(ctx, b, job)
		if !ok {
			// Not kept while waiting for the other: others could use it.
			l.give(held, 0)
			return nil, b, changed
		}
		held = append(held, p)
	}
	return func() { l.give(held, rest) }, bound{}, nil
}

// take makes a free key of the limit this worker's; false: none is free.
func (l *Limits) take(ctx context.Context, b bound, job Job) (place, bool) {
	worker := l.o.Worker()
	if worker == "" {
		return place{}, false
	}
	for range b.max {
		h := holder{WorkerID: worker, JobID: job.ID}
		p, before, ok := l.reserve(b, h)
		if !ok {
			return place{}, false
		}
		revision, err := l.o.Store.Put(ctx, p.key(), h, before.revision)
		if err == nil {
			h.revision = revision
			l.own(p, h)
			return p, true
		}
		l.set(p, before)
		if !errors.Is(err, kv.ErrConflict) {
			return place{}, false
		}
		l.refresh(ctx, p)
	}
	return place{}, false
}

// reserve picks a free key, so that no other job of this worker tries the same.
// before is what it held until now: a worker whose lease is gone, or nothing.
func (l *Limits) reserve(b bound, h holder) (p place, before holder, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(b.name)
	if !l.listed || keys.busy >= b.max {
		return place{}, holder{}, false
	}
	first := rand.IntN(b.max) // so that workers seldom try the same one
	for i := range b.max {
		n := (first+i)%b.max + 1
		if before = keys.holders[n]; before.WorkerID == "" {
			h.revision = before.revision
			keys.set(n, h)
			return place{b.name, n}, before, true
		}
	}
	return place{}, holder{}, false
}

// refresh reads a key that turned out to be another's.
func (l *Limits) refresh(ctx context.Context, p place) {
	var h holder
	if revision, err := l.o.Store.Get(ctx, p.key(), &h); err == nil && revision != 0 {
		h.revision = revision
		l.learn(p, h)
	}
}

// give releases keys, after a while in which they rest.
func (l *Limits) give(held []place, after time.Duration) {
	if len(held) == 0 {
		return
	}
	l.wg.Go(func() {
		if after > 0 && retry.Pause(l.life, after, nil) != nil {
			return
		}
		for _, p := range held {
			l.remove(p)
		}
	})
}

func (l *Limits) remove(p place) {
	l.writing.Lock()
	l.mu.Lock()
	h := l.ours[p]
	delete(l.ours, p)
	l.mu.Unlock()
	l.writing.Unlock()
	gone := func(err error) bool { return errors.Is(err, kv.ErrConflict) }
	err := retry.Until(l.life, retry.Backoff{Initial: kv.RetryPause, Max: time.Second}, gone,
		func() error { return l.o.Store.Remove(l.life, p.key(), h.revision) })
	if err != nil && !gone(err) {
		l.o.Log.Warn().Err(err).Str("key", p.key()).Msg("a session limit's key could not be removed; it is free once this worker's lease ends")
		return
	}
	l.forget(p, h.revision)
}

// enter counts one more job that waits here. Half of the room is for one limit,
// so that jobs under another one find some.
func (l *Limits) enter(bounds []bound) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waits >= max(1, l.o.Room) {
		return false
	}
	for _, b := range bounds {
		if keys := l.pools[b.name]; keys != nil && keys.waiting >= max(1, min(b.max, l.o.Room/2)) {
			return false
		}
	}
	l.waits++
	for _, b := range bounds {
		l.pool(b.name).waiting++
	}
	return true
}

func (l *Limits) leave(bounds []bound) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waits--
	for _, b := range bounds {
		l.pool(b.name).waiting--
		l.tidy(b.name)
	}
}

// dropLost frees the limit's keys whose holders' leases are gone.
func (l *Limits) dropLost(ctx context.Context, limit string) {
	stands := make(map[string]bool)
	for n, h := range l.others(limit) {
		alive, asked := stands[h.WorkerID]
		if !asked {
			var err error
			if alive, err = l.o.Stands(ctx, h.WorkerID); err != nil {
				return
			}
			stands[h.WorkerID] = alive
		}
		if !alive {
			l.drop(place{limit, n}, h.revision)
		}
	}
}

// others lists the limit's keys that are not held here; none if another job has
// just looked at them.
func (l *Limits) others(limit string) map[int]holder {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(limit)
	if time.Since(keys.looked) < l.o.Look/2 {
		return nil
	}
	keys.looked = time.Now()
	list := make(map[int]holder, len(keys.holders))
	for n, h := range keys.holders {
		if _, ours := l.ours[place{limit, n}]; !ours && h.WorkerID != "" {
			list[n] = h
		}
	}
	return list
}

// drop marks the key as free at this revision: a job that takes it replaces that.
func (l *Limits) drop(p place, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(p.limit)
	if keys.holders[p.n].revision == revision {
		keys.set(p.n, holder{revision: revision})
		keys.notify()
	}
}

// own takes in that this worker holds the key.
func (l *Limits) own(p place, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pool(p.limit).set(p.n, h)
	l.ours[p] = h
}

func (l *Limits) set(p place, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pool(p.limit).set(p.n, h)
}

// learn takes in what another worker wrote.
func (l *Limits) learn(p place, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if keys := l.pool(p.limit); h.revision > keys.holders[p.n].revision {
		keys.set(p.n, h)
	}
}

// forget takes in that a key was removed, by a write after revision.
func (l *Limits) forget(p place, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(p.limit)
	if h, ok := keys.holders[p.n]; ok && h.revision <= revision {
		keys.set(p.n, holder{})
		keys.notify()
	}
	l.tidy(p.limit)
}

// pool returns the keys of a limit. l.mu is held, as in all that follows.
func (l *Limits) pool(limit string) *pool {
	keys := l.pools[limit]
	if keys == nil {
		keys = &pool{holders: make(map[int]holder), changed: make(chan struct{})}
		l.pools[limit] = keys
	}
	return keys
}

// tidy forgets a limit that nothing holds and nothing waits for: there may be one
// for each room that ever was.
func (l *Limits) tidy(limit string) {
	if keys := l.pools[limit]; keys != nil && len(keys.holders) == 0 && keys.waiting == 0 {
		delete(l.pools, limit)
	}
}

// set says what holds the key; the zero holder means that the key is absent.
func (k *pool) set(n int, h holder) {
	if k.holders[n].WorkerID != "" {
		k.busy--
	}
	if h.WorkerID != "" {
		k.busy++
	}
	if h == (holder{}) {
		delete(k.holders, n)
		return
	}
	k.holders[n] = h
}

func (k *pool) notify() {
	close(k.changed)
	k.changed = make(chan struct{})
}

func (l *Limits) change(limit string) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pool(limit).changed
}

// endTimeout bounds the writes that give keys back when the worker stops.
const endTimeout = 5 * time.Second

// Run follows the keys until ctx ends, and waits until those given back are
// removed. A worker without limits follows nothing.
func (l *Limits) Run(ctx context.Context) {
	if len(l.o.Apps) > 0 || len(l.o.Rules) > 0 {
		l.wg.Go(func() { l.keep(ctx) })
		l.watch(ctx)
	}
	stop := time.AfterFunc(endTimeout, l.end)
	l.wg.Wait()
	stop.Stop()
	l.end()
}

func (l *Limits) watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := l.follow(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Warn().Err(err).Msg("could not follow the session limits; trying again")
		}
		if retry.Pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

func (l *Limits) follow(ctx context.Context) error {
	watcher, err := l.o.Bucket.Watch(ctx, Prefix+">")
	if err != nil {
		return err
	}
	defer watcher.Stop() //nolint:errcheck // the watch has ended, or the connection
	found := make(map[place]bool)
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, open := <-watcher.Updates():
			if !open {
				return nil
			}
			if e == nil {
				l.listedAll(found)
				found = nil
				continue
			}
			p, ok := placeOf(e.Key())
			if !ok {
				continue
			}
			h := holder{revision: e.Revision()}
			if e.Operation() != jetstream.KeyValuePut || json.Unmarshal(e.Value(), &h) != nil {
				l.forget(p, e.Revision())
				continue
			}
			l.learn(p, h)
			if found != nil {
				found[p] = true
			}
		}
	}
}

// listedAll takes in that the watch has listed all keys: those that it did not
// list were removed while nothing watched.
func (l *Limits) listedAll(found map[place]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listed = true
	for limit, keys := range l.pools {
		for n, h := range keys.holders {
			p := place{limit, n}
			if _, ours := l.ours[p]; !ours && !found[p] && h.revision != 0 {
				keys.set(n, holder{})
			}
		}
		keys.notify()
		l.tidy(limit)
	}
}

// keep writes held keys again before their bucket forgets them: a session may
// live longer than records are kept.
func (l *Limits) keep(ctx context.Context) {
	if l.o.Keep == 0 {
		return
	}
	for retry.Pause(ctx, l.o.Keep, nil) == nil {
		l.mu.Lock()
		held := slices.Collect(maps.Keys(l.ours))
		l.mu.Unlock()
		for _, p := range held {
			l.rewrite(ctx, p)
		}
	}
}

func (l *Limits) rewrite(ctx context.Context, p place) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	h, ours := l.ours[p]
	l.mu.Unlock()
	if !ours {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if revision, err := l.o.Store.Put(ctx, p.key(), h, h.revision); err == nil {
		h.revision = revision
		l.own(p, h)
	}
}
