package status

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"slices"
	"time"

	"avatarworker/internal/streams"
)

// pollJobs reads the queues, and the jobs in them that no worker has been given.
func (m *Model) pollJobs(ctx context.Context, changed *bool) (at time.Time, err error) {
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
		m.waitingReader = streams.NewReader(m.store.js, name)
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
// delivered since the last poll.
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
		if !ok || span.empty() {
			delete(m.waiting, subject)
			*changed = *changed || len(table.rows) > 0
			continue
		}
		*changed = table.drop(span.first) || *changed
	}
}

// readWaiting reads the jobs that wait and were not read yet.
func (m *Model) readWaiting(ctx context.Context, state queueState, changed *bool) error {
	budget := streams.TailBudget
	switch {
	case !m.Freshness().Loaded:
		budget = 1 << 30
	case m.waitingReader.Single():
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
		found, err := m.waitingReader.Next(ctx, span.subject, next, streams.Batch)
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
	if table.odd < oddLimit || len(table.rows) > streams.Batch && now.Sub(m.rereadAt) < rereadEvery {
		return false
	}
	m.rereadAt = now
	return true
}
