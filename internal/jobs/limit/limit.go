// Package limit enforces the fleet's session limits: app.max_sessions, and the
// rules under limits: in the configuration, which count sessions by a field of
// the job. Each session that a limit allows is one key in the bucket of job
// records; its value names the worker and the job that hold it. A key is free if
// it is absent or if that worker's lease is gone.
//
// It owns these keys. It must not know anything else about jobs or workers.
package limit

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// Options configure Limits. All fields are required, except where stated
// otherwise.
type Options struct {
	Store  *kv.Store     // the bucket of job records
	Worker func() string // the id of the worker's lease; "" while it has none
	// LeaseValid reports whether the lease of the worker with this id is valid.
	LeaseValid func(ctx context.Context, workerID string) (bool, error)
	// CheckInterval is how often waiting jobs check whether the leases of the
	// keys' holders are valid.
	CheckInterval   time.Duration
	RewriteInterval time.Duration  // how often a held key is written again; 0: the bucket has no expiry
	Apps            map[string]int // max_sessions by app; may be nil
	Rules           []Rule         // may be nil
	// MaxWaiting is how many jobs may wait at a time; at most half of it for one
	// limit.
	MaxWaiting int
	Log        zerolog.Logger
}

// Limits is one worker's view of the keys, kept current by a watch.
type Limits struct {
	o             Options
	wg            sync.WaitGroup
	releaseCtx    context.Context // of the writes that free keys
	stopReleasing context.CancelFunc
	writing       sync.Mutex // held while a key of this worker is written again or removed

	mu      sync.Mutex
	keys    map[string]*limitKeys // by limit
	held    map[limitKey]holder   // keys that this worker holds
	waiting int                   // waiting jobs
	created time.Time             // when the bucket was created
	listed  bool                  // the watch has listed all keys
	fault   error                 // why it could not
}

// New returns Limits without any keys; Run keeps them current.
func New(o Options) *Limits {
	l := &Limits{o: o, keys: make(map[string]*limitKeys), held: make(map[limitKey]holder)}
	l.releaseCtx, l.stopReleasing = context.WithCancel(context.Background())
	return l
}

// Err returns why no job under a session limit is started; nil: they are.
func (l *Limits) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.listed || l.fault == nil {
		return nil
	}
	return fmt.Errorf("jobs under session limits are not started, because the sessions that run can't be listed: %w", l.fault)
}

// jobLimit is one limit that applies to a job.
type jobLimit struct {
	name string // of the limit: <key>/<value>
	max  int
}

// Names lists the limits that apply to the job.
func (l *Limits) Names(job Job) []string {
	var names []string
	for _, b := range l.limitsOf(job) {
		names = append(names, b.name)
	}
	return names
}

// Name is the name of the limit of all jobs with that value under a rule's key.
func Name(key, value string) string {
	if label, ok := strings.CutPrefix(key, labels); ok {
		return "label/" + topology.Token(label) + "/" + topology.Token(value)
	}
	return key + "/" + topology.Token(value)
}

// limitsOf lists the limits that apply to the job, in the same order on all
// workers.
func (l *Limits) limitsOf(job Job) []jobLimit {
	var list []jobLimit
	add := func(key, value string, most int) {
		if most <= 0 || value == "" {
			return
		}
		name := Name(key, value)
		for i := range list {
			if list[i].name == name {
				list[i].max = min(list[i].max, most)
				return
			}
		}
		list = append(list, jobLimit{name, most})
	}
	add("app_id", job.App, l.o.Apps[job.App])
	for _, rule := range l.o.Rules {
		value, _ := job.Value(rule.Key) // Rule.Check has refused other keys
		add(rule.Key, value, rule.Max)
	}
	slices.SortFunc(list, func(a, b jobLimit) int { return strings.Compare(a.name, b.name) })
	return list
}
