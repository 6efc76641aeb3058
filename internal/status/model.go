package status

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/streams"
)

const (
	// defaultEvery is how often a Model polls NATS for what is new.
	defaultEvery = time.Second
	// storageEvery is how often it reads how full the streams are.
	storageEvery = 5 * time.Second
	// oddLimit is how often in a row the number of waiting jobs may differ from the
	// server's before they are all read again.
	oddLimit = 3
	// rereadEvery is how often a long queue is read again at most.
	rereadEvery = 30 * time.Second
	// singleBudget is how many waiting jobs are read at a time where each takes a
	// request of its own.
	singleBudget = 256
)

// Model answers the questions that a Store answers, from memory. It holds a row of
// about 250 bytes for each job, and follows what changes: each poll costs NATS about
// a dozen small requests, and what was overwritten between two polls is not read. It
// has no consumer while nothing is new, and none on the jobs stream at all.
//
// While NATS is away it answers with what it knew; Freshness says so. It goes on
// where it was once NATS is back, and reads everything again if a stream or bucket
// was made again.
type Model struct {
	store *Store
	every time.Duration

	poke       chan struct{} // a poll is wanted now
	budgetsDue chan struct{} // a budget was set, so they are to be read now
	stopped    chan struct{} // closed when Run has ended: nothing more is read
	stopOnce   sync.Once

	// Used by the poll under way only.
	state, fleetBucket, events streams.Tail
	waitingReader              *streams.Reader
	jobsCreated                time.Time // when the jobs stream was made
	storageAt, rereadAt        time.Time

	mu       sync.RWMutex
	records  *recordTable
	waiting  map[string]*waitingTable // by subject
	limits   *limitKeys
	shared   map[string]sharedEntry // of the fleet bucket, by key
	failures *failureCounts
	behind   map[string]bool // what is still to be read, by stream
	queues   map[string]Queue
	spans    map[string]span // what the server says of the jobs, by subject
	letters  []dlq.Count
	storage  []Storage
	spent    []budget.Spending // budgets that are spent
	unread   error             // why the budgets are not known
	fresh    Freshness
	failed   error         // of the last poll
	offset   time.Duration // of the server's clock to this one's
	changed  chan struct{} // closed when the version rises
	polled   chan struct{} // closed when a poll ends
	begun    uint64        // number of the last poll that began
	done     uint64        // number of the last poll that ended
}

// Freshness says how current a Model is.
type Freshness struct {
	// Version rises with each change. It begins at another number in each process.
	Version uint64    `json:"version"`
	At      time.Time `json:"at"`     // of the last poll that succeeded, by the server's clock
	Loaded  bool      `json:"loaded"` // everything was read once
	// Error is why the last poll failed; "": it did not. What is shown is then as old
	// as At says.
	Error string `json:"error,omitempty"`
}

// NewModel returns a Model that knows nothing until it runs. every is the time between
// two polls; 0 is defaultEvery.
func NewModel(store *Store, every time.Duration) *Model {
	if every <= 0 {
		every = defaultEvery
	}
	names := store.names
	m := &Model{
		store: store, every: every, poke: make(chan struct{}, 1), budgetsDue: make(chan struct{}, 1), stopped: make(chan struct{}),
		state:       streams.Tail{JS: store.js, Stream: "KV_" + names.StateBucket(), Subject: "$KV." + names.StateBucket() + ".>"},
		fleetBucket: streams.Tail{JS: store.js, Stream: "KV_" + names.FleetBucket(), Subject: "$KV." + names.FleetBucket() + ".>"},
		events:      streams.Tail{JS: store.js, Stream: names.EventsStream(), Subject: names.AllErrors(), HeadersOnly: true, Sparse: true},
		records:     newRecordTable(), waiting: make(map[string]*waitingTable), limits: newLimitKeys(), shared: make(map[string]sharedEntry),
		failures: newFailureCounts(names), behind: make(map[string]bool), changed: make(chan struct{}), polled: make(chan struct{}),
	}
	m.events.Since = func() time.Time { return beginOfDay(m.serverNow()) }
	m.waitingReader = streams.NewReader(store.js, names.JobsStream())
	m.fresh.Version = uint64(store.now().UnixMicro()) // #nosec G115 -- after 1970
	return m
}

// Run follows what changes until ctx ends.
func (m *Model) Run(ctx context.Context) {
	defer m.stopOnce.Do(func() { close(m.stopped) })
	if m.store.budgets != nil {
		var beside sync.WaitGroup
		beside.Go(func() { m.followBudgets(ctx) })
		defer beside.Wait()
	}
	ticker := time.NewTicker(m.every)
	defer ticker.Stop()
	for {
		m.poll(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-m.poke:
		}
	}
}

// Refresh returns after a poll that began after the call, with its error. It is for
// callers that changed something and want to see it. Run must be running.
func (m *Model) Refresh(ctx context.Context) error {
	m.mu.RLock()
	wanted := m.begun + 1
	m.mu.RUnlock()
	select {
	case m.poke <- struct{}{}:
	default: // a poll is wanted already
	}
	for {
		m.mu.RLock()
		polled, ended, failed := m.polled, m.done >= wanted, m.failed
		m.mu.RUnlock()
		if ended {
			return failed
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-polled:
		}
	}
}

// Freshness says how current the answers are.
func (m *Model) Freshness() Freshness {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.fresh
}

// Changed returns a channel that is closed once the version is higher than the given
// one. Several changes between two polls are one.
func (m *Model) Changed(version uint64) <-chan struct{} {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.fresh.Version <= version {
		return m.changed
	}
	closed := make(chan struct{})
	close(closed)
	return closed
}

// serverNow is the time by the server's clock.
func (m *Model) serverNow() time.Time {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.now()
}

func (m *Model) now() time.Time { return m.store.now().Add(m.offset).UTC() }

// poll reads what is new. The jobs that wait come before the records: a job on its way
// from its queue to its record is seen twice at worst.
func (m *Model) poll(ctx context.Context) {
	m.mu.Lock()
	m.begun++
	m.mu.Unlock()
	changed := false
	at, err := m.pollUntilLost(ctx, &changed)
	if ctx.Err() == nil {
		m.ended(at, changed, err)
	}
}

// pollUntilLost reads what is new until the connection is lost: a request that is under way
// then is never answered.
func (m *Model) pollUntilLost(ctx context.Context, changed *bool) (time.Time, error) {
	nc := m.store.js.Conn()
	lost := nc.StatusChanged(nats.RECONNECTING, nats.CLOSED)
	defer nc.RemoveStatusListener(lost)
	if !nc.IsConnected() {
		return time.Time{}, errNotConnected
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var watching sync.WaitGroup
	defer watching.Wait()
	done := make(chan struct{})
	defer close(done)
	watching.Go(func() {
		select {
		case <-lost:
			cancel(errNotConnected)
		case <-done:
		}
	})
	at, err := m.pollParts(ctx, changed)
	if err != nil && errors.Is(context.Cause(ctx), errNotConnected) {
		err = errNotConnected
	}
	return at, err
}

// errStopped: the model does not run any more, and had not read all there was.
var errStopped = errors.New("the state of the fleet is not read any more: this process ends")

var errNotConnected = errors.New("there is no connection to NATS")

// pollParts reads what is new, part by part.
func (m *Model) pollParts(ctx context.Context, changed *bool) (time.Time, error) {
	at, jobs, err := m.pollJobs(ctx, changed)
	for _, part := range []struct {
		tail *streams.Tail
		f    streams.Follower
	}{
		{&m.state, m.stateFollower(changed)},
		{&m.fleetBucket, m.fleetFollower(changed)},
		{&m.events, m.eventsFollower(changed)},
	} {
		if err != nil {
			break
		}
		var more bool
		_, more, err = part.tail.Read(ctx, part.f)
		if errors.Is(err, jetstream.ErrStreamNotFound) && part.tail == &m.fleetBucket {
			err = nil // as a Store has it: no workers
		}
		m.mu.Lock()
		*changed = *changed || m.behind[part.tail.Stream] != more
		m.behind[part.tail.Stream] = more
		m.mu.Unlock()
		if err == nil && part.tail == &m.state {
			err = m.settleWaiting(ctx, jobs, changed)
		}
	}
	if err == nil {
		err = m.pollRest(ctx, changed)
	}
	return at, err
}

// ended notes how a poll ended and wakes those who wait for that.
func (m *Model) ended(at time.Time, changed bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text := ""
	if err != nil {
		text = err.Error()
	} else {
		changed = changed || !m.fresh.Loaded
		m.fresh.At, m.fresh.Loaded = at, true
	}
	m.done = m.begun
	changed = changed || text != m.fresh.Error
	m.fresh.Error, m.failed = text, err
	if changed {
		m.fresh.Version++
		close(m.changed)
		m.changed = make(chan struct{})
	}
	close(m.polled)
	m.polled = make(chan struct{})
}

// loaded waits until everything was read once.
func (m *Model) loaded(ctx context.Context) error {
	for {
		m.mu.RLock()
		loaded, failed, polled := m.fresh.Loaded, m.failed, m.polled
		m.mu.RUnlock()
		switch {
		case loaded:
			return nil
		case failed != nil:
			return failed
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the state of the fleet is still being read: %w", ctx.Err())
		case <-m.stopped:
			return errStopped
		case <-polled:
		}
	}
}

// pollRest counts the dead letters, and reads now and then how full the streams are.
func (m *Model) pollRest(ctx context.Context, changed *bool) error {
	letters, err := dlq.NewStore(m.store.js, m.store.names, nil).CountByCode(ctx)
	if err != nil {
		return err
	}
	slices.SortStableFunc(letters, func(a, b dlq.Count) int { return cmp.Compare(b.Letters, a.Letters) })
	storage := m.storage
	if now := m.store.now(); now.Sub(m.storageAt) >= storageEvery || now.Before(m.storageAt) {
		if storage, err = m.store.Storage(ctx); err != nil {
			return err
		}
		m.storageAt = now
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Equal(letters, m.letters) || !slices.Equal(storage, m.storage) {
		m.letters, m.storage, *changed = letters, storage, true
	}
	return nil
}
