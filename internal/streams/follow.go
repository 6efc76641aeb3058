package streams

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// followLife is how long the server keeps the consumer of a reader that went away:
// one that stops does not delete it. While it reads, a pull request is open.
const followLife = 30 * time.Second

// followBatch is how many messages a reader asks for at a time.
const followBatch = 500

// Follow hands a stream's messages to take as they come, until take fails or ctx
// ends. It goes on after the server was away.
func Follow(ctx context.Context, stream jetstream.Stream, cfg jetstream.OrderedConsumerConfig, take func(jetstream.Msg, *jetstream.MsgMetadata) error) error {
	cfg.InactiveThreshold = followLife
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return fmt.Errorf("following %s: %w", stream.CachedInfo().Config.Name, err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(topology.AtMost(followBatch, consumer.CachedInfo().Config)))
	if err != nil {
		return fmt.Errorf("following %s: %w", stream.CachedInfo().Config.Name, err)
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return errors.Join(err, ctx.Err())
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if err := take(msg, meta); err != nil {
			return err
		}
	}
}
