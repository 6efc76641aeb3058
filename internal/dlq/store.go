package dlq

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

// ErrNoLetter is in the chain of an error about a sequence where there is no
// dead letter (any more).
var ErrNoLetter = errors.New("not found: it was replayed or removed, or it aged out; 'avatarworker dlq ls' lists the dead letters")

// Store is what operators use.
type Store struct {
	js    jetstream.JetStream
	names topology.Names
	now   func() time.Time // nil: the server is asked
}

// NewStore opens nothing yet. now is the time by the server's clock, by which jobs expire;
// nil: the server is asked for it.
func NewStore(js jetstream.JetStream, names topology.Names, now func() time.Time) *Store {
	return &Store{js: js, names: names, now: now}
}

func (s *Store) stream(ctx context.Context) (jetstream.Stream, error) {
	stream, err := s.js.Stream(ctx, s.names.DLQStream())
	if err != nil {
		return nil, s.unavailable(err)
	}
	return stream, nil
}

func (s *Store) unavailable(err error) error {
	return s.names.Unavailable("stream "+s.names.DLQStream(), err)
}

// List gives the letters that the filter keeps, at most limit (0: all of
// them), a batch at a time: it may be left at any time, and letters may be
// replayed or removed while it runs. An error ends it.
func (s *Store) List(ctx context.Context, f Filter, limit int) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		stream, err := s.stream(ctx)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		given := 0
		keep := func(e Entry) bool {
			if !f.keeps(e) {
				return true
			}
			given++
			return yield(e, nil) && (limit <= 0 || given < limit)
		}
		l := lister{js: s.js, stream: stream, names: s.names, filter: f, limit: limit}
		walk := l.oldest
		if f.Newest {
			walk = l.newest
		}
		if err := walk(ctx, keep); err != nil {
			yield(Entry{}, fmt.Errorf("listing dead letters: %w", err))
		}
	}
}

// Show gives one letter with the job's bytes.
func (s *Store) Show(ctx context.Context, seq uint64) (Letter, error) {
	raw, err := s.message(ctx, seq)
	if err != nil {
		return Letter{}, err
	}
	data, err := body(raw.Header, raw.Data)
	if err != nil {
		return Letter{}, fmt.Errorf("dead letter %d: %w", seq, err)
	}
	l := Letter{
		Entry:  entry(s.names, stored{seq: seq, subject: raw.Subject, header: raw.Header, time: raw.Time, size: len(raw.Data)}),
		Header: raw.Header,
		Data:   data,
	}
	if event := raw.Header.Get(HeaderError); json.Valid([]byte(event)) {
		l.Error = json.RawMessage(event)
	}
	return l, nil
}

// Count is how many letters there are of a class and code.
type Count struct {
	Class   errors.Class `json:"class"`
	Code    errors.Code  `json:"code"`
	Letters uint64       `json:"letters"`
}

// CountByCode counts all letters, by class and code, without reading them.
func (s *Store) CountByCode(ctx context.Context) ([]Count, error) {
	stream, err := s.stream(ctx)
	if err != nil {
		return nil, err
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(s.names.AllDLQ()))
	if err != nil {
		return nil, fmt.Errorf("counting dead letters: %w", err)
	}
	counts := make([]Count, 0, len(info.State.Subjects))
	for subject, n := range info.State.Subjects {
		class, code, _ := s.names.DLQOf(subject)
		counts = append(counts, Count{Class: errors.Class(class), Code: errors.Code(code), Letters: n})
	}
	slices.SortFunc(counts, func(a, b Count) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Code, b.Code))
	})
	return counts, nil
}

// Remove removes a letter for good: its job is not run again.
func (s *Store) Remove(ctx context.Context, seq uint64) error {
	stream, err := s.stream(ctx)
	if err != nil {
		return err
	}
	err = stream.DeleteMsg(ctx, seq)
	if err == nil {
		return nil
	}
	// The server's answer for a message that is not there is the one for other
	// failures too, so look.
	if _, readErr := s.message(ctx, seq); errors.Is(readErr, ErrNoLetter) {
		return readErr
	}
	return fmt.Errorf("removing dead letter %d: %w", seq, err)
}

// message reads a letter from the stream's leader.
func (s *Store) message(ctx context.Context, seq uint64) (*jetstream.RawStreamMsg, error) {
	msg, err := leader.Message(ctx, s.js, s.names.DLQStream(), seq)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return nil, fmt.Errorf("dead letter %d: %w", seq, ErrNoLetter)
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return nil, s.unavailable(err)
	case err != nil:
		return nil, fmt.Errorf("dead letter %d: %w", seq, err)
	}
	return msg, nil
}
