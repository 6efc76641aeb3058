package usage

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Stored is a usage record as the stream keeps it.
type Stored struct {
	Seq uint64
	ID  string // its Nats-Msg-Id
	Record
	Replaced *Record // the estimate that it replaces; nil: none
}

// Entry is what a record adds to the sums of its app, queue, labels and day.
type Entry struct {
	Record Record
	Totals Totals
}

// Entries are what the message adds: its session, and what it takes back of the
// estimate that it replaces. Whichever of the two is stored first, the session
// counts once in the end, and as the exact record says.
func (s *Stored) Entries() []Entry {
	if s.Replaced == nil {
		return []Entry{{s.Record, s.Record.Totals()}}
	}
	return []Entry{{*s.Replaced, Totals{}.Minus(s.Replaced.Totals())}, {s.Record, s.Record.Totals()}}
}

// Parse reads a message of the stream of usage records. An error means that the
// message is not one that a worker has published.
func Parse(header nats.Header, data []byte, seq uint64) (Stored, error) {
	s := Stored{Seq: seq, ID: header.Get(nats.MsgIdHdr)}
	if err := json.Unmarshal(data, &s.Record); err != nil {
		return s, fmt.Errorf("usage record %d: %w", seq, err)
	}
	if !s.Record.valid() {
		return s, fmt.Errorf("usage record %d: job_id, run, session, app_id or confirmed_at is missing, or a number is negative", seq)
	}
	if text := header.Get(HeaderReplaces); text != "" {
		s.Replaced = &Record{}
		if err := json.Unmarshal([]byte(text), s.Replaced); err != nil || !s.Replaced.valid() {
			return s, fmt.Errorf("usage record %d: its header %s is not a usage record", seq, HeaderReplaces)
		}
	}
	return s, nil
}

func (r Record) valid() bool {
	return r.JobID != "" && r.Run > 0 && r.Session >= 0 && r.AppID != "" && !r.ConfirmedAt.IsZero() && r.ConnectedMS >= 0 && r.Credits >= 0
}

// After hands over the usage records whose sequence is above seq, oldest first, and
// returns the newest sequence that it has looked at. What is not a usage record is
// handed to foreign.
func After(ctx context.Context, js jetstream.JetStream, stream, filter string, seq uint64, f func(Stored) error, foreign func(error)) (last uint64, err error) {
	last = seq
	c := jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: seq + 1}
	err = scan(ctx, js, stream, c, func(msg jetstream.Msg) error {
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		last = meta.Sequence.Stream
		s, err := Parse(msg.Headers(), msg.Data(), last)
		if err != nil {
			foreign(err)
			return nil
		}
		return f(s)
	})
	return last, err
}
