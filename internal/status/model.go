package status

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fleet"
)

const (
	// DefaultEvery is how often a Model looks for what is new.
	DefaultEvery = time.Second
	// storageEvery is how often it looks how full the streams are.
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
// about 250 bytes for each job, and follows what changes: each look costs NATS about
// a dozen small requests, and what was overwritten between two looks is not read. It
// has no consumer while nothing is new, and none on the jobs stream at all.
//
// While NATS is away it answers with what it knew; Freshness says so. It goes on
// where it was once NATS is back, and reads everything again if a stream or bucket
// was made again.
type Model struct {
	store *Store
	every time.Duration

	poke       chan struct{} // a look is wanted now
	budgetsDue chan struct{} // a budget was set, so they are to be read now
	stopped    chan struct{} // closed when Run has ended: nothing more is read
	stopOnce   sync.Once

	// Used by the look under way only.
	state, fleetBucket, events tail
	waitingReader              reader
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
	pending  map[string]uint64 // jobs that wait, by subject, as the server counts them
	letters  []dlq.Count
	storage  []Storage
	spent    []budget.Spending // budgets that are spent
	unread   error             // why the budgets are not known
	fresh    Freshness
	failed   error         // of the last look
	offset   time.Duration // of the server's clock to this one's
	changed  chan struct{} // closed when the version rises
	looked   chan struct{} // closed when a look ends
	begun    uint64        // number of the last look that began
	done     uint64        // number of the last look that ended
}

type sharedEntry struct {
	value    []byte
	stored   time.Time
	revision uint64
}

// Freshness says how current a Model is.
type Freshness struct {
	// Version rises with each change. It begins at another number in each process.
	Version uint64    `json:"version"`
	At      time.Time `json:"at"`     // of the last look that succeeded, by the server's clock
	Loaded  bool      `json:"loaded"` // everything was read once
	// Error is why the last look failed; "": it did not. What is shown is then as old
	// as At says.
	Error string `json:"error,omitempty"`
}

// NewModel returns a Model that knows nothing until it runs. every is the time between
// two looks; 0 is DefaultEvery.
func NewModel(store *Store, every time.Duration) *Model {
	if every <= 0 {
		every = DefaultEvery
	}
	names := store.names
	m := &Model{
		store: store, every: every, poke: make(chan struct{}, 1), budgetsDue: make(chan struct{}, 1), stopped: make(chan struct{}),
		state:       tail{js: store.js, stream: "KV_" + names.StateBucket(), subject: "$KV." + names.StateBucket() + ".>"},
		fleetBucket: tail{js: store.js, stream: "KV_" + names.FleetBucket(), subject: "$KV." + names.FleetBucket() + ".>"},
		events:      tail{js: store.js, stream: names.EventsStream(), subject: names.AllErrors(), headersOnly: true, sparse: true},
		records:     newRecordTable(), waiting: make(map[string]*waitingTable), limits: newLimitKeys(), shared: make(map[string]sharedEntry),
		failures: newFailureCounts(names), behind: make(map[string]bool), changed: make(chan struct{}), looked: make(chan struct{}),
	}
	m.events.since = func() time.Time { return beginOfDay(m.serverNow()) }
	m.waitingReader = reader{js: store.js, stream: names.JobsStream()}
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
		m.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-m.poke:
		}
	}
}

// Refresh returns after a look that began after the call, with its error. It is for
// callers that changed something and want to see it. Run must be running.
func (m *Model) Refresh(ctx context.Context) error {
	m.mu.RLock()
	wanted := m.begun + 1
	m.mu.RUnlock()
	select {
	case m.poke <- struct{}{}:
	default: // a look is wanted already
	}
	for {
		m.mu.RLock()
		looked, ended, failed := m.looked, m.done >= wanted, m.failed
		m.mu.RUnlock()
		if ended {
			return failed
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-looked:
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
// one. Several changes between two looks are one.
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

// look reads what is new. The jobs that wait come before the records: a job on its way
// from its queue to its record is seen twice at worst.
func (m *Model) look(ctx context.Context) {
	m.mu.Lock()
	m.begun++
	m.mu.Unlock()
	changed := false
	for _, r := range []*reader{&m.waitingReader, &m.state.reader, &m.fleetBucket.reader, &m.events.reader} {
		r.retryDirect()
	}
	at, err := m.lookAtAll(ctx, &changed)
	if ctx.Err() == nil {
		m.ended(at, changed, err)
	}
}

// lookAtAll reads what is new until the connection is lost: a request that is under way
// then is never answered.
func (m *Model) lookAtAll(ctx context.Context, changed *bool) (time.Time, error) {
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
	at, err := m.lookAtEach(ctx, changed)
	if err != nil && errors.Is(context.Cause(ctx), errNotConnected) {
		err = errNotConnected
	}
	return at, err
}

// errStopped: the model does not run any more, and had not read all there was.
var errStopped = errors.New("the state of the fleet is not read any more: this process ends")

var errNotConnected = errors.New("there is no connection to NATS")

// lookAtEach reads what is new, part by part.
func (m *Model) lookAtEach(ctx context.Context, changed *bool) (time.Time, error) {
	at, err := m.lookAtJobs(ctx, changed)
	for _, part := range []struct {
		tail *tail
		f    follower
	}{
		{&m.state, m.stateFollower(changed)},
		{&m.fleetBucket, m.fleetFollower(changed)},
		{&m.events, m.eventsFollower(changed)},
	} {
		if err != nil {
			break
		}
		var more bool
		_, more, err = part.tail.read(ctx, part.f)
		if errors.Is(err, jetstream.ErrStreamNotFound) && part.tail == &m.fleetBucket {
			err = nil // as a Store has it: no workers
		}
		m.mu.Lock()
		*changed = *changed || m.behind[part.tail.stream] != more
		m.behind[part.tail.stream] = more
		m.mu.Unlock()
	}
	if err == nil {
		err = m.lookAtRest(ctx, changed)
	}
	return at, err
}

// ended notes how a look ended and tells those who wait for that.
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
	close(m.looked)
	m.looked = make(chan struct{})
}

// loaded waits until everything was read once.
func (m *Model) loaded(ctx context.Context) error {
	for {
		m.mu.RLock()
		loaded, failed, looked := m.fresh.Loaded, m.failed, m.looked
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
		case <-looked:
		}
	}
}

func (m *Model) stateFollower(changed *bool) follower {
	prefix := "$KV." + m.store.names.StateBucket() + "."
	type change struct {
		key string
		row compactRow
		ok  bool
		msg *tailed
	}
	return follower{
		reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.records, m.limits, m.fresh.Loaded = newRecordTable(), newLimitKeys(), false
			*changed = true
		},
		take: func(batch []tailed) {
			// What takes long is done before others have to wait.
			changes := make([]change, 0, len(batch))
			for i := range batch {
				key := strings.TrimPrefix(batch[i].subject, prefix)
				c := change{key: key, msg: &batch[i]}
				if !strings.Contains(key, ".") {
					c.row, c.ok = compactRecord(batch[i].data, batch[i].seq)
				}
				changes = append(changes, c)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, c := range changes {
				switch {
				case strings.Contains(c.key, "."):
					*changed = m.limits.learn(c.key, c.msg.data, c.msg.seq) || *changed
				case c.ok && c.row.id == c.key:
					m.records.put(c.row)
					*changed = true
				default:
					*changed = m.records.remove(c.key) || *changed
				}
			}
		},
		expired: func(first uint64) {
			m.mu.Lock()
			defer m.mu.Unlock()
			*changed = m.records.expire(first) || *changed
			*changed = m.limits.expire(first) || *changed
		},
	}
}

func (m *Model) fleetFollower(changed *bool) follower {
	prefix := "$KV." + m.store.names.FleetBucket() + "."
	return follower{
		reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.shared = make(map[string]sharedEntry)
			*changed = true
		},
		take: func(batch []tailed) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, msg := range batch {
				key := strings.TrimPrefix(msg.subject, prefix)
				switch {
				case strings.HasPrefix(key, budget.Prefix):
					m.budgetSet()
				case !strings.HasPrefix(key, fleet.Prefix) && !strings.HasPrefix(key, circuit.Prefix):
					continue
				case len(msg.data) == 0:
					delete(m.shared, key)
				default:
					m.shared[key] = sharedEntry{value: slices.Clone(msg.data), stored: msg.stored, revision: msg.seq}
				}
				*changed = true
			}
		},
		expired: func(first uint64) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for key, entry := range m.shared {
				if entry.revision < first {
					delete(m.shared, key)
					*changed = true
				}
			}
		},
	}
}

func (m *Model) eventsFollower(changed *bool) follower {
	return follower{
		reset: func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.failures = newFailureCounts(m.store.names)
			*changed = true
		},
		take: func(batch []tailed) {
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, msg := range batch {
				m.failures.add(msg.subject, msg.stored)
				*changed = true
			}
		},
		expired: func(uint64) {}, // it keeps a day, whatever the stream keeps
	}
}

// lookAtJobs reads the queues, and the jobs in them that no worker has been given.
func (m *Model) lookAtJobs(ctx context.Context, changed *bool) (at time.Time, err error) {
	name := m.store.names.JobsStream()
	stream, err := m.store.js.Stream(ctx, name)
	if err != nil {
		return at, fmt.Errorf("stream %s: %w", name, err)
	}
	info := stream.CachedInfo()
	at = info.TimeStamp.UTC()
	m.mu.Lock()
	m.offset = at.Sub(m.store.now())
	if !info.Created.Equal(m.jobsCreated) {
		m.jobsCreated = info.Created
		m.waiting, m.fresh.Loaded, *changed = make(map[string]*waitingTable), false, true
		m.waitingReader = reader{js: m.store.js, stream: name}
	}
	m.mu.Unlock()
	state, err := m.store.queueState(ctx, stream)
	if err != nil {
		return at, err
	}
	m.takeQueues(state, changed)
	return at, m.readWaiting(ctx, state, changed)
}

// takeQueues takes what the server says of the queues, and forgets the jobs that were
// delivered since the last look.
func (m *Model) takeQueues(state queueState, changed *bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	queues := make(map[string]Queue, len(state.queues))
	for name, q := range state.queues {
		queues[name] = *q
	}
	if !reflect.DeepEqual(queues, m.queues) {
		m.queues, *changed = queues, true
	}
	m.pending = make(map[string]uint64, len(state.spans))
	for subject, span := range state.spans {
		m.pending[subject] = span.jobs
	}
	for subject, table := range m.waiting {
		span, ok := state.spans[subject]
		if !ok || span.jobs == 0 || span.first >= span.end {
			delete(m.waiting, subject)
			*changed = *changed || len(table.rows) > 0
			continue
		}
		*changed = table.drop(span.first) || *changed
	}
}

// readWaiting reads the jobs that wait and were not read yet.
func (m *Model) readWaiting(ctx context.Context, state queueState, changed *bool) error {
	budget := tailBudget
	switch {
	case !m.Freshness().Loaded:
		budget = 1 << 30
	case m.waitingReader.single:
		budget = singleBudget
	}
	for _, span := range state.undelivered() {
		table := m.waitingTable(span)
		if err := m.readSpan(ctx, span, table, &budget, changed); err != nil {
			return fmt.Errorf("jobs in stream %s: %w", m.store.names.JobsStream(), err)
		}
		if budget > 0 && m.odd(span, table) {
			again := &waitingTable{}
			if err := m.readSpan(ctx, span, again, &budget, changed); err != nil {
				return fmt.Errorf("jobs in stream %s: %w", m.store.names.JobsStream(), err)
			}
			m.mu.Lock()
			m.waiting[span.subject] = again
			m.mu.Unlock()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	name, more := m.store.names.JobsStream(), budget <= 0
	*changed = *changed || m.behind[name] != more
	m.behind[name] = more
	return nil
}

// readSpan reads the jobs of a span that are not in the table, as far as the budget
// goes.
func (m *Model) readSpan(ctx context.Context, span span, table *waitingTable, budget *int, changed *bool) error {
	for next := max(table.next, span.first); next < span.end && *budget > 0; {
		found, err := m.waitingReader.next(ctx, span.subject, next, directBatch)
		if err != nil || len(found) == 0 {
			return err
		}
		rows := make([]compactRow, len(found))
		for i, raw := range found {
			row := waitingRow(raw, time.Time{})
			rows[i] = compactWaiting(&row, raw.Sequence)
			next = raw.Sequence + 1
		}
		*budget -= len(found)
		m.mu.Lock()
		table.rows, table.next, *changed = append(table.rows, rows...), next, true
		m.mu.Unlock()
	}
	return nil
}

func (m *Model) waitingTable(span span) *waitingTable {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := m.waiting[span.subject]
	if table == nil {
		table = &waitingTable{}
		m.waiting[span.subject] = table
	}
	return table
}

// odd reports whether the jobs of a queue have to be read again: for a while their
// number has not been the server's, so some were removed from its middle.
func (m *Model) odd(span span, table *waitingTable) bool {
	inSpan, _ := slices.BinarySearchFunc(table.rows, span.end, func(r compactRow, end uint64) int { return cmp.Compare(r.seq, end) })
	if uint64(inSpan) == span.jobs { // #nosec G115 -- a count
		table.odd = 0
		return false
	}
	table.odd++
	now := m.store.now()
	if table.odd < oddLimit || len(table.rows) > directBatch && now.Sub(m.rereadAt) < rereadEvery {
		return false
	}
	m.rereadAt = now
	return true
}

// lookAtRest counts the dead letters, and looks now and then how full the streams are.
func (m *Model) lookAtRest(ctx context.Context, changed *bool) error {
	letters, err := dlq.NewStore(m.store.js, m.store.names, m.store.now).CountByCode(ctx)
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
