package status

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
	"unique"

	"avatarworker/internal/dlq"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
)

// Jobs lists jobs, as Store.Jobs does.
func (m *Model) Jobs(ctx context.Context, q Query) (List, error) {
	if err := m.loaded(ctx); err != nil {
		return List{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	now := m.now()
	list := List{Waiting: Search{All: true}}
	f := newCompactFilter(&q)
	best := &selection{order: q.Order, limit: q.Limit, now: now}
	add, counts := best.add, newGroups(q.By)
	if q.By != "" {
		add = func(r *compactRow) { counts.addCompact(r, q.DefaultApp) }
	}
	later := make(map[string]int32) // run of the jobs that wait, by id
	if q.wants(StateWaiting) {
		list.Waiting = m.selectWaiting(&q, f, add, later)
	}
	if !onlyWaiting(q.States) {
		for i := range m.records.rows {
			r := &m.records.rows[i]
			if r.id == "" || !f.keeps(r) {
				continue
			}
			if run, waits := later[r.id]; waits && run > r.run {
				continue
			}
			add(r)
		}
	}
	if q.By != "" {
		list.Rows = []Row{}
		list.Groups, list.More = counts.end(q.Limit)
		return list, nil
	}
	var rows []*compactRow
	rows, list.More = best.end()
	list.Rows = make([]Row, len(rows))
	for i, r := range rows {
		list.Rows[i] = r.row(now, q.DefaultApp)
	}
	return list, nil
}

// selectWaiting hands over the jobs that wait, but for those of which a record of the same
// run, or of a later one, is listed too. It notes in later the runs of those it adds.
func (m *Model) selectWaiting(q *Query, f *compactFilter, add func(*compactRow), later map[string]int32) Search {
	search := Search{All: !m.behind[m.store.names.JobsStream()]}
	// Of two messages of one job the one of the later run counts, or the first one.
	byID := make(map[string]*compactRow)
	for subject, table := range m.waiting {
		if queue, _ := m.store.names.QueueOf(subject); !chosen(q.Queues, queue) {
			continue
		}
		search.Looked += uint64(len(table.rows))
		span := m.spans[subject]
		search.Of += span.jobs
		for i := range table.rows {
			r := &table.rows[i]
			if !f.keeps(r) || !m.waits(r, span.delivered) {
				continue
			}
			if other := byID[r.id]; other == nil || r.run > other.run || r.run == other.run && r.seq < other.seq {
				byID[r.id] = r
			}
		}
	}
	for id, r := range byID {
		record := m.records.get(id)
		if record != nil && record.run >= r.run && !onlyWaiting(q.States) && f.keeps(record) {
			continue
		}
		later[id] = r.run
		add(r)
	}
	search.Of = max(search.Of, search.Looked)
	return search
}

// compactFilter is a Filter for rows in memory.
type compactFilter struct {
	*Query
	queues, apps, avatars, codes []word
	defaultApp                   word
	before, after                int64
}

func newCompactFilter(q *Query) *compactFilter {
	f := &compactFilter{Query: q, before: noTime, after: noTime, defaultApp: unique.Make(q.DefaultApp)}
	f.queues, f.apps, f.avatars = words(q.Queues), words(q.Apps), words(q.Avatars)
	for _, code := range q.Codes {
		f.codes = append(f.codes, unique.Make(string(code)))
	}
	f.before, f.after = nanos(q.Before), nanos(q.After)
	return f
}

func words(texts []string) []word {
	var list []word
	for _, text := range texts {
		list = append(list, unique.Make(text))
	}
	return list
}

func (f *compactFilter) keeps(r *compactRow) bool {
	app := r.app
	if r.state == StateWaiting && app == unique.Make("") {
		app = f.defaultApp
	}
	return f.wants(r.state) && chosen(f.queues, r.queue) && chosen(f.apps, app) && chosen(f.avatars, r.avatar) && chosen(f.codes, r.code) &&
		(f.before == noTime || r.published < f.before) && r.published >= f.after && hasLabels(r.labels, f.Labels)
}

// selection keeps the first rows of an order, as topRows does for rows that are read.
type selection struct {
	order Order
	limit int // 0: all
	now   time.Time
	found []candidate
	least *candidate // of those kept, once there are more than limit
}

type candidate struct {
	key int64 // what the order is by, before the time of publishing; larger is first
	row *compactRow
}

func compareCandidates(a, b candidate) int {
	return cmp.Or(cmp.Compare(b.key, a.key), cmp.Compare(b.row.published, a.row.published), cmp.Compare(a.row.id, b.row.id))
}

func (s *selection) add(r *compactRow) {
	c := candidate{row: r}
	switch running, connected := r.times(s.now); s.order {
	case ByRunning:
		c.key = int64(running)
	case ByCost:
		c.key = int64(connected)
	}
	if s.least != nil && compareCandidates(*s.least, c) < 0 {
		return
	}
	s.found = append(s.found, c)
	if s.limit > 0 && len(s.found) >= 2*(s.limit+1) {
		s.cut()
	}
}

func (s *selection) cut() {
	slices.SortFunc(s.found, compareCandidates)
	if s.limit > 0 && len(s.found) > s.limit {
		s.found = s.found[:s.limit+1]
		least := s.found[s.limit]
		s.least = &least
	}
}

func (s *selection) end() (rows []*compactRow, more bool) {
	s.cut()
	if more = s.limit > 0 && len(s.found) > s.limit; more {
		s.found = s.found[:s.limit]
	}
	for _, c := range s.found {
		rows = append(rows, c.row)
	}
	return rows, more
}

// Fleet returns the state of the fleet, as Store.Fleet does.
func (m *Model) Fleet(ctx context.Context) (*Fleet, error) {
	if err := m.loaded(ctx); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	f := m.sharedNow()
	f.CountedAll = !m.behind[m.state.Stream]
	f.DeadLetters = append(f.DeadLetters, m.letters...)
	f.Storage = append(f.Storage, m.storage...)
	queues := make(map[string]*Queue, len(m.queues))
	for name, q := range m.queues {
		m.countStates(&q)
		q.place()
		subject := m.store.names.Jobs(name)
		if table := m.waiting[subject]; table != nil && q.Waiting > 0 {
			waits := func(r compactRow) bool { return m.waits(&r, m.spans[subject].delivered) }
			if i := slices.IndexFunc(table.rows, waits); i >= 0 {
				q.OldestWaiting = timeOf(table.rows[i].published)
			}
		}
		queues[name] = &q
	}
	held := newHeldBy(m.spent)
	if number := heldNumber(lifecycle.HeldBudget); m.records.held[number] > 0 {
		for i := range m.records.rows {
			if r := &m.records.rows[i]; r.held == number {
				held.add(r.app.Value(), unpackLabels(r.labels))
			}
		}
	}
	held.fill(f)
	addWorkers(queues, f.Workers)
	for _, q := range queues {
		f.Queues = append(f.Queues, *q)
	}
	slices.SortFunc(f.Queues, func(a, b Queue) int { return cmp.Compare(a.Name, b.Name) })
	f.unread(m.unread)
	f.warn()
	return f, nil
}

// countStates counts the queue's jobs by the state in their record.
func (m *Model) countStates(q *Queue) {
	states := m.records.counts[unique.Make(q.Name)]
	q.Running, q.Retrying = states[lifecycle.StateRunning], states[lifecycle.StateRetrying]
	q.Held, q.Released = states[lifecycle.StateHeld], states[lifecycle.StateReleased]
}

// sharedNow is the part of the fleet's state that workers share.
func (m *Model) sharedNow() *Fleet {
	f := &Fleet{At: m.fresh.At, Queues: []Queue{}, Workers: []Worker{}, Circuits: []circuit.Circuit{}, DeadLetters: []dlq.Count{}, Budgets: []Budget{}, Warnings: []string{}, Storage: []Storage{}}
	for key, entry := range m.shared {
		f.learn(key, entry.value, entry.stored)
	}
	f.sort()
	return f
}

// Workers lists the workers, by id.
func (m *Model) Workers(ctx context.Context) ([]Worker, error) {
	if err := m.loaded(ctx); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sharedNow().Workers, nil
}

// Storage says how full the streams and buckets are, as of a few seconds ago.
func (m *Model) Storage(ctx context.Context) ([]Storage, error) {
	if err := m.loaded(ctx); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]Storage{}, m.storage...), nil
}

// Failures counts the error events of the last day.
func (m *Model) Failures(ctx context.Context) (Failures, error) {
	if err := m.loaded(ctx); err != nil {
		return Failures{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	f := m.failures.at(m.now())
	f.CountedAll = !m.behind[m.events.Stream]
	return f, nil
}

// Limits lists the session limits of which a session is in use, by name.
func (m *Model) Limits(ctx context.Context) ([]Limit, error) {
	if err := m.loaded(ctx); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.limits.list(), nil
}

// Job reads a job's record and its events, as Store.Job does. They are not kept in
// memory.
func (m *Model) Job(ctx context.Context, id string) (*Job, error) { return m.store.Job(ctx, id) }

// Alerts returns the newest alerts, newest first, at most limit (0: all there are).
func (m *Model) Alerts(ctx context.Context, limit int) ([]Event, error) {
	return m.store.Alerts(ctx, limit)
}

// Counts returns how many jobs there are by queue and state; those that wait in the
// queues are in it as the server counts them.
func (m *Model) Counts(ctx context.Context) (map[string]map[lifecycle.State]int, error) {
	if err := m.loaded(ctx); err != nil {
		return nil, fmt.Errorf("counting jobs: %w", err)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	counts := make(map[string]map[lifecycle.State]int)
	of := func(queue string) map[lifecycle.State]int {
		if counts[queue] == nil {
			counts[queue] = make(map[lifecycle.State]int)
		}
		return counts[queue]
	}
	for queue, states := range m.records.counts {
		for state, n := range states {
			of(queue.Value())[state] = n
		}
	}
	for name, q := range m.queues {
		m.countStates(&q)
		if q.place(); q.Waiting > 0 {
			of(name)[StateWaiting] = int(q.Waiting) // #nosec G115 -- a count
		}
	}
	return counts, nil
}
