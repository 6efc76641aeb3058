// Package limit enforces the fleet's session limits: app.max_sessions, and the
// rules under limits: in the configuration, which count sessions by a field of
// the job. Each session that a limit allows is one key in the bucket of job
// records; its value names the worker and the job that hold it. A key is free if
// it is absent or if that worker's lease is gone.
//
// It owns these keys. It must not know anything else about jobs or workers.
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
	"avatarworker/internal/failpoint"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// ErrBusy means that enough jobs wait for a limit already; the caller should
// return the job to the queue.
var ErrBusy = errors.New("all sessions that a limit allows are taken")

// cooldown is how long a key stays taken after its session was closed: the
// backend may count a session slightly longer than it takes to close it.
const cooldown = 50 * time.Millisecond

// Prefix begins the keys of session limits. No job id has a dot.
const Prefix = "limit."

// Options configure Limits. All fields are required, except where stated
// otherwise.
type Options struct {
	Store  *kv.Store          // the bucket of job records
	Bucket jetstream.KeyValue // the same, for watching
	Worker func() string      // the id of the worker's lease; "" while it has none
	// Stands reports whether the lease of the worker with this id stands.
	Stands func(ctx context.Context, workerID string) (bool, error)
	// CheckInterval is how often waiting jobs check whether the leases of the
	// keys' holders stand.
	CheckInterval   time.Duration
	RewriteInterval time.Duration  // how often a held key is written again; 0: the bucket has no expiry
	Apps            map[string]int // max_sessions by app; may be nil
	Rules           []Rule         // may be nil
	// MaxWaiting is how many jobs may wait at a time; at most half of it for one
	// limit.
	MaxWaiting int
	Log        zerolog.Logger
}

// Limits is one worker's view of the keys, kept current by a watch.
type Limits struct {
	o             Options
	wg            sync.WaitGroup
	releaseCtx    context.Context // of the writes that free keys
	stopReleasing context.CancelFunc
	writing       sync.Mutex // held while a key of this worker is written again or removed

	mu      sync.Mutex
	pools   map[string]*pool    // by limit
	held    map[limitKey]holder // keys that this worker holds
	waiting int                 // waiting jobs
	listed  bool                // the watch has listed all keys
}

// pool is the keys of one limit.
type pool struct {
	holders   map[int]holder // by number; a key without a worker is free
	busy      int            // keys with a worker
	waiting   int            // waiting jobs
	checkedAt time.Time      // when the holders' leases were last checked
	changed   chan struct{}  // closed and replaced when a key becomes free
}

// limitKey is one key of a limit.
type limitKey struct {
	limit string
	n     int
}

func (p limitKey) key() string { return Prefix + p.limit + "." + strconv.Itoa(p.n) }

func parseLimitKey(key string) (p limitKey, ok bool) {
	p.limit, p.n, ok = ParseKey(key)
	return p, ok
}

// ParseKey returns the limit and the number of one of its keys, and false if the key
// is not one of a limit.
func ParseKey(key string) (limit string, n int, ok bool) {
	rest, ok := strings.CutPrefix(key, Prefix)
	i := strings.LastIndexByte(rest, '.')
	if !ok || i < 0 {
		return "", 0, false
	}
	n, err := strconv.Atoi(rest[i+1:])
	return rest[:i], n, err == nil
}

// holder is the value of a key.
type holder struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`

	revision uint64
}

// New returns Limits without any keys; Run keeps them current.
func New(o Options) *Limits {
	l := &Limits{o: o, pools: make(map[string]*pool), held: make(map[limitKey]holder)}
	l.releaseCtx, l.stopReleasing = context.WithCancel(context.Background())
	return l
}

// jobLimit is one limit that applies to a job.
type jobLimit struct {
	name string // of the limit: <key>/<value>
	max  int
}

// Names lists the limits that apply to the job.
func (l *Limits) Names(job Job) []string {
	var names []string
	for _, b := range l.limitsOf(job) {
		names = append(names, b.name)
	}
	return names
}

// limitsOf lists the limits that apply to the job, in the same order on all
// workers.
func (l *Limits) limitsOf(job Job) []jobLimit {
	var list []jobLimit
	add := func(key, value string, most int) {
		if most <= 0 || value == "" {
			return
		}
		name := key + "/" + topology.Token(value)
		if label, ok := strings.CutPrefix(key, labels); ok {
			name = "label/" + topology.Token(label) + "/" + topology.Token(value)
		}
		for i := range list {
			if list[i].name == name {
				list[i].max = min(list[i].max, most)
				return
			}
		}
		list = append(list, jobLimit{name, most})
	}
	add("app_id", job.App, l.o.Apps[job.App])
	for _, rule := range l.o.Rules {
		value, _ := job.Value(rule.Key) // Rule.Check has refused other keys
		add(rule.Key, value, rule.Max)
	}
	slices.SortFunc(list, func(a, b jobLimit) int { return strings.Compare(a.name, b.name) })
	return list
}

// Acquire waits until it holds one key of each limit that applies to the job, or
// waiting ends. Call release after the session is closed. It returns ErrBusy if
// enough jobs wait already. A job without limits does not wait.
func (l *Limits) Acquire(waiting context.Context, job Job) (release func(), err error) {
	bounds := l.limitsOf(job)
	if len(bounds) == 0 {
		return func() {}, nil
	}
	if release, _, _ = l.tryAcquire(waiting, bounds, job); release != nil {
		return release, nil
	}
	if !l.enqueue(bounds) {
		return nil, ErrBusy
	}
	defer l.dequeue(bounds)
	timer := time.NewTimer(l.o.CheckInterval)
	defer timer.Stop()
	for {
		release, full, changed := l.tryAcquire(waiting, bounds, job)
		if release != nil {
			return release, nil
		}
		select {
		case <-waiting.Done():
			return nil, context.Cause(waiting)
		case <-changed:
		case <-timer.C:
			l.freeExpired(waiting, full.name)
			timer.Reset(l.o.CheckInterval)
		}
	}
}

// tryAcquire takes one key of each limit without waiting. If it can't, it returns
// the limit that is full, and a channel that is closed when that changes.
func (l *Limits) tryAcquire(ctx context.Context, bounds []jobLimit, job Job) (release func(), full jobLimit, changed <-chan struct{}) {
	held := make([]limitKey, 0, len(bounds))
	for _, b := range bounds {
		// Get the channel first, so that a change during the attempt is noticed.
		changed = l.change(b.name)
		p, ok := l.acquireOne(ctx, b, job)
		if !ok {
			// Other jobs could use the keys while this one waits.
			l.release(held, 0)
			return nil, b, changed
		}
		held = append(held, p)
	}
	return func() { l.release(held, cooldown) }, jobLimit{}, nil
}

// acquireOne takes a free key of the limit for this worker. It returns false if
// none is free.
func (l *Limits) acquireOne(ctx context.Context, b jobLimit, job Job) (limitKey, bool) {
	worker := l.o.Worker()
	if worker == "" {
		return limitKey{}, false
	}
	for range b.max {
		h := holder{WorkerID: worker, JobID: job.ID}
		p, before, ok := l.reserve(b, h)
		if !ok {
			return limitKey{}, false
		}
		revision, err := l.o.Store.Put(ctx, p.key(), h, before.revision)
		if err == nil {
			h.revision = revision
			failpoint.Here("limit_taken")
			l.setHeld(p, h)
			return p, true
		}
		l.set(p, before)
		if !errors.Is(err, kv.ErrConflict) {
			return limitKey{}, false
		}
		l.refresh(ctx, p)
	}
	return limitKey{}, false
}

// reserve picks a free key, so that no other job of this worker tries the same
// one. before is the key's previous holder: a worker whose lease is gone, or
// nothing.
func (l *Limits) reserve(b jobLimit, h holder) (p limitKey, before holder, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(b.name)
	if !l.listed || keys.busy >= b.max {
		return limitKey{}, holder{}, false
	}
	first := rand.IntN(b.max) // so that workers rarely try the same key
	for i := range b.max {
		n := (first+i)%b.max + 1
		if before = keys.holders[n]; before.WorkerID == "" {
			h.revision = before.revision
			keys.set(n, h)
			return limitKey{b.name, n}, before, true
		}
	}
	return limitKey{}, holder{}, false
}

// refresh reads a key that another worker has taken.
func (l *Limits) refresh(ctx context.Context, p limitKey) {
	var h holder
	if revision, err := l.o.Store.Get(ctx, p.key(), &h); err == nil && revision != 0 {
		h.revision = revision
		l.update(p, h)
	}
}

// release frees keys after the given delay.
func (l *Limits) release(held []limitKey, after time.Duration) {
	if len(held) == 0 {
		return
	}
	l.wg.Go(func() {
		if after > 0 && retry.Pause(l.releaseCtx, after, nil) != nil {
			return
		}
		for _, p := range held {
			l.remove(p)
		}
	})
}

func (l *Limits) remove(p limitKey) {
	l.writing.Lock()
	l.mu.Lock()
	h := l.held[p]
	delete(l.held, p)
	l.mu.Unlock()
	l.writing.Unlock()
	failpoint.Here("limit_removal")
	gone := func(err error) bool { return errors.Is(err, kv.ErrConflict) }
	err := retry.Until(l.releaseCtx, retry.Backoff{Initial: kv.RetryPause, Max: time.Second}, gone,
		func() error { return l.o.Store.Remove(l.releaseCtx, p.key(), h.revision) })
	if err != nil && !gone(err) {
		l.o.Log.Warn().Err(err).Str("key", p.key()).Msg("could not remove the key of a session limit; it is free once this worker's lease ends")
		return
	}
	l.setRemoved(p, h.revision)
}

// enqueue counts one more waiting job, and returns false if there are too many. A
// limit gets at most half of MaxWaiting, so that jobs under other limits can wait
// too.
func (l *Limits) enqueue(bounds []jobLimit) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting >= max(1, l.o.MaxWaiting) {
		return false
	}
	for _, b := range bounds {
		if keys := l.pools[b.name]; keys != nil && keys.waiting >= max(1, min(b.max, l.o.MaxWaiting/2)) {
			return false
		}
	}
	l.waiting++
	for _, b := range bounds {
		l.pool(b.name).waiting++
	}
	return true
}

func (l *Limits) dequeue(bounds []jobLimit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
	for _, b := range bounds {
		l.pool(b.name).waiting--
		l.dropUnused(b.name)
	}
}

// freeExpired frees the limit's keys whose holders' leases are gone.
func (l *Limits) freeExpired(ctx context.Context, limit string) {
	stands := make(map[string]bool)
	for n, h := range l.heldByOthers(limit) {
		alive, asked := stands[h.WorkerID]
		if !asked {
			var err error
			if alive, err = l.o.Stands(ctx, h.WorkerID); err != nil {
				return
			}
			stands[h.WorkerID] = alive
		}
		if !alive {
			l.markFree(limitKey{limit, n}, h.revision)
		}
	}
}

// heldByOthers lists the limit's keys that other workers hold, or none if another
// job has just checked them.
func (l *Limits) heldByOthers(limit string) map[int]holder {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(limit)
	if time.Since(keys.checkedAt) < l.o.CheckInterval/2 {
		return nil
	}
	keys.checkedAt = time.Now()
	list := make(map[int]holder, len(keys.holders))
	for n, h := range keys.holders {
		if _, ours := l.held[limitKey{limit, n}]; !ours && h.WorkerID != "" {
			list[n] = h
		}
	}
	return list
}

// markFree marks the key as free at this revision; a job that takes the key
// replaces that revision.
func (l *Limits) markFree(p limitKey, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(p.limit)
	if keys.holders[p.n].revision == revision {
		keys.set(p.n, holder{revision: revision})
		keys.notify()
	}
}

// setHeld records that this worker holds the key.
func (l *Limits) setHeld(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pool(p.limit).set(p.n, h)
	l.held[p] = h
}

func (l *Limits) set(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pool(p.limit).set(p.n, h)
}

// update records what another worker wrote.
func (l *Limits) update(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if keys := l.pool(p.limit); h.revision > keys.holders[p.n].revision {
		keys.set(p.n, h)
	}
}

// setRemoved records that a key was removed by a write after revision.
func (l *Limits) setRemoved(p limitKey, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.pool(p.limit)
	if h, ok := keys.holders[p.n]; ok && h.revision <= revision {
		keys.set(p.n, holder{})
		keys.notify()
	}
	l.dropUnused(p.limit)
}

// pool returns the keys of a limit. Callers hold l.mu, here and below.
func (l *Limits) pool(limit string) *pool {
	keys := l.pools[limit]
	if keys == nil {
		keys = &pool{holders: make(map[int]holder), changed: make(chan struct{})}
		l.pools[limit] = keys
	}
	return keys
}

// dropUnused removes a limit without holders and waiting jobs: there may be one
// for each room that ever existed.
func (l *Limits) dropUnused(limit string) {
	if keys := l.pools[limit]; keys != nil && len(keys.holders) == 0 && keys.waiting == 0 {
		delete(l.pools, limit)
	}
}

// set stores the holder of a key; the zero holder means that the key is absent.
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

// releaseTimeout bounds the writes that free keys when the worker stops.
const releaseTimeout = 5 * time.Second

// Run follows the keys until ctx ends, then waits until released keys are
// removed. It watches nothing if no limits are configured.
func (l *Limits) Run(ctx context.Context) {
	if len(l.o.Apps) > 0 || len(l.o.Rules) > 0 {
		l.wg.Go(func() { l.rewriteHeld(ctx) })
		l.watch(ctx)
	}
	stop := time.AfterFunc(releaseTimeout, l.stopReleasing)
	l.wg.Wait()
	stop.Stop()
	l.stopReleasing()
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
	found := make(map[limitKey]bool)
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, open := <-watcher.Updates():
			if !open {
				return nil
			}
			if e == nil {
				l.finishListing(found)
				found = nil
				continue
			}
			p, ok := parseLimitKey(e.Key())
			if !ok {
				continue
			}
			h := holder{revision: e.Revision()}
			if e.Operation() != jetstream.KeyValuePut || json.Unmarshal(e.Value(), &h) != nil {
				l.setRemoved(p, e.Revision())
				continue
			}
			l.update(p, h)
			if found != nil {
				found[p] = true
			}
		}
	}
}

// finishListing frees the keys that the watch did not list: they were removed
// while nothing watched.
func (l *Limits) finishListing(found map[limitKey]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listed = true
	for limit, keys := range l.pools {
		for n, h := range keys.holders {
			p := limitKey{limit, n}
			if _, ours := l.held[p]; !ours && !found[p] && h.revision != 0 {
				keys.set(n, holder{})
			}
		}
		keys.notify()
		l.dropUnused(limit)
	}
}

// rewriteHeld writes held keys again before the bucket expires them: a session
// may live longer than records are kept.
func (l *Limits) rewriteHeld(ctx context.Context) {
	if l.o.RewriteInterval == 0 {
		return
	}
	for retry.Pause(ctx, l.o.RewriteInterval, nil) == nil {
		l.mu.Lock()
		held := slices.Collect(maps.Keys(l.held))
		l.mu.Unlock()
		for _, p := range held {
			l.rewrite(ctx, p)
		}
	}
}

func (l *Limits) rewrite(ctx context.Context, p limitKey) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	h, ours := l.held[p]
	l.mu.Unlock()
	if !ours {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	if revision, err := l.o.Store.Put(ctx, p.key(), h, h.revision); err == nil {
		h.revision = revision
		l.setHeld(p, h)
	}
}
