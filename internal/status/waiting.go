package status

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/streams"
)

// Waiting is a job in the queue that has no record yet.
type Waiting struct {
	Queue     string    `json:"queue"`
	StreamSeq uint64    `json:"stream_seq"`
	Published time.Time `json:"published_at"`
	Run       int       `json:"run"`
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
	from, err := s.unsettledFrom(short, stream, &looked)
	for subject, seq := range from {
		if err == nil && found == nil {
			found, err = s.waitingOn(short, r, subject, seq, id, &looked)
		}
	}
	switch {
	case err == nil:
		return found, looked, nil
	case ctx.Err() == nil && short.Err() != nil:
		looked.All = false
		return nil, looked, nil
	}
	return nil, looked, fmt.Errorf("jobs in stream %s: %w", s.names.JobsStream(), err)
}

// unsettledFrom is, for each subject with jobs, the sequence before which all
// are settled.
func (s *Store) unsettledFrom(ctx context.Context, stream jetstream.Stream, looked *Search) (map[string]uint64, error) {
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(s.names.AllJobs()))
	if err != nil {
		return nil, err
	}
	from := make(map[string]uint64, len(info.State.Subjects))
	for subject, jobs := range info.State.Subjects {
		from[subject] = max(info.State.FirstSeq, 1)
		looked.Of += jobs
	}
	list := stream.ListConsumers(ctx)
	for consumer := range list.Info() {
		subject := consumer.Config.FilterSubject
		if first, ok := from[subject]; ok {
			from[subject] = max(first, consumer.AckFloor.Stream+1)
		}
	}
	return from, list.Err()
}

func (s *Store) waitingOn(ctx context.Context, r *streams.Reader, subject string, seq uint64, id string, looked *Search) (*Waiting, error) {
	for {
		batch, err := r.Next(ctx, subject, seq, streams.Batch)
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
				return &Waiting{Queue: ident.Queue, StreamSeq: raw.Sequence, Published: raw.Time.UTC(), Run: ident.Run}, nil
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
