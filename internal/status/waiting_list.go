package status

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/streams"
)

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
