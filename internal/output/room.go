package output

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
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

// RoomError means that a stream has too little room for a job's output.
type RoomError struct {
	Stream string
	Need   int64 // bytes that the job is expected to store
	Free   int64 // bytes left
	Max    int64 // max_bytes of the stream
}

// Never reports whether the job would not even fit into the empty stream, so that
// waiting would not help.
func (e *RoomError) Never() bool { return e.Need > roomIn(e.Max) }

// Error implements error.
func (e *RoomError) Error() string {
	if e.Never() {
		return fmt.Sprintf("stream %s takes %d bytes (max_bytes) in all and the job needs about %d; raise max_bytes, or send the speech in several jobs", e.Stream, e.Max, e.Need)
	}
	return fmt.Sprintf("stream %s has %d bytes left of %d (max_bytes) and the job needs about %d; it waits until something has aged out or was removed, or max_bytes is raised", e.Stream, e.Free, e.Max, e.Need)
}

// roomIn returns how much of the free bytes one job may fill. A sixteenth is left
// for jobs that were admitted at the same time.
func roomIn(free int64) int64 { return free - free/16 }

// Room returns a *RoomError if the stream has too little room for that many
// bytes. Any other error means that the stream could not be queried. A stream
// that discards its oldest messages has room as long as the job alone does not
// fill it.
func Room(ctx context.Context, js jetstream.JetStream, stream string, need int64) error {
	var info *jetstream.StreamInfo
	err := leader.Try(ctx, stream, func(ctx context.Context) error {
		s, err := js.Stream(ctx, stream)
		if err == nil {
			info = s.CachedInfo()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("look for room in stream %s: %w", stream, err)
	}
	limit := info.Config.MaxBytes
	if limit <= 0 {
		return nil
	}
	free := limit
	if info.Config.Discard == jetstream.DiscardNew {
		free = max(0, limit-int64(min(info.State.Bytes, math.MaxInt64)))
	}
	if need <= roomIn(free) {
		return nil
	}
	return &RoomError{Stream: stream, Need: need, Free: free, Max: limit}
}

// Room is the function Room in the bucket of recordings.
func (b *Recordings) Room(ctx context.Context, need int64) error {
	return Room(ctx, b.js, b.stream, need)
}

// StorageError is in the chain of an error if one of our streams did not store a
// session's output: the fault is neither the job's nor the backend's.
type StorageError struct {
	Store string // stream, or the subject it should be kept under
	Err   error
}

// Error implements error.
func (e *StorageError) Error() string { return e.Store + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *StorageError) Unwrap() error { return e.Err }

// storageError wraps err in a StorageError, unless the job itself is the reason
// why nothing was stored.
func storageError(store string, err error) error {
	if errors.Is(err, ErrReplaced) || errors.Is(err, ErrChunksMissing) {
		return err
	}
	return &StorageError{Store: store, Err: err}
}
