package status

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/streams"
)

// Waiting is a job in the queue that has no record yet.
type Waiting struct {
	Queue     string    `json:"queue"`
	StreamSeq uint64    `json:"stream_seq"`
	Published time.Time `json:"published_at"`
	Run       int       `json:"run"`
	// What its message says.
	AppID    string            `json:"app_id"`
	AvatarID string            `json:"avatar_id"`
	Labels   map[string]string `json:"labels"`
	// Delivered is set for a job that a worker was given and handed back, or has in hand.
	Delivered bool `json:"delivered"`
	// WaitsFor is what such a job waits for, as far as workers publish it.
	WaitsFor string `json:"waits_for,omitempty"`

	// CancelRequested is set for a job that ends when a worker has it next.
	CancelRequested bool `json:"cancel_requested,omitempty"`

	region string
}

// explain fills in what a job waits for that was delivered. What can't be read is left out.
func (s *Store) explain(ctx context.Context, w *Waiting) {
	if !w.Delivered {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storageTime)
	defer cancel()
	workers, _ := s.Workers(ctx) // a user who may not look gets no answer
	limits, _ := s.Limits(ctx)
	w.WaitsFor = w.waitsFor(workers, limits)
}

func (w *Waiting) waitsFor(workers []Worker, limits []Limit) string {
	var list, refused []string
	app := w.AppID
	for _, worker := range workers {
		if _, serves := worker.Queues[w.Queue]; !serves || worker.Lost || worker.Draining || len(worker.RefusedKeys) == 0 {
			continue
		}
		// A job that names no app has the worker's default one.
		if app = cmp.Or(app, worker.RefusedKeys[0]); slices.Contains(worker.RefusedKeys, app) {
			refused = append(refused, worker.WorkerID)
		}
	}
	if len(refused) > 0 {
		list = append(list, fmt.Sprintf("a worker whose API key of app %s the backend accepts (it refuses that of %s: correct it there)", app, strings.Join(refused, ", ")))
	}
	job := limit.Job{App: w.AppID, Avatar: w.AvatarID, Region: w.region, Queue: w.Queue, Labels: w.Labels}
	keys := limit.Keys()
	for name := range w.Labels {
		keys = append(keys, "label."+name)
	}
	for _, l := range limits {
		if slices.ContainsFunc(keys, func(key string) bool {
			value, _ := job.Value(key)
			return value != "" && limit.Name(key, value) == l.Name
		}) {
			list = append(list, fmt.Sprintf("a free session of limit %s (%d in use)", l.Name, l.InUse))
		}
	}
	if len(list) == 0 {
		return "a session limit, or for the worker that is processing it"
	}
	return strings.Join(list, ", or for ")
}

// Waiting looks for a job among the unsettled ones in the queues, and returns nil if
// it did not find it. looked.All is false if the search took longer than the time for
// counting: then it has not read all of them.
func (s *Store) Waiting(ctx context.Context, id string) (found *Waiting, looked Search, err error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return nil, looked, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	looked.All = true
	r := streams.NewReader(s.js, s.names.JobsStream())
	state, err := s.queueState(short, stream)
	for _, part := range state.unsettled() {
		looked.Of += part.jobs
		if err == nil && found == nil {
			found, err = s.waitingOn(short, r, part, id, &looked)
		}
	}
	switch {
	case err == nil && found != nil:
		s.explain(ctx, found)
		return found, looked, nil
	case err == nil:
		return found, looked, nil
	case ctx.Err() == nil && short.Err() != nil:
		looked.All = false
		return nil, looked, nil
	}
	return nil, looked, fmt.Errorf("jobs in stream %s: %w", s.names.JobsStream(), err)
}

func (s *Store) waitingOn(ctx context.Context, r *streams.Reader, part span, id string, looked *Search) (*Waiting, error) {
	for seq := part.first; ; {
		batch, err := r.Next(ctx, part.subject, seq, streams.Batch)
		if err != nil || len(batch) == 0 {
			return nil, err
		}
		for _, raw := range batch {
			looked.Looked++
			seq = raw.Sequence + 1
			if !mentions(raw, id) {
				continue
			}
			if ident, _, _ := jobspec.Read(stored{raw: raw}); ident.ID == id {
				row := waitingRow(raw, s.now())
				return &Waiting{
					Queue: ident.Queue, StreamSeq: raw.Sequence, Published: raw.Time.UTC(), Run: ident.Run,
					AppID: row.AppID, AvatarID: row.AvatarID, Labels: row.Labels, Delivered: raw.Sequence <= part.delivered, region: row.region,
				}, nil
			}
		}
	}
}

// mentions reports whether the id occurs in a message at all, which is cheaper than
// decoding the job.
func mentions(raw *jetstream.RawStreamMsg, id string) bool {
	for _, values := range raw.Header {
		for _, value := range values {
			if value == id {
				return true
			}
		}
	}
	return bytes.Contains(raw.Data, []byte(id))
}

// stored is a stored message as a delivery would have it, as far as jobspec.Read
// looks.
type stored struct {
	jetstream.Msg

	raw *jetstream.RawStreamMsg
}

func (m stored) Subject() string      { return m.raw.Subject }
func (m stored) Data() []byte         { return m.raw.Data }
func (m stored) Headers() nats.Header { return m.raw.Header }

func (m stored) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: m.raw.Sequence}, Timestamp: m.raw.Time}, nil
}
