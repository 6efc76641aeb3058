// Package status computes the state of the fleet and of single jobs from what NATS
// stores: read each time (Store), or kept in memory (Model). It owns how that state is
// derived, for the command, the page and the API alike. It changes nothing, and must
// not know how the state is shown.
package status

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

// DefaultCountFor is how long the records are counted at most.
const DefaultCountFor = 5 * time.Second

// Fleet is the state of all queues, workers and circuits.
type Fleet struct {
	At          time.Time         `json:"at"`
	Queues      []Queue           `json:"queues"`
	Workers     []Worker          `json:"workers"`
	Circuits    []circuit.Circuit `json:"circuits"` // those that are not closed
	DeadLetters []dlq.Count       `json:"dead_letters"`
	Storage     []Storage         `json:"storage"`
	Budgets     []Budget          `json:"budgets"`        // those that are spent, the one that holds most jobs first
	HeldBudget  int               `json:"held_by_budget"` // jobs that are held because a budget is spent
	// BudgetsUnread is why Budgets could not be read; empty: they were.
	BudgetsUnread string   `json:"budgets_unread,omitempty"`
	Warnings      []string `json:"warnings"` // what a person should look at
	// CountedAll is false where counting the records took too long: running,
	// held, retrying, released and held_by_budget are then "at least".
	CountedAll bool `json:"counted_all"`
}

// Queue is the state of a queue in the whole fleet.
type Queue struct {
	Name   string `json:"name"`
	Served int    `json:"workers"` // live workers that serve it
	// Waiting is how many have no record: they were never delivered, or were handed back
	// at once, as those behind a full session limit are. It counts the jobs that are in
	// none of the four states below, so it is "at most" where they are "at least".
	Waiting uint64 `json:"waiting"`
	// Taken is how many jobs were delivered and have no outcome yet, in whatever state.
	// It is exact.
	Taken         int       `json:"taken"`
	Running       int       `json:"running"`
	Retrying      int       `json:"retrying"`
	Held          int       `json:"held"`
	Released      int       `json:"released"`
	OldestWaiting time.Time `json:"oldest_waiting,omitzero"` // when it was published
	PausedUntil   time.Time `json:"paused_until,omitzero"`   // an operator has paused its consumer
}

// Open is how many jobs of the queue have no outcome yet.
func (q *Queue) Open() uint64 { return q.Waiting + q.placed() }

// place takes the jobs whose state was counted from those that wait.
func (q *Queue) place() { q.Waiting -= q.placed() }

// placed is how many jobs have a record. There may be more records: of jobs whose message
// is gone.
func (q *Queue) placed() uint64 { return uint64(max(min(q.Taken, q.recorded()), 0)) } // #nosec G115 -- a count

func (q *Queue) recorded() int { return q.Running + q.Retrying + q.Held + q.Released }

// Worker is one worker as it published itself.
type Worker struct {
	fleet.Presence
	Lost bool `json:"lost,omitempty"` // its presence is too old
}

// Store reads the state of jobs and of the fleet. It changes nothing.
type Store struct {
	js       jetstream.JetStream
	names    topology.Names
	now      func() time.Time
	countFor time.Duration
	tariff   usage.Tariff
	budgets  Budgets // may be nil
}

// NewStore opens nothing yet. A nil now is time.Now; countFor bounds the
// counting of records, 0 is DefaultCountFor.
func NewStore(js jetstream.JetStream, names topology.Names, now func() time.Time, countFor time.Duration) *Store {
	if now == nil {
		now = time.Now
	}
	if countFor <= 0 {
		countFor = DefaultCountFor
	}
	return &Store{js: js, names: names, now: now, countFor: countFor, tariff: usage.Tariff{Minimum: 1}}
}

// WithTariff sets how connected time is counted in credits, and returns the Store.
// The default is one credit for each 6 s begun, at least one for a session.
func (s *Store) WithTariff(t usage.Tariff) *Store {
	s.tariff = t
	return s
}

// Fleet returns the state of the fleet. The error names what could not be read.
func (s *Store) Fleet(ctx context.Context) (*Fleet, error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	f := &Fleet{At: stream.CachedInfo().TimeStamp.UTC(), Queues: []Queue{}, Workers: []Worker{}, Circuits: []circuit.Circuit{}, DeadLetters: []dlq.Count{}, Budgets: []Budget{}, Warnings: []string{}, Storage: []Storage{}}
	if err := s.shared(ctx, f); err != nil {
		return nil, err
	}
	state, err := s.queueState(ctx, stream)
	if err != nil {
		return nil, err
	}
	queues := state.queues
	addWorkers(queues, f.Workers)
	spent, unread := s.spent(ctx)
	held := newHeldBy(spent)
	if f.CountedAll, err = s.countStates(ctx, &tally{queues: queues, held: held.add}); err != nil {
		return nil, err
	}
	held.fill(f)
	for _, name := range slices.Sorted(maps.Keys(queues)) {
		queues[name].place()
		if err := s.oldest(ctx, queues[name], state.spans[s.names.Jobs(name)]); err != nil {
			return nil, err
		}
		f.Queues = append(f.Queues, *queues[name])
	}
	if f.DeadLetters, err = dlq.NewStore(s.js, s.names, nil).CountByCode(ctx); err != nil {
		return nil, err
	}
	slices.SortStableFunc(f.DeadLetters, func(a, b dlq.Count) int { return cmp.Compare(b.Letters, a.Letters) })
	if f.Storage, err = s.Storage(ctx); err != nil {
		return nil, err
	}
	f.unread(unread)
	f.warn()
	return f, nil
}

// Queue returns the state of a queue, without how many of its jobs are in each state: to
// count them every record may have to be read. Waiting is then all of them. It returns nil
// if there is no such queue.
func (s *Store) Queue(ctx context.Context, name string) (*Queue, error) {
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	f := &Fleet{At: stream.CachedInfo().TimeStamp.UTC()}
	if err := s.shared(ctx, f); err != nil {
		return nil, err
	}
	state, err := s.queueState(ctx, stream)
	addWorkers(state.queues, f.Workers)
	return state.queues[name], err
}

// Workers lists the workers, by id.
func (s *Store) Workers(ctx context.Context) ([]Worker, error) {
	at, err := s.serverTime(ctx)
	if err != nil {
		return nil, err
	}
	f := &Fleet{At: at, Workers: []Worker{}}
	err = s.shared(ctx, f)
	return f.Workers, err
}

// shared reads the bucket of what workers share: presences and circuits.
func (s *Store) shared(ctx context.Context, f *Fleet) error {
	bucket := s.names.FleetBucket()
	fleetBucket, err := s.js.KeyValue(ctx, bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bucket %s: %w", bucket, err)
	}
	entries, err := kv.Entries(ctx, fleetBucket, circuit.Prefix+">", fleet.Prefix+">")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		f.learn(entry.Key(), entry.Value(), entry.Created())
	}
	f.sort()
	return nil
}

// sort puts workers and circuits in the order in which they are shown.
func (f *Fleet) sort() {
	slices.SortFunc(f.Workers, func(a, b Worker) int { return cmp.Compare(a.WorkerID, b.WorkerID) })
	slices.SortFunc(f.Circuits, func(a, b circuit.Circuit) int {
		return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.Region, b.Region))
	})
}

// learn takes one entry of the bucket, and when it was stored. One that this version
// can't read is another version's, and left out.
func (f *Fleet) learn(key string, value []byte, stored time.Time) {
	if strings.HasPrefix(key, fleet.Prefix) {
		var p fleet.Presence
		if json.Unmarshal(value, &p) == nil {
			f.Workers = append(f.Workers, Worker{Presence: p, Lost: !fleet.Fresh(stored, f.At)})
		}
		return
	}
	var c circuit.Circuit
	if json.Unmarshal(value, &c) == nil && c.State != "closed" {
		f.Circuits = append(f.Circuits, c)
	}
}

// addWorkers counts the workers that serve each queue.
func addWorkers(queues map[string]*Queue, workers []Worker) {
	for _, w := range workers {
		for name := range w.Queues {
			if queues[name] == nil {
				queues[name] = &Queue{Name: name}
			}
			if !w.Lost && !w.Draining {
				queues[name].Served++
			}
		}
	}
}

// queueState is what the jobs stream and its consumers say of the queues.
type queueState struct {
	queues map[string]*Queue // Waiting counts all their jobs
	spans  map[string]span   // by subject
}

func (s *Store) queueState(ctx context.Context, stream jetstream.Stream) (queueState, error) {
	state := queueState{queues: make(map[string]*Queue), spans: make(map[string]span)}
	queue := func(name string) *Queue {
		if state.queues[name] == nil {
			state.queues[name] = &Queue{Name: name}
		}
		return state.queues[name]
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(s.names.AllJobs()))
	if err != nil {
		return state, fmt.Errorf("stream %s: %w", s.names.JobsStream(), err)
	}
	for subject, n := range info.State.Subjects {
		state.spans[subject] = span{subject: subject, first: max(info.State.FirstSeq, 1), end: info.State.LastSeq + 1, jobs: n, never: n, stored: n}
		if name, ok := s.names.QueueOf(subject); ok {
			queue(name).Waiting = n
		}
	}
	list := stream.ListConsumers(ctx)
	for consumer := range list.Info() {
		jobs := consumer.NumPending + uint64(max(consumer.NumAckPending, 0)) // #nosec G115 -- a count
		if part, ok := state.spans[consumer.Config.FilterSubject]; ok {
			part.first, part.delivered = max(part.first, consumer.AckFloor.Stream+1), consumer.Delivered.Stream
			part.jobs, part.never = jobs, consumer.NumPending
			state.spans[part.subject] = part
		}
		if _, ok := s.names.QueueOf(consumer.Config.FilterSubject); !ok {
			continue
		}
		q := queue(consumer.Name)
		q.Waiting, q.Taken = jobs, consumer.NumAckPending
		if at := consumer.Config.PauseUntil; consumer.Paused && at != nil {
			q.PausedUntil = at.UTC()
		}
	}
	if err := list.Err(); err != nil {
		return state, fmt.Errorf("consumers of %s: %w", s.names.JobsStream(), err)
	}
	return state, nil
}

// oldest finds when the job was published that waits longest in the queue, as far as
// those that were handed back can be read in the time for counting.
func (s *Store) oldest(ctx context.Context, q *Queue, part span) error {
	if q.Waiting == 0 {
		return nil
	}
	if q.Taken > q.recorded() {
		short, cancel := context.WithTimeout(ctx, s.countFor)
		defer cancel()
		w := waitingReader{
			Store: s, messages: streams.NewReader(s.js, s.names.JobsStream()), looked: new(uint64),
			keep: func(raw *jetstream.RawStreamMsg) (Row, bool) { return waitingRow(raw, time.Time{}), true },
		}
		err := w.handedBack(short, part, func(row Row) bool {
			q.OldestWaiting = row.published
			return false
		})
		if !q.OldestWaiting.IsZero() || err != nil && (ctx.Err() != nil || short.Err() == nil) {
			return err
		}
	}
	msg, err := leader.Next(ctx, s.js, s.names.JobsStream(), part.delivered+1, s.names.Jobs(q.Name))
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound): // it was taken meanwhile
	case err != nil:
		return fmt.Errorf("oldest job of queue %s: %w", q.Name, err)
	default:
		q.OldestWaiting = msg.Time
	}
	return nil
}

// warn collects what a person should look at.
func (f *Fleet) warn() {
	add := func(format string, args ...any) { f.Warnings = append(f.Warnings, fmt.Sprintf(format, args...)) }
	for _, q := range f.Queues {
		if left := q.Open(); q.Served == 0 && left > 0 {
			add("no worker serves queue %s (jobs waiting: %d): start one with worker.queues %s, or publish to another queue", q.Name, left, q.Name)
		}
	}
	for _, q := range f.Queues {
		if !q.PausedUntil.IsZero() {
			add("queue %s is paused until %s: its jobs wait", q.Name, q.PausedUntil.Format(time.RFC3339))
		}
	}
	for _, w := range f.Workers {
		if w.Lost {
			add("worker %s has published nothing since %s: it was lost, or can't reach NATS", w.WorkerID, w.At.UTC().Format(time.RFC3339))
		} else if w.NotReady != "" && !w.Draining {
			add("worker %s takes no jobs, or not all: %s", w.WorkerID, w.NotReady)
		}
	}
	for _, s := range f.Storage {
		if s.Fill >= FullAt {
			add("%s is %.0f %% full: %s", s.Object, 100*s.Fill, s.Remedy)
		}
	}
	f.warnOfBudgets(add)
	f.warnOfCircuits(add)
}

// warnOfCircuits adds one warning for each code, however many circuits it opened:
// a fault of the account opens the circuits of all its apps and regions.
func (f *Fleet) warnOfCircuits(add func(format string, args ...any)) {
	var codes []errors.Code
	stopped := make(map[errors.Code][]string)
	for _, c := range f.Circuits {
		if stopped[c.Code] == nil {
			codes = append(codes, c.Code)
		}
		name := "app " + c.App
		if c.Region != "" {
			name += " in " + c.Region
		}
		stopped[c.Code] = append(stopped[c.Code], name)
	}
	for _, code := range codes {
		add("no sessions are started for %s: the circuit is not closed, because of %s. %s",
			strings.Join(stopped[code], ", "), code, errors.Explain(code).Remedy)
	}
}
