package usage

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/leader"
)

// Scan hands over the messages of a stream under filter that were stored since a
// time, oldest first; the zero time means the first one. It ends with what is
// stored now.
func Scan(ctx context.Context, js jetstream.JetStream, stream, filter string, since time.Time, f func(jetstream.Msg) error) error {
	c := jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}}
	if !since.IsZero() {
		c.DeliverPolicy, c.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	return scan(ctx, js, stream, c, f)
}

// scanIdle is how long the next message may take.
const scanIdle = 10 * time.Second

func scan(ctx context.Context, js jetstream.JetStream, stream string, c jetstream.OrderedConsumerConfig, f func(jetstream.Msg) error) error {
	c.InactiveThreshold = scanIdle
	var consumer jetstream.Consumer
	err := leader.Try(ctx, stream, func(ctx context.Context) (err error) {
		consumer, err = js.OrderedConsumer(ctx, stream, c)
		return err
	})
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	pending := consumer.CachedInfo().NumPending
	if pending == 0 {
		return nil
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(4096))
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	defer messages.Stop()
	for left := pending; left > 0; {
		n := min(left, scanAtOnce)
		if err := next(ctx, messages, n, f); err != nil {
			return fmt.Errorf("stream %s: %w", stream, err)
		}
		left -= n
	}
	return nil
}

// scanAtOnce messages are read under one context: making one costs as much as
// reading a message.
const scanAtOnce = 512

func next(ctx context.Context, messages jetstream.MessagesContext, n uint64, f func(jetstream.Msg) error) error {
	ctx, cancel := context.WithTimeout(ctx, scanIdle)
	defer cancel()
	for range n {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		if err := f(msg); err != nil {
			return err
		}
	}
	return nil
}
