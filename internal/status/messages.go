package status

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Messages calls f for each message that a stream keeps on a subject, in order, until f
// returns false. It makes no consumer: it needs to read the stream's state and its
// messages, and nothing else.
func (s *Store) Messages(ctx context.Context, stream, subject string, f func(*jetstream.RawStreamMsg) bool) error {
	if _, err := s.js.Stream(ctx, stream); err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	r := reader{js: s.js, stream: stream}
	for next := uint64(1); ; {
		found, err := r.next(ctx, subject, next, directBatch)
		if err != nil || len(found) == 0 {
			return err
		}
		for _, msg := range found {
			if !f(msg) {
				return nil
			}
			next = msg.Sequence + 1
		}
	}
}
