package event

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/retry"
)

// Timeouts of PublishStored. One attempt must outlast a short pause of the
// server; all of them together an election, which takes about five seconds.
const (
	publishTimeout = 2 * time.Second
	publishInitial = 100 * time.Millisecond
	publishMaxWait = 2 * time.Second
)

// Publisher publishes events and waits until the stream has stored them. It is
// safe for concurrent use and starts no goroutines.
type Publisher struct {
	js     jetstream.JetStream
	names  Subjects
	source string
	log    zerolog.Logger
}

// NewPublisher returns a Publisher whose events name the worker as their source.
func NewPublisher(js jetstream.JetStream, names Subjects, worker string, log zerolog.Logger) *Publisher {
	return &Publisher{js: js, names: names, source: Source(worker), log: log}
}

// Publish returns nil once the stream has acknowledged the event. It repeats as
// PublishStored does.
func (p *Publisher) Publish(ctx context.Context, ev Event) error {
	_, err := p.PublishNew(ctx, ev)
	return err
}

// PublishNew is Publish, and reports whether the event was new to the stream.
func (p *Publisher) PublishNew(ctx context.Context, ev Event) (fresh bool, err error) {
	msg, err := ev.Message(p.names, p.source)
	if err != nil {
		return false, err
	}
	ack, err := PublishStored(ctx, p.js, msg, func(err error) {
		p.log.Warn().Err(err).Str("event", ev.ID).Str("subject", msg.Subject).
			Msg("event not acknowledged yet; publishing it again")
	})
	if err != nil {
		return false, fmt.Errorf("publish event %s: %w", ev.ID, err)
	}
	return !ack.Duplicate, nil
}

// PublishStored publishes msg, which has a Nats-Msg-Id, until its stream has
// acknowledged it or ctx ends; give ctx a deadline. An attempt without a reply
// may have been stored, so it is repeated with the same ID, which the stream
// stores once. Only a permanent error, such as a message larger than the server
// accepts, fails at once. unanswered, if not nil, is called with the error of the
// first failed attempt.
func PublishStored(ctx context.Context, js jetstream.JetStream, msg *nats.Msg, unanswered func(error)) (*jetstream.PubAck, error) {
	wait := publishInitial
	for attempt := 1; ; attempt++ {
		ack, err := publishOnce(ctx, js, msg)
		if err == nil || !retryable(err) {
			return ack, err
		}
		if attempt == 1 && unanswered != nil {
			unanswered(err)
		}
		if err := retry.Pause(ctx, wait, err); err != nil {
			return nil, fmt.Errorf("not acknowledged after %d attempts: %w", attempt, err)
		}
		wait = min(2*wait, publishMaxWait)
	}
}

func publishOnce(ctx context.Context, js jetstream.JetStream, msg *nats.Msg) (*jetstream.PubAck, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	return js.PublishMsg(ctx, msg)
}

// PublishAsync sends the event and returns a future of its acknowledgement, for
// events that nothing depends on. The caller handles the future, or accepts the
// loss.
func (p *Publisher) PublishAsync(ev Event) (jetstream.PubAckFuture, error) {
	msg, err := ev.Message(p.names, p.source)
	if err != nil {
		return nil, err
	}
	future, err := p.js.PublishMsgAsync(msg)
	if err != nil {
		return nil, fmt.Errorf("publish event %s: %w", ev.ID, err)
	}
	return future, nil
}

// retryable reports whether the same message may be stored if it is published
// again.
func retryable(err error) bool {
	for _, final := range []error{
		nats.ErrMaxPayload, nats.ErrBadSubject, nats.ErrConnectionClosed,
		nats.ErrHeadersNotSupported, nats.ErrPermissionViolation,
	} {
		if errors.Is(err, final) {
			return false
		}
	}
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.Code >= 500 // 503: no resources now; 4xx: refused for good
	}
	return true
}
