package jobs

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// nameByStream gives the message with this sequence its job id. A stream that was
// deleted and made again begins anew with its sequences, and nothing tells a
// worker of it. So it is asked when it was made, each time: an id of the stream
// before would be another job's, with an outcome perhaps.
func (w *Worker) nameByStream(ctx context.Context, seq uint64) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, w.o.SettleTimeout)
	defer cancel()
	for {
		info, err := w.streamInfo(ctx)
		if err == nil {
			return streamJobID(info.Created, seq), nil
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return "", err
		}
		if err := pause(ctx, storePause, err); err != nil {
			return "", fmt.Errorf("could not look when the jobs stream was made, which names a job without an id: %w", err)
		}
	}
}

func (w *Worker) streamInfo(ctx context.Context) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	return w.o.Jobs.Info(ctx)
}

// keeps tells whether the message of a job is in the jobs stream. It asks the
// stream's leader: a replica that lags behind would not have it yet.
func (w *Worker) keeps(ctx context.Context, seq uint64, jobID string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	msg, err := w.store.leader.GetMsg(w.o.Jobs.CachedInfo().Config.Name, seq, nats.Context(ctx))
	if errors.Is(err, nats.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("message %d of the jobs stream: %w", seq, err)
	}
	// In a stream that was made anew it is some other job's.
	body, _ := Decode(msg.Header, msg.Data) // an invalid one has no id of its own
	id := jobIDOf(msg.Header, body)
	if id == "" {
		id, err = w.nameByStream(ctx, seq)
	}
	return id == jobID, err
}
