// Package lease keeps a worker's lease: one key with a TTL in the bucket of job
// records, renewed by acknowledged compare-and-set writes and expired by the
// server's own clock. While it stands, what names the worker is the worker's;
// once it is gone, another worker may take it. The package also keeps the ack
// waits of the worker's messages from running out.
//
// It knows nothing of jobs. docs/decisions/0009-one-lease.md says why it is so.
package lease

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// ErrLost is the cause with which work is cancelled whose worker could not renew
// its lease in time.
var ErrLost = errors.New("the worker's lease could not be renewed in time")

// errNone is what Ready returns before the first lease.
var errNone = errors.New("the worker has no lease yet")

const (
	// renewals is how many renewals there are in one window.
	renewals = 4
	// clockEvery is how many renewals pass between two looks at the server's
	// clock.
	clockEvery = 8
	// removeTimeout bounds the removal of the key when the worker stops.
	removeTimeout = 2 * time.Second
	acquireMax    = time.Second
)

// Prefix begins the keys of leases. No job id has a dot.
const Prefix = "lease."

// seenPrefix begins the keys that say when a worker last renewed its lease. They
// outlive the lease, so that the end of one that was lost is known.
const seenPrefix = "seen."

// Options are what a Manager is made of. All are required.
type Options struct {
	NC     *nats.Conn
	Store  *kv.Store // the bucket of job records; its timeout is at most an eighth of Window
	ID     string    // of the worker's first lease; later ones add a number
	Window time.Duration
	Now    func() time.Time
	// Changed is called when the worker gets a lease, and with nil when it has
	// lost it. The calls come one after the other.
	Changed func(*Holder)
	Renewed func(ok bool) // each renewal, and each lease lost
	Log     zerolog.Logger
}

// Manager keeps the lease of one worker.
type Manager struct {
	o       Options
	margin  time.Duration
	current atomic.Pointer[Holder]
	fault   atomic.Pointer[error] // why there is no lease
	offset  atomic.Int64          // the server's clock less this process's, ns
	acks    *acks
	wg      sync.WaitGroup
	stop    context.CancelFunc
}

// Holder is one lease of the worker, from its first write to its loss.
type Holder struct {
	ID  string // the worker_id that everything of this lease names
	ctx context.Context
}

// Context ends with the cause ErrLost when the lease is lost, the margin before
// it ends.
func (h *Holder) Context() context.Context { return h.ctx }

// entry is the value of a lease's key. The number tells one renewal from the
// next, so that a write whose answer got lost is recognised.
type entry struct {
	WorkerID string `json:"worker_id"`
	Renewal  int    `json:"renewal"`
}

// Margin is how long before its end a lease is given up: enough to close a
// session, which takes a second at most.
func Margin(window time.Duration) time.Duration { return min(window/3, 3*time.Second) }

// New returns a Manager that has no lease yet.
func New(o Options) *Manager {
	m := &Manager{o: o, margin: Margin(o.Window), acks: newAcks(o.NC, o.Window)}
	m.fault.Store(&errNone)
	return m
}

// Start begins to acquire and renew leases, until Stop.
func (m *Manager) Start(ctx context.Context) {
	ctx, m.stop = context.WithCancel(context.WithoutCancel(ctx))
	m.wg.Go(func() { m.acks.run(ctx) })
	m.wg.Go(func() { m.run(ctx) })
}

// Stop removes the lease's key, so that nothing waits for it to expire. Call it
// last, when nothing names the worker any more.
func (m *Manager) Stop() {
	m.stop()
	m.wg.Wait()
}

// Current returns the lease that the worker holds, nil if it has none.
func (m *Manager) Current() *Holder { return m.current.Load() }

// Own reports whether the id is of a lease that this worker holds or has held.
func (m *Manager) Own(id string) bool {
	return id == m.o.ID || strings.HasPrefix(id, m.o.ID+"-")
}

// Ready returns nil while the worker has a lease, else why it has none.
func (m *Manager) Ready() error {
	if m.Current() != nil {
		return nil
	}
	return *m.fault.Load()
}

// Now is the time by the clock of the server that keeps the bucket. Workers
// compare the times of their records by it, whatever their own clocks say.
func (m *Manager) Now() time.Time { return m.o.Now().Add(time.Duration(m.offset.Load())) }

// Stands reports whether the lease of the worker with this id stands.
func (m *Manager) Stands(ctx context.Context, id string) (bool, error) {
	if h := m.Current(); h != nil && h.ID == id {
		return true, nil
	}
	if id == "" {
		return false, nil
	}
	stored, err := m.o.Store.Stored(ctx, key(id))
	return !stored.IsZero(), err
}

// Ended is when the lease of a worker that is gone had ended at the latest.
func (m *Manager) Ended(ctx context.Context, id string) time.Time {
	now := m.Now()
	seen, err := m.o.Store.Stored(ctx, seenPrefix+topology.Token(id))
	if err != nil || seen.IsZero() {
		return now
	}
	// One more renewal may have landed whose answer got lost, and which was tried
	// for as long as the lease stood.
	end := seen.Add(2 * m.o.Window)
	if end.After(now) {
		return now
	}
	return end
}

func key(id string) string { return Prefix + topology.Token(id) }

// run holds one lease after the other.
func (m *Manager) run(ctx context.Context) {
	for n := 1; ctx.Err() == nil; n++ {
		id := m.o.ID
		if n > 1 {
			id = fmt.Sprintf("%s-%d", m.o.ID, n)
		}
		l := &held{m: m, id: id}
		if err := l.acquire(ctx); err != nil {
			return // told to stop
		}
		l.keep(ctx)
	}
}

// held is the lease while run keeps it.
type held struct {
	m        *Manager
	id       string
	revision uint64
	renewal  int
	sent     time.Time // when the last acknowledged renewal was begun
	watchdog *time.Timer
	lost     context.CancelCauseFunc
}

// acquire creates the key. It returns an error only when ctx has ended.
func (l *held) acquire(ctx context.Context) error {
	m := l.m
	b := retry.Backoff{Initial: kv.RetryPause, Max: acquireMax}
	return retry.Until(ctx, b, nil, func() error {
		l.sent = time.Now()
		wall := m.o.Now()
		err := l.put(ctx, m.o.Window)
		if err == nil {
			m.o.Store.Note(seenPrefix+topology.Token(l.id), entry{WorkerID: l.id, Renewal: l.renewal})
			m.learnClock(ctx, l.id, wall)
			return nil
		}
		m.fail(fmt.Errorf("the worker's lease can't be written, so it starts no session: %w", err))
		return err
	})
}

// put writes the next renewal. It tries until there is an answer, for at most
// limit.
func (l *held) put(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	revision, err := l.m.o.Store.PutTTL(ctx, key(l.id), entry{WorkerID: l.id, Renewal: l.renewal + 1}, l.revision, l.m.o.Window)
	if err == nil {
		l.revision, l.renewal = revision, l.renewal+1
	}
	return err
}

// keep renews the lease until it is lost or ctx ends; then it removes the key.
func (l *held) keep(ctx context.Context) {
	m := l.m
	lease, lost := context.WithCancelCause(context.WithoutCancel(ctx))
	l.lost = lost
	l.watchdog = time.AfterFunc(l.rest(), func() { lost(ErrLost) })
	defer l.watchdog.Stop()
	holder := &Holder{ID: l.id, ctx: lease}
	m.current.Store(holder)
	m.o.Changed(holder)
	for {
		if retry.Pause(ctx, m.o.Window/renewals-time.Since(l.sent), nil) != nil {
			l.end(ctx)
			return
		}
		err := l.renew(ctx, lease)
		if lease.Err() == nil && (err == nil || ctx.Err() != nil) {
			continue
		}
		lost(ErrLost)
		m.o.Renewed(false)
		m.fail(fmt.Errorf("%w: sessions were ended and are begun again once it can: %w", ErrLost, err))
		m.current.Store(nil)
		m.o.Changed(nil)
		m.o.Log.Error().Err(err).Str("worker_id", l.id).Stringer("window", m.o.Window).
			Msg("the worker's lease was lost: its sessions end, and it begins again under another id")
		return
	}
}

// rest is the time until the lease is given up.
func (l *held) rest() time.Duration { return l.m.o.Window - l.m.margin - time.Since(l.sent) }

// renew writes the key once more. lease ends when it is too late for that, stopping
// when the worker stops.
func (l *held) renew(stopping, lease context.Context) error {
	m := l.m
	lease, cancel := context.WithCancel(lease)
	defer cancel()
	defer context.AfterFunc(stopping, cancel)()
	sent, wall := time.Now(), m.o.Now()
	if err := l.put(lease, m.o.Window); err != nil {
		return err
	}
	l.sent = sent
	if !l.watchdog.Reset(l.rest()) {
		return ErrLost // it had fired
	}
	m.o.Renewed(true)
	m.o.Store.Note(seenPrefix+topology.Token(l.id), entry{WorkerID: l.id, Renewal: l.renewal})
	if l.renewal%clockEvery == 0 {
		m.learnClock(lease, l.id, wall)
	}
	return nil
}

// learnClock compares the server's clock with this process's by the time at which
// the lease's key was stored; wall is this process's time just before.
func (m *Manager) learnClock(ctx context.Context, id string, wall time.Time) {
	ctx, cancel := context.WithTimeout(ctx, m.o.Window/renewals)
	defer cancel()
	stored, err := m.o.Store.Stored(ctx, key(id))
	if err != nil || stored.IsZero() {
		return // the last offset is good enough
	}
	m.offset.Store(int64(stored.Sub(wall)))
}

func (m *Manager) fail(err error) {
	before := *m.fault.Swap(&err)
	if before.Error() != err.Error() && m.Current() == nil {
		m.o.Log.Warn().Err(err).Msg("no lease: trying again")
	}
}

// end removes the key of a worker that stops in good order.
func (l *held) end(ctx context.Context) {
	l.m.current.Store(nil)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	// Read anew: the last renewal may have landed without an answer.
	var last entry
	revision, err := l.m.o.Store.Get(ctx, key(l.id), &last)
	if err == nil && revision != 0 {
		err = l.m.o.Store.Remove(ctx, key(l.id), revision)
	}
	if err != nil {
		l.m.o.Log.Debug().Err(err).Msg("the lease's key could not be removed; it expires by itself")
	}
	l.lost(nil)
}
