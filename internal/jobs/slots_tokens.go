package jobs

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

const (
	// slotPause is the wait after a request that failed.
	slotPause = time.Second
	// prepareTimeout bounds looking after the tokens of one app.
	prepareTimeout = 10 * time.Second
)

// The names of tokens. Workers of all versions must agree on them.

func (s *Slots) tokens(app string) string { return s.prefix + "." + keyToken(app) }

func (s *Slots) token(app string, n int) string { return s.tokens(app) + "." + strconv.Itoa(n) }

// claimKey is where the token's holder writes itself down.
func (s *Slots) claimKey(subject string) string {
	return "slot" + strings.TrimPrefix(subject, s.prefix)
}

// prepare puts the missing tokens into the stream and opens the app's consumer,
// made with this ack wait where it is missing. It may be repeated at any time.
func (s *Slots) prepare(ctx context.Context, slots *appSlots, wait time.Duration) error {
	for n := 1; n <= slots.limit; n++ {
		msg := nats.NewMsg(s.token(slots.app, n))
		_, err := s.js.PublishMsg(ctx, msg, jetstream.WithExpectLastSequencePerSubject(0))
		if err != nil && !tokenExists(err) {
			return err
		}
	}
	name := keyToken(slots.app)
	consumer, err := s.stream.Consumer(ctx, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		consumer, err = s.stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
			Durable: name, FilterSubject: s.tokens(slots.app) + ".*", AckPolicy: jetstream.AckExplicitPolicy,
			AckWait: wait, MaxDeliver: -1, MaxAckPending: -1, DeliverPolicy: jetstream.DeliverAllPolicy,
		})
		if errors.Is(err, jetstream.ErrConsumerExists) || errors.Is(err, jetstream.ErrConsumerNameAlreadyInUse) {
			consumer, err = s.stream.Consumer(ctx, name) // another worker, with another lease, was quicker
		}
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	slots.consumer, slots.looked = consumer, time.Now()
	s.mu.Unlock()
	return nil
}

func ackWait(c jetstream.Consumer) time.Duration { return c.CachedInfo().Config.AckWait }

// Server answers to a token that is there already.
const (
	codeWrongLastSequence           = 10071
	codeWrongLastSequenceReplicated = 10164
	codeTooManyForSubject           = 10077
)

func tokenExists(err error) bool {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	switch api.ErrorCode {
	case codeWrongLastSequence, codeWrongLastSequenceReplicated, codeTooManyForSubject:
		return true
	default:
		return false
	}
}

// fetch asks for one token; nil: none came. What keeps tokens from coming is
// mended where that is possible, and waited out. The error says that waiting
// has ended.
func (s *Slots) fetch(waiting context.Context, slots *appSlots) (jetstream.Msg, error) {
	s.mu.Lock()
	consumer := slots.consumer
	s.mu.Unlock()
	msg, err := fetchOne(consumer, pollOf(s.window))
	s.tell(slots, err)
	if err != nil {
		s.mend(waiting, slots)
		return nil, pause(waiting, slotPause, err)
	}
	if s.missing(slots, msg != nil) {
		s.mend(waiting, slots)
	}
	return msg, nil
}

// fetchOne asks for one token; nil: none was free. The request is never
// cancelled, so that no token is delivered to nobody.
func fetchOne(consumer jetstream.Consumer, wait time.Duration) (jetstream.Msg, error) {
	batch, err := consumer.Fetch(1, jetstream.FetchMaxWait(wait))
	if err != nil {
		return nil, err
	}
	var got jetstream.Msg
	for msg := range batch.Messages() {
		got = msg
	}
	if got != nil {
		return got, nil
	}
	return nil, batch.Error()
}

// missing tells whether no token has come for so long that some may be gone:
// taken out of the stream by hand, or by a worker of an older version with a
// smaller limit.
func (s *Slots) missing(slots *appSlots, came bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if came {
		slots.looked = time.Now()
	}
	return time.Since(slots.looked) > 2*s.window
}

// mend opens the slots again, unless another job is just doing so. That it did
// not help shows at the next request.
func (s *Slots) mend(ctx context.Context, slots *appSlots) {
	if !slots.opening.TryLock() {
		return
	}
	defer slots.opening.Unlock()
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	if err := s.prepare(ctx, slots, s.window); err != nil {
		s.log.Debug().Err(err).Str("app_id", slots.app).Msg("could not look after the slots of an app")
	}
}

// tell says once that the app's jobs can't start, and once that they can again.
func (s *Slots) tell(slots *appSlots, err error) {
	s.mu.Lock()
	before := slots.failing
	slots.failing = err != nil
	s.mu.Unlock()
	switch {
	case err != nil && !before:
		s.log.Error().Err(err).Str("app_id", slots.app).Msg("cannot fetch session slots, so the app's jobs wait; trying again every second")
	case err == nil && before:
		s.log.Info().Str("app_id", slots.app).Msg("fetching session slots again")
	}
}
