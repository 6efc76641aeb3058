package status

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// storageTime bounds the reading of one of them: a user without the permission gets no
// answer.
const storageTime = 1500 * time.Millisecond

// FullAt is the fill from which a stream or bucket is warned of.
const FullAt = 0.8

// Storage is how full a stream or bucket is.
type Storage struct {
	Object   string  `json:"object"` // "stream AVATAR_JOBS", "bucket AVATAR_STATE"
	Messages uint64  `json:"messages"`
	Bytes    int64   `json:"bytes"`
	MaxBytes int64   `json:"max_bytes,omitempty"` // 0: no limit
	Fill     float64 `json:"fill"`                // bytes of the limit, 0 to 1; 0 without a limit
	Remedy   string  `json:"remedy,omitempty"`    // what to do if it is nearly full
}

// storageOf reads how full a stream is from its server's answer.
func storageOf(kept topology.Kept, info *jetstream.StreamInfo) Storage {
	s := Storage{Object: kept.Object, Messages: info.State.Msgs, Bytes: int64(info.State.Bytes), MaxBytes: max(info.Config.MaxBytes, 0)}
	if s.MaxBytes > 0 {
		s.Fill = float64(s.Bytes) / float64(s.MaxBytes)
	}
	if s.Fill >= FullAt {
		s.Remedy = "the oldest of it is dropped when it is full; raise its limit if that is too early"
		if info.Config.Discard == jetstream.DiscardNew {
			s.Remedy = "it refuses what is new when it is full; raise its limit, or find out why so much stays in it"
		}
	}
	return s
}

// Storage says how full the streams and buckets are. Those that are not there, or
// that this user may not see, are left out.
func (s *Store) Storage(ctx context.Context) ([]Storage, error) {
	list := []Storage{}
	for _, kept := range s.names.Kept() {
		short, cancel := context.WithTimeout(ctx, storageTime)
		stream, err := s.js.Stream(short, kept.Stream)
		cancel()
		switch {
		case err == nil:
			list = append(list, storageOf(kept, stream.CachedInfo()))
		case errors.Is(err, jetstream.ErrStreamNotFound):
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%s: %w", kept.Object, err)
		}
	}
	return list, nil
}
