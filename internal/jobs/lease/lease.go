// Package lease keeps a worker's lease: one key with a TTL in the bucket of job
// records, renewed by acknowledged compare-and-set writes and expired by the
// server's own clock. While the lease is valid, jobs whose records name it belong
// to this worker; once it is gone, other workers may take them. The package also
// extends the ack waits of the worker's messages.
//
// It owns the keys "lease.<worker_id>", and must not know about jobs. The reasons are in
// docs/decisions/0010-one-lease.md.
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
	"avatarworker/internal/failpoint"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// ErrLost is the cancellation cause of work whose worker could not renew its
// lease in time.
var ErrLost = errors.New("the worker's lease could not be renewed in time")

// errNoLease is what Ready returns before the first lease.
var errNoLease = errors.New("the worker has no lease yet")

const (
	// renewalsPerWindow is how many renewals are made in one window.
	renewalsPerWindow = 4
	// renewalsPerClockCheck is how many renewals pass between two readings of the
	// server's clock.
	renewalsPerClockCheck = 8
	// removeTimeout bounds the removal of the key when the worker stops.
	removeTimeout = 2 * time.Second
	acquireMax    = time.Second
)

// Prefix begins the keys of leases. No job id has a dot.
const Prefix = "lease."

// seenPrefix begins the keys that say when a worker last renewed its lease. They
// outlive the lease, so that the end of one that was lost is known.
const seenPrefix = "seen."

// Options configure a Manager. All fields are required.
type Options struct {
	NC     *nats.Conn
	Store  *kv.Store // the bucket of job records; its timeout is at most an eighth of Window
	ID     string    // of the first lease; later ones add a number
	Window time.Duration
	Now    func() time.Time // this process's clock, used until the server's was read
	// Changed is called when the worker gets a lease, and with nil when it has
	// lost it. Calls do not overlap.
	Changed func(*Lease)
	Renewed func(ok bool) // called for each renewal and each lost lease
	Log     zerolog.Logger
}

// Manager keeps the lease of one worker.
type Manager struct {
	o       Options
	margin  time.Duration
	current atomic.Pointer[Lease]
	fault   atomic.Pointer[error]     // why the worker has no lease
	clock   atomic.Pointer[reading]   // nil: the server's clock was not read yet
	known   chan struct{}             // closed once it was
	grace   atomic.Pointer[time.Time] // leases of others count as valid until then; nil: no longer
	acks    *ackExtender
	wg      sync.WaitGroup
	stop    context.CancelFunc
	working context.Context // Start's
}

// reading is a time of the server, and this process's when it was that.
type reading struct {
	server time.Time
	local  time.Time // monotonic
}

// Lease is one lease of the worker, from its first write to its loss.
type Lease struct {
	ID  string // the worker_id in everything written under this lease
	ctx context.Context
}

// Context ends with the cause ErrLost when the lease is given up, Margin before
// it expires, and with the context given to Start. One for all the work under the
// lease takes less memory than watching both for each session.
func (h *Lease) Context() context.Context { return h.ctx }

// entry is the value of a lease's key. The renewal number distinguishes renewals,
// so that a write whose reply was lost can be recognised.
type entry struct {
	WorkerID string `json:"worker_id"`
	Renewal  int    `json:"renewal"`
}

// Margin returns how long before its expiry a lease is given up: enough to close
// a session, which takes at most a second.
func Margin(window time.Duration) time.Duration { return min(window/3, 3*time.Second) }

// New returns a Manager that has no lease yet.
func New(o Options) *Manager {
	m := &Manager{o: o, margin: Margin(o.Window), acks: newAckExtender(o.NC, o.Window), known: make(chan struct{})}
	m.fault.Store(&errNoLease)
	return m
}

// Start acquires and renews leases until Stop, even if ctx has ended: that ends only
// the work under them.
func (m *Manager) Start(ctx context.Context) {
	m.working = ctx
	ctx, m.stop = context.WithCancel(context.WithoutCancel(ctx))
	m.wg.Go(func() { m.acks.run(ctx) })
	m.wg.Go(func() { m.run(ctx) })
}

// Stop removes the lease's key, so that other workers need not wait for it to
// expire. Call it last, when no record names the worker.
func (m *Manager) Stop() {
	m.stop()
	m.wg.Wait()
}

// Current returns the lease that the worker holds, or nil.
func (m *Manager) Current() *Lease { return m.current.Load() }

// Own reports whether the ID is that of a lease which this worker holds or has
// held.
func (m *Manager) Own(id string) bool {
	return id == m.o.ID || strings.HasPrefix(id, m.o.ID+"-")
}

// Ready returns nil while the worker has a lease, and otherwise the reason why it
// has none.
func (m *Manager) Ready() error {
	if m.Current() != nil {
		return nil
	}
	return *m.fault.Load()
}

// Now returns the time of the server that keeps the bucket. Workers compare the
// times in their records by it, whatever their own clocks show: a lease begins with a
// reading of the server's clock, and from then on the monotonic clock counts, which
// nobody sets.
//
// That clock may stand still while the machine is suspended or paused. Now is late by
// that time until the clock is read again: with the next lease, as this one has expired
// if it was longer than the window, and otherwise within renewalsPerClockCheck renewals.
// So it is late by less than a window, except in the time before the loss is noticed.
func (m *Manager) Now() time.Time {
	if c := m.clock.Load(); c != nil {
		return c.server.Add(time.Since(c.local))
	}
	return m.o.Now()
}

// AwaitClock returns when Now is the server's time, or ctx has ended.
func (m *Manager) AwaitClock(ctx context.Context) {
	select {
	case <-m.known:
	case <-ctx.Done():
	}
}

// Valid reports whether the lease of the worker with this ID is valid. What takes
// this worker's lease away, such as a server that restarts, takes others' away with
// it. So for a quarter of a window after this worker has a lease again, others are
// taken to have theirs: each first writes what its sessions had reached.
func (m *Manager) Valid(ctx context.Context, id string) (bool, error) {
	if h := m.Current(); h != nil && h.ID == id {
		return true, nil
	}
	if id == "" {
		return false, nil
	}
	if until := m.grace.Load(); until != nil && time.Now().Before(*until) {
		return true, nil
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
	// for as long as the lease was valid.
	end := seen.Add(2 * m.o.Window)
	if end.After(now) {
		return now
	}
	return end
}

func key(id string) string { return Prefix + topology.Token(id) }

// run holds one lease after another.
func (m *Manager) run(ctx context.Context) {
	for n := 1; ctx.Err() == nil; n++ {
		id := m.o.ID
		if n > 1 {
			id = fmt.Sprintf("%s-%d", m.o.ID, n)
		}
		l := &activeLease{m: m, id: id}
		if err := l.acquire(ctx); err != nil {
			return // stopped
		}
		if n > 1 {
			until := time.Now().Add(m.o.Window / renewalsPerWindow)
			m.grace.Store(&until)
		}
		l.maintain(ctx)
	}
}

// activeLease is the lease that run maintains.
type activeLease struct {
	m        *Manager
	id       string
	revision uint64
	renewal  int
	sent     time.Time // when the last acknowledged renewal was started
	clockDue bool      // the server's clock is to be read with the next renewal
	watchdog *time.Timer
	lost     context.CancelCauseFunc
}

// acquire creates the key and renews it once: a bucket that takes new keys and refuses
// to change them can't keep a lease, nor the record of a session. Then it reads the
// server's clock, by which the worker's jobs are decided. It returns an error only if
// ctx has ended.
func (l *activeLease) acquire(ctx context.Context) error {
	m := l.m
	b := retry.Backoff{Initial: kv.RetryPause, Max: acquireMax}
	return retry.Until(ctx, b, nil, func() error {
		l.sent = time.Now()
		err := l.put(ctx, m.o.Window)
		second := time.Now()
		if err == nil {
			err = l.put(ctx, m.o.Window)
		}
		stored := time.Now()
		l.clockDue = !m.quick(second)
		if err != nil {
			l.revision, l.renewal = 0, 0 // by then the key may have expired
			m.setFault(fmt.Errorf("the worker's lease can't be written, so it starts no session: %w", err))
			return err
		}
		if err := m.readClock(ctx, l.id, stored); err != nil {
			m.setFault(fmt.Errorf("the worker's lease can't be read, so it starts no session: %w", err))
			return err
		}
		m.o.Store.Note(seenPrefix+topology.Token(l.id), entry{WorkerID: l.id, Renewal: l.renewal})
		failpoint.Here("lease_acquired")
		return nil
	})
}

// put writes the next renewal. It tries until there is a reply, for at most
// limit.
func (l *activeLease) put(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	next := entry{WorkerID: l.id, Renewal: l.renewal + 1}
	for {
		revision, err := l.m.o.Store.PutTTL(ctx, key(l.id), next, l.revision, l.m.o.Window)
		if errors.Is(err, kv.ErrConflict) {
			revision, err = l.refused(ctx, next, err)
		}
		if err != nil {
			return err
		}
		if revision != 0 {
			l.revision, l.renewal = revision, next.Renewal
			return nil
		}
		if err := retry.Pause(ctx, kv.RetryPause, kv.ErrConflict); err != nil {
			return err
		}
	}
}

// refused returns the revision of a renewal that was refused and landed, 0 if it is to
// be tried again, or err if the key has another value. When a cluster that was divided
// is whole again, the leader of before may refuse what the leader of now takes.
func (l *activeLease) refused(ctx context.Context, next entry, err error) (uint64, error) {
	var stored entry
	revision, readErr := l.m.o.Store.Get(ctx, key(l.id), &stored)
	switch {
	case readErr == nil && stored == next: // only this worker writes under its ID
		return revision, nil
	case readErr == nil && revision != 0 && revision <= l.revision:
		return 0, nil
	}
	return 0, err
}

// maintain renews the lease until it is lost or ctx ends. In the latter case it
// removes the key.
func (l *activeLease) maintain(ctx context.Context) {
	m := l.m
	lease, lost := context.WithCancelCause(context.WithoutCancel(ctx))
	l.lost = lost
	l.watchdog = time.AfterFunc(l.timeLeft(), func() { lost(ErrLost) })
	defer l.watchdog.Stop()
	work, end := context.WithCancelCause(lease)
	defer context.AfterFunc(m.working, func() { end(context.Cause(m.working)) })()
	holder := &Lease{ID: l.id, ctx: work}
	m.current.Store(holder)
	m.o.Changed(holder)
	for {
		if retry.Pause(ctx, m.o.Window/renewalsPerWindow-time.Since(l.sent), nil) != nil {
			l.release(ctx)
			return
		}
		err := l.renew(ctx, lease)
		if lease.Err() == nil && (err == nil || ctx.Err() != nil) {
			continue
		}
		lost(ErrLost)
		m.o.Renewed(false)
		m.setFault(fmt.Errorf("%w: its sessions were ended and start again once it has a new lease: %w", ErrLost, err))
		m.current.Store(nil)
		m.o.Changed(nil)
		m.o.Log.Error().Err(err).Str("worker_id", l.id).Stringer("window", m.o.Window).
			Msg("the worker's lease was lost: its sessions end, and it starts again under another ID")
		return
	}
}

// timeLeft returns the time until the lease is given up.
func (l *activeLease) timeLeft() time.Duration { return l.m.o.Window - l.m.margin - time.Since(l.sent) }

// renew writes the key once more. The context lease ends when it is too late for
// that, stopping when the worker stops.
func (l *activeLease) renew(stopping, lease context.Context) error {
	m := l.m
	lease, cancel := context.WithCancel(lease)
	defer cancel()
	defer context.AfterFunc(stopping, cancel)()
	sent := time.Now()
	if err := l.put(lease, m.o.Window); err != nil {
		return err
	}
	l.sent = sent
	if !l.watchdog.Reset(l.timeLeft()) {
		return ErrLost // the watchdog has fired
	}
	m.o.Renewed(true)
	m.o.Store.Note(seenPrefix+topology.Token(l.id), entry{WorkerID: l.id, Renewal: l.renewal})
	stored := time.Now()
	l.clockDue = l.clockDue || l.renewal%renewalsPerClockCheck == 0
	if l.clockDue && m.quick(sent) {
		// Without an answer the last reading counts on.
		l.clockDue = m.readClock(lease, l.id, stored) != nil
	}
	return nil
}

// quick reports whether a write that was begun at that time, and is answered now, was
// answered at the first try. One that was tried again may have been stored long ago.
func (m *Manager) quick(begun time.Time) bool { return time.Since(begun) < m.o.Window/8 }

// readClock reads when the server stored the lease's key. local is the time just after
// that: Now is late rather than early, so that no deadline passes too soon.
func (m *Manager) readClock(ctx context.Context, id string, local time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, m.o.Window/renewalsPerWindow)
	defer cancel()
	stored, err := m.o.Store.Stored(ctx, key(id))
	if err != nil {
		return err
	}
	if stored.IsZero() {
		return errors.New("its key has expired")
	}
	if m.clock.Swap(&reading{server: stored, local: local}) == nil {
		close(m.known)
	}
	return nil
}

func (m *Manager) setFault(err error) {
	before := *m.fault.Swap(&err)
	if before.Error() != err.Error() && m.Current() == nil {
		m.o.Log.Warn().Err(err).Msg("the worker has no lease; trying again")
	}
}

// release removes the key of a worker that stops cleanly.
func (l *activeLease) release(ctx context.Context) {
	l.m.current.Store(nil)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	failpoint.Here("lease_removal")
	// Read again: the last renewal may have landed without an answer.
	var last entry
	revision, err := l.m.o.Store.Get(ctx, key(l.id), &last)
	if err == nil && revision != 0 {
		err = l.m.o.Store.Remove(ctx, key(l.id), revision)
	}
	if err != nil {
		l.m.o.Log.Debug().Err(err).Msg("could not remove the lease's key; it expires by itself")
	}
	l.lost(nil)
}
