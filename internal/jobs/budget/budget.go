// Package budget bounds what the sessions of an app, or of all jobs with one value
// of a label, may cost in a day or a month. What was spent is followed from the
// ledger's counters; what is running is reserved in one key of the bucket of job
// records for each app or value, changed by compare-and-set, so that workers that
// start sessions at the same time know of each other. The reservations of a worker
// count as long as its lease is valid.
//
// It owns these keys and the settings of budgets in the fleet's bucket. It must not
// know what a session does or how its record is written.
package budget

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// Prefix begins the keys of reservations in the bucket of job records, and those of
// settings in the fleet's. No job id has a dot.
const Prefix = "budget."

// Options are what Budgets are made of. All are required.
type Options struct {
	Rules      []Rule
	JS         jetstream.JetStream
	Names      topology.Names
	State      *kv.Store     // the bucket of job records
	Fleet      *kv.Store     // the settings
	Least      int64         // credits that a session costs at least
	Worker     func() string // the id of the worker's lease; "" while it has none
	LeaseValid func(ctx context.Context, workerID string) (bool, error)
	// Labels are those by which the counters add up, sorted.
	Labels  []string
	Written func() uint64    // the sequence of the newest usage record that this worker wrote
	Now     func() time.Time // by the server's clock
	Warned  func(Warning)    // may be called by every worker for the same, and again by one that starts later
	Log     zerolog.Logger
}

// Budgets is one worker's view of what is spent, kept current by following the usage
// records. A nil *Budgets has no rules: Peek and Reserve refuse nothing.
type Budgets struct {
	o    Options
	life context.Context // of the writes that give reservations back
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu       sync.Mutex
	reserved map[reservation]*sessions
	spent    map[account]int64
	upto     map[string]uint64   // the record up to which a counter that was read is complete, by subject
	warned   map[account]float64 // the share last warned of
	settings map[string]int64    // credits set at run time, by key; nil: not read yet
	seq      uint64              // of the newest usage record that was followed
	listed   bool                // what was spent before is read
	fault    error               // why what is spent is not known; nil: it is, or soon will be
	changed  chan struct{}       // closed and replaced when something changes
}

// New returns Budgets that know of nothing spent yet.
func New(o Options) *Budgets {
	b := &Budgets{o: o, reserved: make(map[reservation]*sessions)}
	b.life, b.end = context.WithCancel(context.Background())
	b.forget()
	return b
}

// Peek returns the budget that keeps the job from starting as far as this worker
// knows; nil: none.
func (b *Budgets) Peek(job Job) *Refusal {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.known() && b.fault == nil {
		return nil // Reserve waits for it
	}
	return b.refusal(job, "", 0)
}

// Err returns why no job of a budget is started, whatever is left of it; nil: they are.
func (b *Budgets) Err() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fault == nil {
		return nil
	}
	return fmt.Errorf("jobs of budgets are held, because what is left of them is not known: %w", b.fault)
}

// refusal returns the first budget that has less left than one more session costs,
// besides those reserved under key; "": under any. The caller holds b.mu.
func (b *Budgets) refusal(job Job, key string, reserved int64) *Refusal {
	now := b.o.Now()
	for i, r := range b.o.Rules {
		value, ok := job.Value(r.Key)
		if !ok || key != "" && r.Key != key {
			continue
		}
		begin, end := r.bounds(now)
		found := Refusal{
			Key: r.Key, Value: value, Per: r.Per, Credits: b.credits(r), Reserved: reserved * b.o.Least, Until: end,
			Spent: b.spent[account{i, value, usage.Day(begin)}], Unknown: b.fault,
		}
		if found.Unknown != nil || found.Spent+max(found.Reserved+b.o.Least, 1) > found.Credits {
			return &found
		}
	}
	return nil
}

func (b *Budgets) credits(r Rule) int64 {
	if credits, ok := b.settings[SettingKey(r.Key, r.Per)]; ok {
		return credits
	}
	return r.Credits
}

// endTimeout bounds giving reservations back when the worker stops.
const endTimeout = 5 * time.Second

// Run follows the usage records and settings until ctx ends, then waits for reservations
// on their way back.
func (b *Budgets) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { b.repeat(ctx, "what is spent of budgets", b.follow, b.unknown) })
	wg.Go(func() { b.repeat(ctx, "the settings of budgets", b.followSettings, b.unset) })
	wg.Wait()
	stop := time.AfterFunc(endTimeout, b.end)
	b.wg.Wait()
	stop.Stop()
	b.end()
}
