package ui

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

// Statuses answers for jobs and the fleet. *status.Store does, and so does anything
// that keeps the same answers in memory.
type Statuses interface {
	Fleet(ctx context.Context) (*status.Fleet, error)
	Jobs(ctx context.Context, q status.Query) (status.List, error)
	Job(ctx context.Context, id string) (*status.Job, error)
	Limits(ctx context.Context) ([]status.Limit, error)
}

var _ Statuses = (*status.Store)(nil)

// StoreOptions configure a Store. NC and JS are required.
type StoreOptions struct {
	NC    *nats.Conn
	JS    jetstream.JetStream
	Names topology.Names
	// Statuses answers for jobs and the fleet; nil: a status.Store.
	Statuses Statuses
	// Refresh makes Statuses read again, after a change; may be nil.
	Refresh func(ctx context.Context) error
	// Costs reads the ledger; nil: what today costs is added up from job records.
	Costs      *cost.Store
	Tariff     usage.Tariff   // credits of connected time
	Budgets    status.Budgets // may be nil
	DefaultApp string         // of jobs that name none
	Limits     map[string]int // most sessions, by the name of a limit's rule: "app_id a1", "label.room"
	Now        func() time.Time
	Log        zerolog.Logger
}

// Store reads and changes what NATS stores. Run keeps its counts of failures
// current.
type Store struct {
	o        StoreOptions
	statuses Statuses
	waiting  *status.Store
	letters  *dlq.Store

	fleet  cached[*status.Fleet]
	limits cached[map[string]int]
	spend  cached[*Spend]
	alerts cached[alertList]

	failures failures
	changes  changes
	operator opener
	refused  *refusals
}

type alertList struct {
	list []status.Event
	more bool
}

const (
	// fleetAge is how old the overview's numbers may be: many viewers cost one
	// read.
	fleetAge = time.Second
	// limitsAge and spendAge are longer, for what costs more or matters less.
	limitsAge = 3 * time.Second
	spendAge  = time.Minute
	// countFor bounds one reading of records or waiting jobs.
	countFor = 3 * time.Second
)

// NewStore returns a Store that has read nothing yet.
func NewStore(o StoreOptions) *Store {
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Store{o: o, statuses: o.Statuses, waiting: status.NewStore(o.JS, o.Names, o.Now, countFor), letters: dlq.NewStore(o.JS, o.Names, nil)}
	if s.statuses == nil {
		s.statuses = s.waiting
	}
	s.changes.wait = make(chan struct{})
	s.refused = newRefusals(o.NC)
	s.operator = opener{nc: o.NC, js: o.JS, names: o.Names, budgets: o.Budgets, tariff: o.Tariff}
	return s
}

// Fleet returns the fleet's state, at most a moment old. The caller must not change
// it.
func (s *Store) Fleet(ctx context.Context) (*status.Fleet, error) {
	if err := s.away("state of the fleet"); err != nil {
		return nil, err
	}
	f, err := s.fleet.get(ctx, fleetAge, func(ctx context.Context) (*status.Fleet, error) {
		return s.statuses.Fleet(ctx)
	})
	return f, s.explain("state of the fleet", err)
}

// Freshness says how current the fleet and the lists of jobs are.
func (s *Store) Freshness() Freshness {
	m, ok := s.statuses.(interface{ Freshness() status.Freshness })
	if !ok {
		return Freshness{} // it is read each time
	}
	fresh := m.Freshness()
	if fresh.Error == "" {
		return Freshness{At: fresh.At}
	}
	return Freshness{At: fresh.At, Error: errors.RedactText(fresh.Error)}
}

// explain names what is missing where no worker has run yet.
func (s *Store) explain(what string, err error) error {
	switch {
	case err == nil || errors.Is(err, status.ErrNoJob) || errors.Is(err, dlq.ErrNoLetter):
		return err
	case !s.o.NC.IsConnected():
		return fmt.Errorf("%s: %w", what, errDisconnected)
	default:
		return s.o.Names.Unavailable(what, err)
	}
}

// away is the error if NATS can't be reached: what is known from before would look as
// if all were well.
func (s *Store) away(what string) error {
	if s.o.NC.IsConnected() {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errDisconnected)
}

// errDisconnected says that NATS is away.
var errDisconnected = errors.New("NATS can't be reached: workers and jobs may go on, but nothing can be seen or changed here until it is back")

// Jobs lists jobs.
func (s *Store) Jobs(ctx context.Context, q status.Query) (status.List, error) {
	if err := s.away("list of jobs"); err != nil {
		return status.List{}, err
	}
	q.DefaultApp = cmp.Or(q.DefaultApp, s.o.DefaultApp)
	list, err := s.statuses.Jobs(ctx, q)
	return list, s.explain("list of jobs", err)
}

// Job returns one job.
func (s *Store) Job(ctx context.Context, id string) (*status.Job, error) {
	j, err := s.statuses.Job(ctx, id)
	return j, s.explain("job "+id, err)
}

// Letters lists dead letters.
func (s *Store) Letters(ctx context.Context, f dlq.Filter, limit int) ([]dlq.Entry, bool, error) {
	list := []dlq.Entry{}
	for e, err := range s.letters.List(ctx, f, limit+1) {
		if err != nil {
			return nil, false, s.explain("dead letters", err)
		}
		if len(list) == limit {
			return list, true, nil
		}
		list = append(list, e)
	}
	return list, false, nil
}

// Letter returns one dead letter.
func (s *Store) Letter(ctx context.Context, seq uint64) (dlq.Letter, error) {
	l, err := s.letters.Show(ctx, seq)
	return l, s.explain(fmt.Sprintf("dead letter %d", seq), err)
}

// maxAlerts is how many alerts are read.
const maxAlerts = 500

// Alerts lists the newest alerts.
func (s *Store) Alerts(ctx context.Context, limit int) ([]status.Event, bool, error) {
	a, err := s.alerts.get(ctx, limitsAge, func(ctx context.Context) (alertList, error) {
		list, more, err := s.newestAlerts(ctx, maxAlerts)
		return alertList{list, more}, err
	})
	if err != nil {
		return nil, false, s.explain("alerts", err)
	}
	if len(a.list) > limit {
		return a.list[:limit], true, nil
	}
	return a.list, a.more, nil
}

// Limits lists the session limits that this configuration knows or that sessions
// use now.
func (s *Store) Limits(ctx context.Context) ([]Limit, error) {
	counts, err := s.limits.get(ctx, limitsAge, s.sessionsByLimit)
	if err != nil {
		return nil, s.explain("session limits", err)
	}
	byName := make(map[string]Limit)
	for name, most := range s.o.Limits {
		if rule, _, one := strings.Cut(name, " "); one && rule == "app_id" {
			byName[name] = Limit{Name: name, Max: most}
		}
	}
	for token, used := range counts {
		name := limitName(token)
		rule, _, _ := strings.Cut(name, " ")
		byName[name] = Limit{Name: name, Used: used, Max: cmp.Or(s.o.Limits[name], s.o.Limits[rule])}
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b Limit) int { return cmp.Compare(a.Name, b.Name) }), nil
}

// limitName is the name of a limit as the configuration has it, and the value that
// it counts: "app_id/a1" is "app_id a1", "label/room/12" is "label.room 12".
func limitName(key string) string {
	parts := strings.Split(key, "/")
	for i, part := range parts {
		if text, err := url.PathUnescape(strings.ReplaceAll(strings.ReplaceAll(part, "%", "%25"), "=", "%")); err == nil {
			parts[i] = text
		}
	}
	if len(parts) == 3 && parts[0] == "label" {
		return "label." + parts[1] + " " + parts[2]
	}
	return strings.Join(parts, " ")
}

// Recordings lists the newest recordings.
func (s *Store) Recordings(ctx context.Context, limit int) ([]Recording, bool, error) {
	stored, err := s.StoredRecordings(ctx)
	if err != nil {
		return nil, false, err
	}
	list := []Recording{}
	for _, r := range stored[:min(len(stored), limit)] {
		list = append(list, Recording{Name: r.Name, JobID: r.JobID, Bytes: r.Bytes, StoredAt: r.StoredAt})
	}
	return list, len(stored) > limit, nil
}

// recordingsBatch is how many recordings are read at a time.
const recordingsBatch = 1000

// StoredRecordings lists all complete recordings, newest first. It makes no consumer,
// unlike output.ListRecordings: a user who may only read may make none.
func (s *Store) StoredRecordings(ctx context.Context) ([]output.Stored, error) {
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	bucket := s.o.Names.RecordingsBucket()
	list := []output.Stored{}
	take := func(msg *jetstream.RawStreamMsg) {
		var o jetstream.ObjectInfo
		if json.Unmarshal(msg.Data, &o) == nil && !o.Deleted && o.Name != "" {
			list = append(list, output.Stored{Name: o.Name, JobID: o.Metadata[output.MetaJobID], Bytes: o.Size, StoredAt: msg.Time.UTC(), Digest: o.Digest})
		}
	}
	if _, err := s.o.JS.Stream(ctx, "OBJ_"+bucket); err != nil {
		return nil, s.explain("bucket "+bucket, err)
	}
	r := streams.NewReader(s.o.JS, "OBJ_"+bucket)
	for next := uint64(1); ; {
		found, err := r.Next(ctx, "$O."+bucket+".M.>", next, recordingsBatch)
		if err != nil {
			return nil, s.explain("bucket "+bucket, err)
		}
		if len(found) == 0 {
			break
		}
		for _, msg := range found {
			take(msg)
			next = msg.Sequence + 1
		}
	}
	slices.SortFunc(list, func(a, b output.Stored) int {
		return cmp.Or(b.StoredAt.Compare(a.StoredAt), cmp.Compare(a.Name, b.Name))
	})
	return list, nil
}

// maxSpend is how many jobs are added up at most, the most expensive ones first.
const maxSpend = 5000

// Spend is what today (UTC) costs so far: as the ledger has it, or added up from the
// records of the jobs that were published today.
func (s *Store) Spend(ctx context.Context) (*Spend, error) {
	return s.spend.get(ctx, spendAge, func(ctx context.Context) (*Spend, error) {
		day := s.o.Now().UTC().Truncate(24 * time.Hour)
		if s.o.Costs != nil {
			sums, err := s.o.Costs.Overview(ctx, s.o.Now())
			if err != nil {
				return nil, s.explain("what sessions cost", err)
			}
			return &Spend{Since: day, Connected: time.Duration(sums.Today.ConnectedMS) * time.Millisecond, Credits: sums.Today.Credits, Ledger: &sums}, nil
		}
		list, err := s.statuses.Jobs(ctx, status.Query{Filter: status.Filter{After: day}, Order: status.ByCost, Limit: maxSpend})
		if err != nil {
			return nil, s.explain("cost of today's jobs", err)
		}
		sum := &Spend{Since: day, AtLeast: list.More}
		for _, row := range list.Rows {
			if row.SessionMS <= 0 {
				continue
			}
			connected := time.Duration(row.SessionMS) * time.Millisecond
			sum.Jobs++
			sum.Connected += connected
			sum.Credits += s.o.Tariff.Credits(connected)
		}
		return sum, nil
	})
}

// cached keeps the last answer of a read. While it is fresh, or a first read is
// under way, no other one is made.
type cached[T any] struct {
	mu      sync.Mutex
	value   T
	at      time.Time // zero: there is none
	loading chan struct{}
	err     error // of the last read
}

// readTime bounds one read, which goes on when the one who asked has left: others
// wait for it too.
const readTime = 15 * time.Second

// staleFor is how long an answer is given while a newer one is being read.
const staleFor = 20 * time.Second

// get returns an answer that is at most age old, or one that is somewhat older
// while a new one is read: then the next caller has it.
func (c *cached[T]) get(ctx context.Context, age time.Duration, load func(context.Context) (T, error)) (T, error) {
	c.mu.Lock()
	now := time.Now()
	if !c.at.IsZero() && now.Sub(c.at) < age {
		defer c.mu.Unlock()
		return c.value, nil
	}
	if c.loading == nil {
		c.loading = make(chan struct{})
		go c.load(context.WithoutCancel(ctx), load)
	}
	loading := c.loading
	if !c.at.IsZero() && now.Sub(c.at) < age+staleFor && c.err == nil {
		// Most reads are quick, and then the new answer is given.
		stale := c.value
		c.mu.Unlock()
		timer := time.NewTimer(staleAfter)
		defer timer.Stop()
		select {
		case <-loading:
		case <-timer.C:
			return stale, nil
		}
	} else {
		c.mu.Unlock()
		select {
		case <-loading:
		case <-ctx.Done():
			var none T
			return none, ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.value, c.err
}

// staleAfter is how long a new answer is waited for where there is an older one.
const staleAfter = 150 * time.Millisecond

func (c *cached[T]) load(ctx context.Context, load func(context.Context) (T, error)) {
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	value, err := load(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err = err; err == nil {
		c.value, c.at = value, time.Now()
	}
	close(c.loading)
	c.loading = nil
}

// expire has the next get wait for a new answer: something was changed.
func (c *cached[T]) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = time.Time{}
}
