package output

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

const (
	// bytesPerSecond is the size of the envelopes for a second of speech, at any
	// sample rate (docs/protocol.md, section 4).
	bytesPerSecond = 12_460
	// storedPercent is what a stream counts for them, in percent: headers,
	// lengths, subjects and the variation of speech are included.
	storedPercent = 104
	// storedOnce is what a stream counts once: the object's entry, or the first
	// frame.
	storedOnce = 4 << 10
)

// EstimateBytes estimates how many bytes a stream counts for the frames of that
// much speech, as frames or as a recording.
func EstimateBytes(speech time.Duration) int64 {
	if speech <= 0 {
		return storedOnce
	}
	bytes := speech.Seconds()*bytesPerSecond*storedPercent/100 + storedOnce
	return int64(math.Ceil(min(bytes, math.MaxInt64/4)))
}

// NoSpaceError means that a stream has too little space for a job's output.
type NoSpaceError struct {
	Stream string
	Need   int64 // bytes that the job is expected to store
	Free   int64 // bytes left
	Max    int64 // max_bytes of the stream
}

// Never reports whether the job would not even fit into the empty stream, so that
// waiting would not help.
func (e *NoSpaceError) Never() bool { return e.Need > shareOf(e.Max) }

// Error implements error.
func (e *NoSpaceError) Error() string {
	if e.Never() {
		return fmt.Sprintf("%s takes %d bytes (max_bytes) in all and the job needs about %d; raise max_bytes, or send the speech in several jobs", topology.Object(e.Stream), e.Max, e.Need)
	}
	return fmt.Sprintf("%s has %d bytes left of %d (max_bytes) and the job needs about %d; it waits until something has aged out or was removed, or max_bytes is raised", topology.Object(e.Stream), e.Free, e.Max, e.Need)
}

// shareOf returns how much of the free bytes one job may fill. A sixteenth is left
// for jobs that were admitted at the same time.
func shareOf(free int64) int64 { return free - free/16 }

// Space is what a stream had left when it was looked at.
type Space struct {
	Stream string
	Free   int64 // bytes left; math.MaxInt64: no limit
	Max    int64 // max_bytes of the stream; 0: no limit
	Evicts bool  // the oldest messages make room for new ones
	// MaxMessage is the size of the largest message that the stream takes; 0: as
	// large as the server takes.
	MaxMessage int
}

// ReadSpace asks a stream's leader how much is left. A stream that discards its oldest
// messages has room as long as one job alone does not fill it.
func ReadSpace(ctx context.Context, js jetstream.JetStream, stream string) (Space, error) {
	var info *jetstream.StreamInfo
	err := leader.Try(ctx, stream, func(ctx context.Context) error {
		s, err := js.Stream(ctx, stream)
		if err == nil {
			info = s.CachedInfo()
		}
		return err
	})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return Space{}, fmt.Errorf("%s is gone: it was deleted, and 'avatarworker setup' makes it again: %w", topology.Object(stream), err)
	}
	if err != nil {
		return Space{}, fmt.Errorf("look for space in %s: %w", topology.Object(stream), err)
	}
	s := Space{
		Stream: stream, Free: math.MaxInt64, Max: max(0, info.Config.MaxBytes),
		Evicts: info.Config.Discard == jetstream.DiscardOld, MaxMessage: int(max(0, info.Config.MaxMsgSize)),
	}
	switch {
	case s.Max == 0:
	case s.Evicts:
		s.Free = s.Max
	default:
		s.Free = max(0, s.Max-int64(min(info.State.Bytes, math.MaxInt64)))
	}
	return s, nil
}

// For returns a *NoSpaceError if there is no space for so many bytes.
func (s Space) For(need int64) error {
	if s.Max == 0 || need <= shareOf(s.Free) {
		return nil
	}
	return &NoSpaceError{Stream: s.Stream, Need: need, Free: s.Free, Max: s.Max}
}
