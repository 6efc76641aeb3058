package jobs

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// errSlotsBusy says that enough jobs of the app wait for a slot in this worker.
var errSlotsBusy = errors.New("all sessions that the app may hold are taken")

// slotWait is one request for a token; it is never cancelled, so that no token
// is delivered to nobody.
const slotWait = time.Second

// Slots keeps the fleet within max_sessions of each app. The stream holds one
// token message for each slot; whoever has its lease may hold a session, and a
// worker that dies gives its tokens back by letting their leases run out.
type Slots struct {
	js     jetstream.JetStream
	stream jetstream.Stream
	store  *Store
	leases *Leases
	window time.Duration
	worker string
	asks   *asker
	log    zerolog.Logger
	prefix string // subject prefix of the tokens: <prefix>.<app>.<n>

	mu   sync.Mutex
	apps map[string]*appSlots
	held map[string]bool // tokens held by this worker, by claim key
}

type appSlots struct {
	limit    int
	waiting  int
	most     int // jobs that may wait here
	consumer jetstream.Consumer
}

// SlotsConfig is what Slots needs.
type SlotsConfig struct {
	JS          jetstream.JetStream
	Stream      string
	Prefix      string         // of the token subjects
	Limits      map[string]int // max_sessions by app; apps without a limit are absent
	Concurrency int            // of this worker
	Window      time.Duration  // ack wait of the tokens' consumers
	Worker      string
	Replicas    int
}

// claim tells which worker holds a token. It decides where the queue does not:
// after a leader change a token can be delivered although its lease stands.
type claim struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`
}

func newSlots(ctx context.Context, c SlotsConfig, store *Store, leases *Leases, asks *asker, log zerolog.Logger) (*Slots, error) {
	s := &Slots{
		js: c.JS, store: store, leases: leases, window: c.Window, worker: c.Worker, asks: asks, log: log,
		prefix: c.Prefix, apps: make(map[string]*appSlots), held: make(map[string]bool),
	}
	if len(c.Limits) == 0 {
		return s, nil
	}
	stream, err := c.JS.Stream(ctx, c.Stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s, which keeps app.max_sessions: %w", c.Stream, err)
	}
	s.stream = stream
	for app, limit := range c.Limits {
		consumer, err := s.prepare(ctx, app, limit)
		if err != nil {
			return nil, fmt.Errorf("slots of app %s: %w", app, err)
		}
		// Some places stay free for the jobs of other apps.
		most := min(limit, max(1, c.Concurrency/2))
		s.apps[app] = &appSlots{limit: limit, most: most, consumer: consumer}
	}
	return s, nil
}

// prepare puts the missing tokens into the stream and opens the app's consumer.
func (s *Slots) prepare(ctx context.Context, app string, limit int) (jetstream.Consumer, error) {
	subjects := s.prefix + "." + keyToken(app)
	for n := 1; n <= limit; n++ {
		msg := nats.NewMsg(subjects + "." + strconv.Itoa(n))
		_, err := s.js.PublishMsg(ctx, msg, jetstream.WithExpectLastSequencePerSubject(0))
		if err != nil && !tokenExists(err) {
			return nil, err
		}
	}
	name := keyToken(app)
	consumer, err := s.stream.Consumer(ctx, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return s.stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
			Durable: name, FilterSubject: subjects + ".*", AckPolicy: jetstream.AckExplicitPolicy,
			AckWait: s.window, MaxDeliver: -1, MaxAckPending: -1, DeliverPolicy: jetstream.DeliverAllPolicy,
		})
	}
	return consumer, err
}

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

// Take waits for a slot of the app as long as waiting stands. The returned
// context is work's, and ends with ErrLeaseLost when the slot can't be kept; give
// hands it back, and is called only after the session is closed. errSlotsBusy
// means that enough jobs wait here already.
func (s *Slots) Take(waiting, work context.Context, app, job string) (_ context.Context, give func(), err error) {
	slots := s.join(app)
	if slots == nil {
		return work, func() {}, nil
	}
	if slots.consumer == nil {
		return nil, nil, errSlotsBusy
	}
	defer s.part(slots)
	for waiting.Err() == nil {
		from := time.Now()
		msg, err := fetchOne(slots.consumer)
		if err != nil {
			if err := pause(waiting, time.Second, err); err != nil {
				return nil, nil, err
			}
			continue
		}
		if msg == nil {
			continue
		}
		if waiting.Err() != nil {
			s.handBack(msg, 0)
			break
		}
		if slotCtx, give, ok := s.accept(work, slots, msg, from, job); ok {
			return slotCtx, give, nil
		}
	}
	return nil, nil, context.Cause(waiting)
}

// join counts one more job that waits; nil: the app has no limit; a consumer
// of nil: enough wait.
func (s *Slots) join(app string) *appSlots {
	s.mu.Lock()
	defer s.mu.Unlock()
	slots := s.apps[app]
	if slots == nil {
		return nil
	}
	if slots.waiting >= slots.most {
		return &appSlots{}
	}
	slots.waiting++
	return slots
}

func (s *Slots) part(slots *appSlots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slots.waiting--
}

// fetchOne asks for one token; nil: none was free.
func fetchOne(consumer jetstream.Consumer) (jetstream.Msg, error) {
	batch, err := consumer.Fetch(1, jetstream.FetchMaxWait(slotWait))
	if err != nil {
		return nil, err
	}
	var got jetstream.Msg
	for msg := range batch.Messages() {
		got = msg
	}
	return got, batch.Error()
}

// accept makes the token this worker's, unless it is one too many or somebody
// still has it.
func (s *Slots) accept(ctx context.Context, slots *appSlots, msg jetstream.Msg, from time.Time, job string) (context.Context, func(), bool) {
	n, err := strconv.Atoi(msg.Subject()[strings.LastIndexByte(msg.Subject(), '.')+1:])
	if err != nil || n > slots.limit {
		s.retire(ctx, msg)
		return nil, nil, false
	}
	slotCtx, lease := s.leases.Hold(ctx, msg.Reply(), from)
	key := "slot" + strings.TrimPrefix(msg.Subject(), s.prefix)
	if !s.claim(slotCtx, key, job) {
		lease.Release()
		s.handBack(msg, s.window/10)
		return nil, nil, false
	}
	give := func() {
		s.hold(key, false)
		lease.Release()
		s.handBack(msg, 0)
	}
	return slotCtx, give, true
}

// claim writes this worker down as the token's holder, unless another one still
// says that it is.
func (s *Slots) claim(ctx context.Context, key, job string) bool {
	var holder claim
	revision, err := s.store.Get(ctx, key, &holder)
	if err != nil || s.holds(key) {
		return false
	}
	if revision != 0 && holder.WorkerID != s.worker && s.asks.holdsSlot(ctx, holder.WorkerID, key) != answerGone {
		return false
	}
	// Held before it is written: whoever is asked in between says so.
	s.hold(key, true)
	if _, err = s.store.Put(ctx, key, claim{WorkerID: s.worker, JobID: job}, revision); err != nil {
		s.hold(key, false)
		return false
	}
	return true
}

func (s *Slots) hold(key string, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if on {
		s.held[key] = true
	} else {
		delete(s.held, key)
	}
}

func (s *Slots) holds(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[key]
}

// retire removes a token above the limit: the plan has become smaller.
func (s *Slots) retire(ctx context.Context, msg jetstream.Msg) {
	meta, err := msg.Metadata()
	if err == nil {
		err = s.stream.DeleteMsg(ctx, meta.Sequence.Stream)
	}
	if err != nil {
		s.log.Warn().Err(err).Str("subject", msg.Subject()).Msg("could not remove a slot above app.max_sessions")
	}
}

func (s *Slots) handBack(msg jetstream.Msg, delay time.Duration) {
	if err := msg.NakWithDelay(delay); err != nil {
		s.log.Debug().Err(err).Str("subject", msg.Subject()).Msg("could not hand a slot back; its lease will run out")
	}
}
