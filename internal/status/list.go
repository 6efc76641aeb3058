package status

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// Order is how a list is sorted.
type Order string

const (
	ByAge     Order = "age"     // newest first
	ByRunning Order = "running" // those that run the longest first
	ByCost    Order = "cost"    // those with the most connected time first
)

// Orders lists the orders.
func Orders() []Order { return []Order{ByAge, ByRunning, ByCost} }

func (o Order) compare(a, b *Row) int {
	newest := cmp.Or(b.published.Compare(a.published), cmp.Compare(a.ID, b.ID))
	switch o {
	case ByRunning:
		return cmp.Or(cmp.Compare(b.running, a.running), newest)
	case ByCost:
		return cmp.Or(cmp.Compare(b.connected, a.connected), newest)
	default:
		return newest
	}
}

// Query asks for a list of jobs.
type Query struct {
	Filter
	Order Order
	Limit int // most rows, or groups; 0: no limit
	By    By  // not empty: the jobs are counted, and not listed
	// DefaultApp is the app of a job that names none and has no record yet, as the
	// worker's configuration will have it.
	DefaultApp string
}

// List is what a Query finds.
type List struct {
	Rows   []Row
	Groups []Group // of a Query with By, those with the most jobs first
	More   bool    // there are more than Limit
	// Waiting says how many of the jobs that only wait were read.
	Waiting Search
}

// Search says how many of the jobs that wait in the queues were looked at.
type Search struct {
	Looked uint64 `json:"looked"`
	Of     uint64 `json:"of"`
	All    bool   `json:"all"` // there was time for all of them
}

// Jobs lists jobs: those with a record, and those that only wait in their queue. A
// job that is delivered meanwhile is in the list once. Of a list with a limit no
// more than about twice that many rows are in memory.
func (s *Store) Jobs(ctx context.Context, q Query) (List, error) {
	now, err := s.serverTime(ctx)
	if err != nil {
		return List{}, err
	}
	top := &topRows{order: q.Order, limit: q.Limit}
	if q.By != "" {
		top.limit = 0 // all of them are counted
	}
	list := List{Waiting: Search{All: true}}
	// In this order: a job on its way from the queue to its record is seen twice
	// at worst.
	if q.wants(StateWaiting) {
		if list.Waiting, err = s.listWaiting(ctx, &q, top, now); err != nil {
			return List{}, err
		}
	}
	if !onlyWaiting(q.States) {
		if err := s.listRecords(ctx, &q, top, now); err != nil {
			return List{}, err
		}
	}
	list.Rows, list.More = top.end()
	if q.By != "" {
		counts := newGroups(q.By)
		for i := range list.Rows {
			counts.addRow(&list.Rows[i])
		}
		list.Rows = []Row{}
		list.Groups, list.More = counts.end(q.Limit)
	}
	return list, nil
}

func onlyWaiting(states []lifecycle.State) bool { return len(states) == 1 && states[0] == StateWaiting }

// serverTime is the time by the clock of the server that keeps the jobs.
func (s *Store) serverTime(ctx context.Context) (time.Time, error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return time.Time{}, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	if at := stream.CachedInfo().TimeStamp; !at.IsZero() {
		return at.UTC(), nil
	}
	return s.now().UTC(), nil
}

func (s *Store) listRecords(ctx context.Context, q *Query, top *topRows, now time.Time) error {
	bucket := s.names.StateBucket()
	stream, err := s.js.Stream(ctx, "KV_"+bucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", bucket, err)
	}
	hints := q.hints()
	var oldest time.Time // when the first message of the window was stored
	fresh := true
	window := uint64(firstWindow)
	if !top.byAge() && q.After.IsZero() {
		window = math.MaxUint64 // all of them have to be read
	}
	err = backwards(ctx, stream, s.recordsSubject(), window, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		if fresh {
			oldest, fresh = meta.Timestamp, false
		}
		if !mayMatch(msg.Data(), hints) {
			return true
		}
		if row, ok := readRow(msg.Data(), now); ok && q.keeps(&row) {
			top.add(row)
		}
		return true
	}, func() bool {
		if fresh {
			return true // the window was empty
		}
		fresh = true
		// A record is never stored before its job was published, but for the
		// difference between two clocks.
		published := oldest.Add(clockSlack)
		return !published.Before(q.After) && !top.complete(published)
	})
	if err != nil {
		return fmt.Errorf("records in bucket %s: %w", bucket, err)
	}
	return nil
}

// hints are texts of which each record that the filter keeps has at least one of
// every group: what has none needs no reading.
func (f *Filter) hints() (h hints) {
	group(&h, f.States)
	group(&h, f.Queues)
	group(&h, f.Apps)
	group(&h, f.Avatars)
	group(&h, f.codeTexts())
	for _, value := range f.Labels {
		group(&h, []string{value})
	}
	return h
}

// bodyHints are the same for the body of a job as it was published: what it says of
// itself.
func (q *Query) bodyHints() (h hints) {
	if !slices.Contains(q.Apps, q.DefaultApp) {
		group(&h, q.Apps)
	}
	group(&h, q.Avatars)
	for _, value := range q.Labels {
		group(&h, []string{value})
	}
	return h
}

// hints are groups of texts.
type hints [][][]byte

func group[T ~string](h *hints, values []T) {
	var texts [][]byte
	for _, value := range values {
		if !jobspec.ValidID(string(value)) {
			return // it may be escaped
		}
		texts = append(texts, []byte(`"`+string(value)+`"`))
	}
	if len(texts) > 0 {
		*h = append(*h, texts)
	}
}

func mayMatch(data []byte, hints hints) bool {
	for _, group := range hints {
		if !slices.ContainsFunc(group, func(text []byte) bool { return bytes.Contains(data, text) }) {
			return false
		}
	}
	return true
}
