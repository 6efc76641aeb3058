package status

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"time"

	"avatarworker/internal/streams"
)

// pollJobs reads the queues, and the jobs in them.
func (m *Model) pollJobs(ctx context.Context, changed *bool) (at time.Time, state queueState, err error) {
	name := m.store.names.JobsStream()
	stream, err := m.store.js.Stream(ctx, name)
	if err != nil {
		return at, state, fmt.Errorf("stream %s: %w", name, err)
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
	if state, err = m.store.queueState(ctx, stream); err != nil {
		return at, state, err
	}
	m.takeQueues(state, changed)
	return at, state, m.readWaiting(ctx, state, changed)
}

// takeQueues takes what the server says of the queues, and forgets the jobs before the
// first one without an outcome.
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
	m.spans = state.spans
	for subject, table := range m.waiting {
		span, ok := state.spans[subject]
		if !ok {
			delete(m.waiting, subject)
			*changed = *changed || len(table.rows) > 0
			continue
		}
		*changed = table.drop(span.first) || *changed
	}
}

// readWaiting reads the jobs that were not read yet.
func (m *Model) readWaiting(ctx context.Context, state queueState, changed *bool) error {
	budget := streams.TailBudget
	switch {
	case !m.Freshness().Loaded:
		budget = 1 << 30
	case m.waitingReader.Single():
		budget = singleBudget
	}
	for _, span := range state.unsettled() {
		if err := m.readSpan(ctx, span, m.waitingTable(span), &budget, changed); err != nil {
			return fmt.Errorf("jobs in stream %s: %w", m.store.names.JobsStream(), err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	name, more := m.store.names.JobsStream(), budget <= 0
	*changed = *changed || m.behind[name] != more
	m.behind[name] = more
	return nil
}

// settleWaiting forgets the jobs whose record, read after them, has an outcome, and reads
// those of a queue again if for a while they have not been the server's.
func (m *Model) settleWaiting(ctx context.Context, state queueState, changed *bool) error {
	for _, span := range state.unsettled() {
		table := m.waitingTable(span)
		m.mu.Lock()
		table.rows = slices.DeleteFunc(table.rows, func(r compactRow) bool {
			return !m.waits(&r, span.delivered) && m.records.get(r.id).state.Final()
		})
		odd := m.odd(span, table)
		m.mu.Unlock()
		if !odd {
			continue
		}
		budget, again := streams.TailBudget, &waitingTable{}
		if m.waitingReader.Single() {
			budget = singleBudget
		}
		if err := m.readSpan(ctx, span, again, &budget, changed); err != nil {
			return fmt.Errorf("jobs in stream %s: %w", m.store.names.JobsStream(), err)
		}
		m.mu.Lock()
		m.waiting[span.subject] = again
		m.mu.Unlock()
	}
	return nil
}

// waits reports whether a job that was read has no record of its run. One that was never
// delivered waits in any case.
func (m *Model) waits(r *compactRow, delivered uint64) bool {
	if r.seq > delivered {
		return true
	}
	record := m.records.get(r.id)
	return record == nil || record.run < r.run
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

// odd reports whether the jobs of a queue have to be read again, because the server has
// counted other numbers for a while: fewer or more that were never delivered, or fewer in
// all, since some were removed from the middle of the stream.
func (m *Model) odd(span span, table *waitingTable) bool {
	var all, never uint64
	for i := range table.rows {
		if seq := table.rows[i].seq; seq < span.end {
			all++
			if seq > span.delivered {
				never++
			}
		}
	}
	if never == span.never && all <= span.stored {
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
