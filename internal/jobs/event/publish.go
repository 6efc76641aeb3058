package event

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/ack"
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
	nc     *nats.Conn
	names  Subjects
	source string
	log    zerolog.Logger
}

// NewPublisher returns a Publisher whose events name the worker as their source.
func NewPublisher(nc *nats.Conn, names Subjects, worker string, log zerolog.Logger) *Publisher {
	return &Publisher{nc: nc, names: names, source: Source(worker), log: log}
}

// Publish returns nil once the stream has acknowledged the event. It repeats as
// PublishStored does.
func (p *Publisher) Publish(ctx context.Context, ev Event) error {
	_, err := p.publish(ctx, time.Time{}, ev)
	return err
}

// PublishWithin is Publish that gives up after limit.
func (p *Publisher) PublishWithin(ctx context.Context, limit time.Duration, ev Event) error {
	_, err := p.publish(ctx, time.Now().Add(limit), ev)
	return err
}

// PublishNew is Publish, and reports whether the event was new to the stream.
func (p *Publisher) PublishNew(ctx context.Context, ev Event) (fresh bool, err error) {
	return p.publish(ctx, time.Time{}, ev)
}

// publish gives up at the deadline, or when ctx ends if there is none.
func (p *Publisher) publish(ctx context.Context, deadline time.Time, ev Event) (fresh bool, err error) {
	msg, err := ev.Message(p.names, p.source)
	if err != nil {
		return false, err
	}
	stored, err := publishUntil(ctx, deadline, p.nc, msg, func(err error) {
		p.log.Warn().Err(err).Str("event", ev.ID).Str("subject", msg.Subject).
			Msg("event not acknowledged yet; publishing it again")
	})
	if err != nil {
		return false, fmt.Errorf("publish event %s: %w", ev.ID, err)
	}
	return !stored.Duplicate, nil
}

// PublishStored publishes msg, which has a Nats-Msg-Id, until its stream has
// acknowledged it or ctx ends; give ctx a deadline. An attempt without a reply
// may have been stored, so it is repeated with the same ID, which the stream
// stores once. Only a permanent error, such as a message larger than the server
// accepts, fails at once. unanswered, if not nil, is called with the error of the
// first failed attempt.
func PublishStored(ctx context.Context, nc *nats.Conn, msg *nats.Msg, unanswered func(error)) (jetstream.PubAck, error) {
	return publishUntil(ctx, time.Time{}, nc, msg, unanswered)
}

// publishUntil is PublishStored that gives up at the deadline, if that is not zero.
// It makes one timer for each attempt, and none for all of them together.
func publishUntil(ctx context.Context, deadline time.Time, nc *nats.Conn, msg *nats.Msg, unanswered func(error)) (jetstream.PubAck, error) {
	wait := publishInitial
	for attempt := 1; ; attempt++ {
		limit := publishTimeout
		if !deadline.IsZero() {
			limit = min(time.Until(deadline), limit)
		}
		stored, err := publishOnce(ctx, limit, nc, msg)
		if err == nil || !retryable(err) {
			return stored, err
		}
		if attempt == 1 && unanswered != nil {
			unanswered(err)
		}
		if deadline.IsZero() || wait < time.Until(deadline) {
			err = retry.Pause(ctx, wait, err)
		} else {
			err = errors.Join(context.DeadlineExceeded, err)
		}
		if err != nil {
			return jetstream.PubAck{}, fmt.Errorf("not acknowledged after %d attempts: %w", attempt, err)
		}
		wait = min(2*wait, publishMaxWait)
	}
}

func publishOnce(ctx context.Context, limit time.Duration, nc *nats.Conn, msg *nats.Msg) (jetstream.PubAck, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return ack.Publish(ctx, nc, msg)
}

// Send sends the event and asks for no acknowledgement, for events that nothing
// depends on: one that the stream can't store now is lost.
func (p *Publisher) Send(ev Event) error {
	msg, err := ev.Message(p.names, p.source)
	if err == nil {
		err = p.nc.PublishMsg(msg)
	}
	if err != nil {
		return fmt.Errorf("publish event %s: %w", ev.ID, err)
	}
	return nil
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
