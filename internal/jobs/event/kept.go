package event

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Kept looks for events in their stream.
type Kept struct {
	Stream jetstream.Stream
	Names  Subjects
}

// Has reports whether the event is the last of its subject in the stream. One with its
// id that is older than since is of an earlier job whose id was used again, and proves
// nothing.
func (k Kept) Has(ctx context.Context, ev Event, since time.Time) (bool, error) {
	msg, err := k.Stream.GetLastMsgForSubject(ctx, ev.Subject(k.Names))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	at, err := time.Parse(time.RFC3339Nano, msg.Header.Get("ce-time"))
	return err == nil && msg.Header.Get("ce-id") == ev.ID && !at.Before(since), nil
}
