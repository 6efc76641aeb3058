package status

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/streams"
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
		return cmp.Or(cmp.Compare(b.RunningMS, a.RunningMS), newest)
	case ByCost:
		return cmp.Or(cmp.Compare(b.SessionMS, a.SessionMS), newest)
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

// listWaiting adds the jobs without a record: of each queue first those that were never
// delivered, the newest first, then those that were handed back; as long as the time for
// counting lasts.
func (s *Store) listWaiting(ctx context.Context, q *Query, top *topRows, now time.Time) (Search, error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return Search{}, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	state, err := s.queueState(short, stream)
	search := Search{All: true}
	w := waitingReader{Store: s, messages: streams.NewReader(s.js, s.names.JobsStream()), looked: &search.Looked}
	hints := q.bodyHints()
	w.keep = func(raw *jetstream.RawStreamMsg) (Row, bool) {
		if len(hints) > 0 && !jobspec.IsProtobuf(raw.Header) && bytes.IndexByte(raw.Data, '\\') < 0 && !mayMatch(raw.Data, hints) {
			return Row{}, false
		}
		row := waitingRow(raw, now)
		row.AppID = cmp.Or(row.AppID, q.DefaultApp)
		return row, q.keeps(&row)
	}
	for _, part := range state.unsettled() {
		if queue, _ := s.names.QueueOf(part.subject); !chosen(q.Queues, queue) {
			continue
		}
		search.Of += part.jobs
		if err == nil {
			err = w.list(short, part, q, top)
		}
	}
	if err != nil && ctx.Err() == nil && short.Err() != nil {
		search.All, err = false, nil
	}
	search.Of = max(search.Of, search.Looked) // which the server may not have counted yet
	if err != nil {
		return search, fmt.Errorf("jobs in stream %s: %w", s.names.JobsStream(), err)
	}
	return search, nil
}

// span is the part of a subject's messages in which there are jobs without an outcome.
type span struct {
	subject    string
	first, end uint64 // sequences: from first, before end
	delivered  uint64 // the last one that was delivered; those after it never were
	// As the server counts them: all of them, those that were never delivered, and, a
	// moment earlier, the messages.
	jobs, never, stored uint64
}

// unsettled lists the spans by subject.
func (state queueState) unsettled() []span {
	return slices.SortedFunc(maps.Values(state.spans), func(a, b span) int { return cmp.Compare(a.subject, b.subject) })
}

// waitingWindow is how many sequences are read at a time at first.
const waitingWindow = 64

// waitingReader reads the jobs that have no record.
type waitingReader struct {
	*Store

	messages *streams.Reader
	keep     func(*jetstream.RawStreamMsg) (Row, bool) // false: it is not wanted
	looked   *uint64
}

// list adds the jobs of a span that wait, until older ones can't be among the first rows.
func (w *waitingReader) list(ctx context.Context, part span, q *Query, top *topRows) error {
	first, end := max(part.first, part.delivered+1), part.end
	for window := uint64(waitingWindow); end > first; window = min(window*2, mostWindow) {
		start := first
		if end-start > window {
			start = end - window
		}
		var oldest time.Time
		for seq := start; seq < end; {
			found, err := w.messages.Next(ctx, part.subject, seq, int(min(end-seq, streams.Batch)))
			if err != nil {
				return err
			}
			if len(found) == 0 {
				break
			}
			for _, raw := range found {
				if seq = raw.Sequence + 1; raw.Sequence >= end {
					break
				}
				if oldest.IsZero() {
					oldest = raw.Time
				}
				*w.looked++
				if row, ok := w.keep(raw); ok {
					top.add(row)
				}
			}
		}
		// Sequences are in the order of time.
		if !oldest.IsZero() && (oldest.Before(q.After) || top.complete(oldest)) {
			return nil
		}
		end = start
	}
	return w.handedBack(ctx, part, func(row Row) bool {
		top.add(row)
		return true
	})
}

// handedBack calls take for the jobs of a span that were delivered and have no record,
// the first one first, until it returns false. They are few among many that have one, far
// apart, so they are not read window by window.
func (w *waitingReader) handedBack(ctx context.Context, part span, take func(Row) bool) error {
	records := streams.NewReader(w.js, "KV_"+w.names.StateBucket())
	for seq := part.first; seq <= part.delivered; {
		found, err := w.messages.Next(ctx, part.subject, seq, streams.Batch)
		if err != nil || len(found) == 0 {
			return err
		}
		var rows []Row
		for _, raw := range found {
			if seq = raw.Sequence + 1; raw.Sequence > part.delivered {
				break
			}
			*w.looked++
			if row, ok := w.keep(raw); ok {
				rows = append(rows, row)
			}
		}
		runs, err := w.runs(ctx, records, rows)
		if err != nil {
			return err
		}
		for _, row := range rows {
			if runs[row.ID] < max(row.Run, 1) && !take(row) {
				return nil
			}
		}
	}
	return nil
}

// runs returns the run of the record of each job that has one.
func (w *waitingReader) runs(ctx context.Context, records *streams.Reader, rows []Row) (map[string]int, error) {
	var keys []string
	for _, row := range rows {
		if jobspec.ValidID(row.ID) {
			keys = append(keys, "$KV."+w.names.StateBucket()+"."+row.ID)
		}
	}
	found, err := records.Last(ctx, keys)
	if err != nil {
		return nil, err
	}
	runs := make(map[string]int, len(found))
	for _, raw := range found {
		if row, ok := readRow(raw.Data, time.Time{}); ok {
			runs[row.ID] = max(row.Run, 1)
		}
	}
	return runs, nil
}

// waitingRow makes a row of a stored job. One that is not valid has what can be
// read of it.
func waitingRow(raw *jetstream.RawStreamMsg, now time.Time) Row {
	ident, job, _ := jobspec.Read(stored{raw: raw})
	row := Row{
		ID: ident.ID, Run: ident.Run, State: StateWaiting, Queue: ident.Queue, Labels: map[string]string{},
		AgeMS: max(now.Sub(raw.Time), 0).Milliseconds(), published: raw.Time.UTC(),
	}
	body := &jobpb.Job{}
	if job != nil {
		body = job.Job
	} else if !jobspec.IsProtobuf(raw.Header) {
		var partial struct {
			AppID    string `json:"app_id"`
			AvatarID string `json:"avatar_id"`
		}
		_ = json.Unmarshal(raw.Data, &partial) // what can be read is read
		row.AppID, row.AvatarID = partial.AppID, partial.AvatarID
		return row
	}
	row.AppID, row.AvatarID, row.region = body.GetAppId(), body.GetAvatarId(), body.GetRegion()
	if labels := body.GetLabels(); labels != nil {
		row.Labels = labels
	}
	return row
}

// topRows keeps the first rows of an order.
type topRows struct {
	order Order
	limit int
	rows  []Row
	least *Row // of the rows kept, once there are more than limit
}

func (t *topRows) add(r Row) {
	if t.least != nil && t.order.compare(t.least, &r) < 0 {
		return
	}
	t.rows = append(t.rows, r)
	// One more than the limit says that there are more.
	if t.limit > 0 && len(t.rows) >= 2*(t.limit+1) {
		t.cut()
	}
}

// cut sorts the rows and drops those that are too many. Of two rows of one job
// the one of the later run stays, or that of the record, or the one published first.
func (t *topRows) cut() {
	slices.SortFunc(t.rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(b.Run, a.Run), cmp.Compare(waitingLast(a), waitingLast(b)), a.published.Compare(b.published))
	})
	t.rows = slices.CompactFunc(t.rows, func(a, b Row) bool { return a.ID == b.ID })
	slices.SortFunc(t.rows, func(a, b Row) int { return t.order.compare(&a, &b) })
	if t.limit > 0 && len(t.rows) > t.limit {
		t.rows = slices.Delete(t.rows, t.limit+1, len(t.rows))
		least := t.rows[t.limit]
		t.least = &least
	}
}

func waitingLast(r Row) int {
	if r.State == StateWaiting {
		return 1
	}
	return 0
}

// byAge reports whether the newest jobs are enough.
func (t *topRows) byAge() bool { return (t.order == ByAge || t.order == "") && t.limit > 0 }

// complete reports whether no job published before that time can be among the
// first rows any more.
func (t *topRows) complete(before time.Time) bool {
	if !t.byAge() {
		return false
	}
	if t.least == nil && len(t.rows) > t.limit {
		t.cut()
	}
	return t.least != nil && t.least.published.After(before)
}

func (t *topRows) end() (rows []Row, more bool) {
	t.cut()
	if t.limit > 0 && len(t.rows) > t.limit {
		return t.rows[:t.limit], true
	}
	if t.rows == nil {
		return []Row{}, false
	}
	return t.rows, false
}
