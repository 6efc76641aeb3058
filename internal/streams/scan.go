package streams

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

const (
	scanBatch   = 1024
	scanLife    = time.Minute
	scanCleanup = 2 * time.Second
)

// Scan calls keep for each message of a stream that the configuration selects, in
// the stream's order. It returns when keep returns false, or after the message
// that was the last one when Scan began. It acknowledges nothing. keep may take its
// time: a consumer that the server has removed meanwhile is replaced.
func Scan(ctx context.Context, stream jetstream.Stream, cfg jetstream.ConsumerConfig, keep func(jetstream.Msg, *jetstream.MsgMetadata) bool) error {
	cfg.AckPolicy = jetstream.AckNonePolicy
	cfg.MemoryStorage, cfg.Replicas, cfg.InactiveThreshold = true, 1, scanLife
	c, err := stream.CreateConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		short, cancel := context.WithTimeout(context.WithoutCancel(ctx), scanCleanup)
		defer cancel()
		_ = stream.DeleteConsumer(short, c.CachedInfo().Name) // else the server does it after scanLife
	}()
	received, last := uint64(0), uint64(0)
	for left := c.CachedInfo().NumPending; left > 0; {
		n, more, err := batch(ctx, c, topology.AtMost(int(min(left, scanBatch)), c.CachedInfo().Config), received, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
			last = meta.Sequence.Stream
			return keep(msg, meta)
		})
		received += uint64(n)
		left -= min(left, uint64(n))
		if n > 0 || ctx.Err() != nil {
			if err != nil || !more {
				return err
			}
			continue
		}
		info, infoErr := c.Info(ctx)
		switch {
		case errors.Is(infoErr, jetstream.ErrConsumerNotFound):
			if last > 0 {
				cfg.DeliverPolicy, cfg.OptStartSeq, cfg.OptStartTime = jetstream.DeliverByStartSequencePolicy, last+1, nil
			}
			if c, err = stream.CreateConsumer(ctx, cfg); err != nil {
				return err
			}
			received = 0
			left = min(left, c.CachedInfo().NumPending)
		case err != nil || infoErr != nil:
			return errors.Join(err, infoErr)
		default:
			left = min(left, info.NumPending) // the rest aged out, or was removed
		}
	}
	return nil
}

// batch calls keep for at most size messages; more is false once keep has returned
// false. Deliveries are numbered one after the other: a gap is a message that was
// lost on its way.
func batch(ctx context.Context, c jetstream.Consumer, size int, received uint64, keep func(jetstream.Msg, *jetstream.MsgMetadata) bool) (n int, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	messages, err := c.FetchNoWait(size)
	if err != nil {
		return 0, false, err
	}
	// Read the rest of the batch also after an early return: the client waits until
	// it has come.
	defer func() {
		for range messages.Messages() {
		}
	}()
	for msg := range messages.Messages() {
		meta, err := msg.Metadata()
		if err != nil {
			return n, false, fmt.Errorf("a message without metadata: %w", err)
		}
		n++
		if meta.Sequence.Consumer != received+uint64(n) {
			return n, false, fmt.Errorf("the connection to NATS was interrupted: run the command again")
		}
		if !keep(msg, meta) {
			return n, false, nil
		}
	}
	return n, true, messages.Error()
}
