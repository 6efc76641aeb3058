package status

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	scanBatch   = 2048
	scanLife    = time.Minute
	scanCleanup = 2 * time.Second
)

// Scan hands what a stream holds, as the configuration chooses, to keep in the
// order of the stream, until keep returns false or the end is reached as it was
// when the scan began. It acknowledges nothing and changes nothing.
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
	received := uint64(0)
	for left := c.CachedInfo().NumPending; left > 0; {
		n, more, err := batch(ctx, c, int(min(left, scanBatch)), received, keep)
		if err != nil || !more {
			return err
		}
		received += uint64(n)
		left -= min(left, uint64(n))
		if n == 0 {
			info, err := c.Info(ctx)
			if err != nil {
				return err
			}
			left = min(left, info.NumPending) // the rest aged out, or was removed
		}
	}
	return nil
}

// batch hands on at most size messages; more is false when keep had enough. Each
// delivery has the number after the last one: a gap is a message that was lost
// on its way.
func batch(ctx context.Context, c jetstream.Consumer, size int, received uint64, keep func(jetstream.Msg, *jetstream.MsgMetadata) bool) (n int, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	messages, err := c.FetchNoWait(size)
	if err != nil {
		return 0, false, err
	}
	// Whoever leaves early takes the rest of the batch: until it has come, the
	// client waits for it.
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
			return n, false, fmt.Errorf("the connection to NATS was interrupted: run it again")
		}
		if !keep(msg, meta) {
			return n, false, nil
		}
	}
	return n, true, messages.Error()
}
