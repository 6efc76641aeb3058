package storage

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/output"
	"avatarworker/internal/topology"
)

const (
	// checkLife is how long the result of a check is used.
	checkLife = 5 * time.Second
	// checkTimeout bounds one check: a stream without a leader does not answer.
	checkTimeout = 4 * time.Second
	// firstPause is how long a stream that failed a session is left alone; each
	// further failure doubles it, up to maxPause.
	firstPause = 5 * time.Second
	maxPause   = 5 * time.Minute
	// reserveLife is how long space is kept for a job whose session has not started.
	reserveLife = time.Minute
	// trialLife is how long a job that tries a stream again holds the others: its session
	// may last for hours.
	trialLife = time.Minute
	// leastFrames is the speech of the longest frame. A stream that does not take
	// as much is of no use to any job.
	leastFrames = 4 * time.Second
	// largestFrame is the size of the largest messages that frames make.
	largestFrame = 64 << 10
	// largestUsage is that of a usage record: its labels may have 8 KiB as JSON.
	largestUsage = 16 << 10
	// ampleSpace is so much space that the length of speech in objects is not looked up.
	ampleSpace = 256 << 20
)

// probeToken takes the place of a job's id, or an object's name, in the
// subject of a probe. It can be neither.
const probeToken = "~probe"

// stream is a stream of ours as this worker knows it. A bucket is one too.
type stream struct {
	js     jetstream.JetStream
	name   string
	probes []string // subjects that it is written to; none: it is only read
	// largest is the size of the largest messages that it is to take.
	largest int

	checking sync.Mutex // held during a check

	mu       sync.Mutex
	at       time.Time // of the last check; zero: not checked yet, or invalidated
	space    output.Space
	err      error     // why no job that needs it is started; nil: they are
	need     int64     // space that must be there before err is over
	proven   bool      // it takes what is written, as far as a probe can say
	failed   int       // sessions in a row that it has failed
	failedAt time.Time // when it failed the last one
	rest     time.Time // not checked before this time
	reserved map[string]*reservation
}

var _ Store = (*stream)(nil)

func newStream(js jetstream.JetStream, name string, probes ...string) *stream {
	return &stream{js: js, name: name, probes: probes, largest: largestFrame, reserved: make(map[string]*reservation)}
}

// Name implements Store.
func (s *stream) Name() string { return topology.Object(s.name) }

// reservation is space kept for a job.
type reservation struct {
	bytes   int64
	running bool
	since   time.Time // of its start, of its end, or when it was reserved
	over    bool
}

// Fault implements Store.
func (s *stream) Fault() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Invalidate implements Store.
func (s *stream) Invalidate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.proven = time.Time{}, false
}

// HasAmpleSpace implements Store.
func (s *stream) HasAmpleSpace() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.space.Max == 0 || s.space.Free > ampleSpace
}

// Check implements Store. It asks the server unless it did so within checkLife. A
// stream that failed is checked by Retry alone.
func (s *stream) Check(ctx context.Context) error {
	if known, err := s.known(); known {
		return err
	}
	s.checking.Lock()
	defer s.checking.Unlock()
	if known, err := s.known(); known {
		return err
	}
	return s.ask(ctx, 0)
}

// checkSpace is Check, and also returns an error if there is less space than need.
func (s *stream) checkSpace(ctx context.Context, need int64) error {
	if err := s.Check(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		if s.err = s.space.For(need); s.err != nil {
			s.need = need
		}
	}
	return s.err
}

func (s *stream) known() (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil || time.Since(s.at) < checkLife, s.err
}

// Retry implements Store.
func (s *stream) Retry(ctx context.Context) {
	s.checking.Lock()
	defer s.checking.Unlock()
	s.mu.Lock()
	rests, need := time.Now().Before(s.rest), s.need
	s.mu.Unlock()
	if !rests {
		_ = s.ask(ctx, need) // stored for Check and Fault
	}
}

// ask asks the server about the stream, and stores whether it has that much space.
func (s *stream) ask(ctx context.Context, need int64) error {
	since := time.Now()
	space, err := s.inspect(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.err = time.Now(), err
	if err != nil {
		s.proven = false
		return err
	}
	s.space, s.proven = space, true
	for id, r := range s.reserved {
		if r.over && r.since.Before(since) || !r.over && !r.running && time.Since(r.since) > reserveLife {
			delete(s.reserved, id) // what it has stored is in the stream's size now
		}
	}
	if need > 0 {
		s.err = space.For(need)
	}
	if s.err == nil {
		s.need = 0
	}
	return s.err
}

func (s *stream) inspect(ctx context.Context) (output.Space, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	space, err := output.ReadSpace(ctx, s.js, s.name)
	if err != nil || len(s.probes) == 0 {
		return space, err
	}
	if space.MaxMessage > 0 && space.MaxMessage < s.largest {
		return space, fmt.Errorf("%s takes messages of %d bytes at most (max_msg_size), and what jobs store in it is larger; raise it to %d", topology.Object(s.name), space.MaxMessage, s.largest)
	}
	s.mu.Lock()
	proven := s.proven
	s.mu.Unlock()
	if proven {
		return space, nil
	}
	for _, subject := range s.probes {
		if err := s.probe(ctx, subject); err != nil {
			return space, err
		}
	}
	return space, nil
}

// probe publishes a message that the stream refuses, because it expects a sequence
// that the stream can't be at. That refusal shows that the stream exists, accepts
// messages, and that this worker may publish to it.
func (s *stream) probe(ctx context.Context, subject string) error {
	_, err := s.js.PublishMsg(ctx, nats.NewMsg(subject), jetstream.WithExpectLastSequence(1<<62))
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil // another stream's
	case errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant):
		return nil
	case errors.As(err, &api) && api.Code < http.StatusInternalServerError, errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s does not take a message on %s; look at the stream, and at this worker's permission to publish there: %w", topology.Object(s.name), subject, err)
	default:
		return fmt.Errorf("write to %s: %w", topology.Object(s.name), err)
	}
}

// Reserve implements Store.
func (s *stream) Reserve(jobID string, left, all int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if s.failed > 0 && s.tried(jobID) {
		return fmt.Errorf("%s has failed the last session that wrote to it, and another job tries it first", topology.Object(s.name))
	}
	whole := &output.NoSpaceError{Stream: s.name, Need: all, Free: s.space.Free, Max: s.space.Max}
	if s.space.Max > 0 && whole.Never() && s.usable() {
		return errors.Wrap(errors.CodeInvalidJob, errors.PhaseJob, whole, "the job's frames can never be stored")
	}
	least := min(left, output.EstimateBytes(unknownSpeech))
	if err := s.space.For(least); err != nil {
		s.err, s.need = err, least
		return err
	}
	if err := s.fits(jobID, left); err != nil {
		return err
	}
	s.reserved[jobID] = &reservation{bytes: left, since: time.Now()}
	return nil
}

// usable reports whether the empty stream has space for any job at all.
func (s *stream) usable() bool {
	least := output.NoSpaceError{Need: output.EstimateBytes(leastFrames), Max: s.space.Max}
	return !least.Never()
}

// tried reports whether another job tries the stream at the moment. Those that were
// running when it failed do not: they may have nothing to write for hours. A session
// that has lasted for trialLife shows that the stream is well, however it ends.
func (s *stream) tried(jobID string) (tries bool) {
	for id, r := range s.reserved {
		switch {
		case id == jobID || r.over || !r.since.After(s.failedAt):
		case time.Since(r.since) < trialLife:
			tries = true
		case r.running:
			s.failed = 0
			return false
		}
	}
	return tries
}

// fits reports whether there is that much space in addition to what is reserved for other jobs.
func (s *stream) fits(jobID string, need int64) error {
	for id, r := range s.reserved {
		if id != jobID && !s.space.Evicts {
			need += r.bytes
		}
	}
	return s.space.For(need)
}

// Begin implements Store.
func (s *stream) Begin(jobID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.reserved[jobID]; r != nil {
		r.running, r.since = true, time.Now()
	}
}

// End implements Store.
func (s *stream) End(jobID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.reserved[jobID]; r != nil {
		r.running, r.over, r.since = false, true, time.Now()
	}
	if err == nil {
		s.failed = 0
	}
	if !errors.Is(err, jobs.ErrStorage) {
		return
	}
	s.err, s.proven = err, false
	s.failedAt = time.Now()
	s.rest = s.failedAt.Add(min(firstPause<<min(s.failed, 8), maxPause))
	s.failed++
}
