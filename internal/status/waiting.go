package status

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/leader"
)

// Waiting is a job in the queue that has no record yet.
type Waiting struct {
	Queue     string    `json:"queue"`
	StreamSeq uint64    `json:"stream_seq"`
	Published time.Time `json:"published_at"`
}

// Waiting looks for a job among the unsettled ones in the queues, and returns nil if
// it did not find it. all is false if the search took longer than the time for
// counting: then it has not read all of them.
func (s *Store) Waiting(ctx context.Context, id string) (found *Waiting, all bool, err error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return nil, false, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	from, err := s.unsettledFrom(short, stream)
	for subject, seq := range from {
		if err == nil && found == nil {
			found, err = s.waitingOn(short, subject, seq, id)
		}
	}
	switch {
	case err == nil:
		return found, true, nil
	case ctx.Err() == nil && short.Err() != nil:
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("jobs in stream %s: %w", s.names.JobsStream(), err)
}

// unsettledFrom is, for each subject with jobs, the sequence before which all
// are settled.
func (s *Store) unsettledFrom(ctx context.Context, stream jetstream.Stream) (map[string]uint64, error) {
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(s.names.AllJobs()))
	if err != nil {
		return nil, err
	}
	from := make(map[string]uint64, len(info.State.Subjects))
	for subject := range info.State.Subjects {
		from[subject] = max(info.State.FirstSeq, 1)
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

func (s *Store) waitingOn(ctx context.Context, subject string, seq uint64, id string) (*Waiting, error) {
	for {
		raw, err := leader.Next(ctx, s.js, s.names.JobsStream(), seq, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, nil //nolint:nilnil // it is not there, which is not an error
		}
		if err != nil {
			return nil, err
		}
		if mentions(raw, id) {
			if ident, _, _ := jobspec.Read(stored{raw: raw}); ident.ID == id {
				return &Waiting{Queue: ident.Queue, StreamSeq: raw.Sequence, Published: raw.Time.UTC()}, nil
			}
		}
		seq = raw.Sequence + 1
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

// stored is a stored message as a delivery would have it, as far as jobs.Read
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
