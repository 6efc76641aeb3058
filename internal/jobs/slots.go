package jobs

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// errSlotsBusy says that the job is better off in the queue than waiting here.
var errSlotsBusy = errors.New("all sessions that the app may hold are taken")

// slotRest is how long a slot stays free after its session was closed: the
// backend may count a session a moment longer than it takes to close it.
const slotRest = 50 * time.Millisecond

// Slots keeps the fleet within max_sessions of each app. The stream holds one
// token message for each slot; whoever has its lease may hold a session, and a
// worker that dies gives its tokens back by letting their leases run out.
type Slots struct {
	js     jetstream.JetStream
	stream jetstream.Stream
	store  *Store
	leases *Leases    // set once their window is known
	peers  func() int // workers of the fleet that take jobs, this one included
	window time.Duration
	worker string
	asks   *asker
	random func() float64
	log    zerolog.Logger
	prefix string // subject prefix of the tokens: <prefix>.<app>.<n>
	places int    // of this worker

	mu      sync.Mutex // guards what follows, and what changes of an app
	apps    map[string]*appSlots
	held    map[string]bool // tokens held by this worker, by claim key
	waiting int             // jobs that wait here, of all apps
}

// appSlots is one app with a limit.
type appSlots struct {
	app   string
	limit int

	opening sync.Mutex // held by the one that opens the slots again

	waiting  int     // jobs that wait here
	away     backlog // jobs handed back
	consumer jetstream.Consumer
	looked   time.Time // when a token last came, or all were looked after
	failing  bool      // that no token can be fetched was told
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
	Random      func() float64 // in [0, 1)
}

// claim tells which worker holds a token. It decides where the queue does not:
// after a leader change a token can be delivered although its lease stands.
type claim struct {
	WorkerID string `json:"worker_id"`
	JobID    string `json:"job_id"`
}

// newSlots opens the slots of the apps that have a limit. What it returns has
// the shortest ack wait of their consumers as its window, and needs leases of
// that window before the first Take.
func newSlots(ctx context.Context, c SlotsConfig, store *Store, asks *asker, log zerolog.Logger) (*Slots, error) {
	s := &Slots{
		js: c.JS, store: store, window: c.Window, worker: c.Worker, asks: asks, random: c.Random, log: log,
		peers: func() int { return 1 }, prefix: c.Prefix, places: c.Concurrency,
		apps: make(map[string]*appSlots), held: make(map[string]bool),
	}
	if len(c.Limits) == 0 {
		return s, nil
	}
	stream, err := c.JS.Stream(ctx, c.Stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s, which keeps app.max_sessions: %w", c.Stream, err)
	}
	s.stream = stream
	var differences []string
	for app, limit := range c.Limits {
		slots := &appSlots{app: app, limit: limit, looked: time.Now()}
		if err := s.prepare(ctx, slots, c.Window); err != nil {
			return nil, fmt.Errorf("slots of app %s: %w", app, err)
		}
		if wait := ackWait(slots.consumer); wait != c.Window {
			differences = append(differences, fmt.Sprintf("consumer %s of stream %s: ack_wait is %s, wanted %s", keyToken(app), c.Stream, wait, c.Window))
			s.window = min(s.window, wait)
		}
		s.apps[app] = slots
	}
	if len(differences) > 0 {
		slices.Sort(differences)
		log.Warn().Strs("differences", differences).Msg("what exists has other settings than the configuration; it is left as it is")
	}
	return s, nil
}

// Limits tells whether the app has a limit, so that its jobs need a slot.
func (s *Slots) Limits(app string) bool { return s.apps[app] != nil }

// Take waits for a slot of the app as long as waiting stands. The returned
// context is work's, and ends with ErrLeaseLost when the slot can't be kept; give
// hands it back, and is called only after the session is closed. errSlotsBusy
// means that enough jobs wait here already. An app without a limit has a slot
// for every job.
func (s *Slots) Take(waiting, work context.Context, app, job string) (_ context.Context, give func(), err error) {
	slots := s.apps[app]
	if slots == nil {
		return work, func() {}, nil
	}
	if !s.join(slots) {
		return nil, nil, errSlotsBusy
	}
	defer s.part(slots)
	if s.places == 1 { // it waits in the place of all others
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeoutCause(waiting, solePatience, errSlotsBusy)
		defer cancel()
	}
	for waiting.Err() == nil {
		from := time.Now()
		msg, err := s.fetch(waiting, slots)
		if err != nil {
			return nil, nil, err
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

// accept makes the token this worker's, unless it is one too many or somebody
// still has it.
func (s *Slots) accept(ctx context.Context, slots *appSlots, msg jetstream.Msg, from time.Time, job string) (context.Context, func(), bool) {
	n, err := strconv.Atoi(lastToken(msg.Subject()))
	if err != nil || n > slots.limit {
		// Not removed: while a larger limit is rolled out it is a slot that the
		// new workers need. Where a smaller one was, it stays unused.
		s.handBack(msg, s.window/3)
		return nil, nil, false
	}
	slotCtx, lease := s.leases.Hold(ctx, msg.Reply(), from)
	key := s.claimKey(msg.Subject())
	if !s.claim(slotCtx, key, job) {
		lease.Release()
		s.handBack(msg, s.window/10)
		return nil, nil, false
	}
	give := func() {
		s.letGo(key)
		lease.Release()
		s.handBack(msg, slotRest)
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
	// Held before it is written: whoever is asked in between says so. The same
	// token can be delivered here twice; who comes second leaves it alone.
	if !s.hold(key) {
		return false
	}
	if _, err = s.store.Put(ctx, key, claim{WorkerID: s.worker, JobID: job}, revision); err != nil {
		s.letGo(key)
		return false
	}
	return true
}

// hold makes the token this worker's; false: it is already.
func (s *Slots) hold(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[key] {
		return false
	}
	s.held[key] = true
	return true
}

func (s *Slots) letGo(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, key)
}

func (s *Slots) holds(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[key]
}

func (s *Slots) handBack(msg jetstream.Msg, delay time.Duration) {
	if err := msg.NakWithDelay(delay); err != nil {
		s.log.Debug().Err(err).Str("subject", msg.Subject()).Msg("could not hand a slot back; its lease will run out")
	}
}
