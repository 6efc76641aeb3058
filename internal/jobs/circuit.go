package jobs

import (
	"context"
	"slices"
	"sync"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// Circuit states.
const (
	circuitClosed  = "closed"
	circuitOpen    = "open"
	circuitProbing = "probing"
)

// CircuitConfig says when a circuit opens and for how long.
type CircuitConfig struct {
	Failures    int           // in a row, over different jobs
	Cooldown    time.Duration // before the first probe; doubles with each that fails
	MaxCooldown time.Duration // of doubling; below Cooldown it does not double
	MaxHold     time.Duration // a job held longer in all is given up
	Patience    time.Duration // for the bucket that keeps the circuits; 0: 10 s
}

// patience bounds one change of a circuit.
func (c CircuitConfig) patience() time.Duration {
	if c.Patience == 0 {
		return alarmTimeout
	}
	return c.Patience
}

const (
	// goodSessions bring the cooldown back to where it started.
	goodSessions = 10
	// maxHoldWait bounds the wait before a held job asks again.
	maxHoldWait = time.Minute
	// maxYield bounds how long a job that probed in vain lets others go first.
	maxYield = 15 * time.Second
	// probeWindow is how long a probe counts as under way; its worker renews it.
	probeWindow = 30 * time.Second
)

// Circuit is the state of one app in one region, kept in AVATAR_FLEET.
type Circuit struct {
	App         string        `json:"app_id"`
	Region      string        `json:"region"`
	State       string        `json:"state"`
	Code        errors.Code   `json:"code,omitempty"`     // what opened it
	Failures    []string      `json:"failures,omitempty"` // jobs that failed in a row
	Cooldown    time.Duration `json:"cooldown_ns"`
	OpenedAt    time.Time     `json:"opened_at,omitzero"`
	RetryAt     time.Time     `json:"retry_at,omitzero"` // when a probe may start
	ProbeJob    string        `json:"probe_job,omitempty"`
	ProbeWorker string        `json:"probe_worker,omitempty"`
	ProbeUntil  time.Time     `json:"probe_until,omitzero"`
	LastProbe   string        `json:"last_probe,omitempty"` // job whose probe did not close it
	Good        int           `json:"good,omitempty"`       // sessions since it closed

	revision uint64
}

// Circuits is a worker's view of all circuits. It learns of changes by watching
// the bucket, so that asking costs nothing while a circuit is closed.
type Circuits struct {
	store   *kv.Store
	config  CircuitConfig
	worker  string
	now     func() time.Time
	rnd     func() float64
	changed func(c Circuit, opened bool) // a circuit opened or closed
	mu      sync.Mutex
	known   map[string]Circuit
	probing map[string]bool // keys of this worker's probes
}

// NewCircuits returns circuits kept in store. changed is called, from whichever
// goroutine learns of it, each time one opens or closes.
func NewCircuits(store *kv.Store, config CircuitConfig, worker string, now func() time.Time, rnd func() float64,
	changed func(c Circuit, opened bool),
) *Circuits {
	return &Circuits{
		store: store, config: config, worker: worker, now: now, rnd: rnd, changed: changed,
		known: make(map[string]Circuit), probing: make(map[string]bool),
	}
}

// Pass is the answer to a job that wants to start.
type Pass struct {
	Go    bool
	Probe bool          // it goes as the fleet's one probe
	Wait  time.Duration // it does not go: ask again after this
	Code  errors.Code   // it does not go: what opened the circuit
}

// circuitKey is the key of a circuit in the bucket.
func circuitKey(app, region string) string {
	return "circuit." + topology.Token(app) + "." + topology.Token(region)
}

// Allow asks whether a session of the app may start.
func (c *Circuits) Allow(ctx context.Context, app, region, job string) (Pass, error) {
	key := circuitKey(app, region)
	known, ok := c.get(key)
	if !ok || known.State == circuitClosed {
		return Pass{Go: true}, nil
	}
	if !known.probeDue(job, c.now()) {
		return Pass{Wait: c.wait(known), Code: known.Code}, nil
	}
	won := false
	after, err := c.change(ctx, key, app, region, func(cc *Circuit, now time.Time) bool {
		won = cc.State != circuitClosed && cc.probeDue(job, now)
		if won {
			cc.State, cc.ProbeJob, cc.ProbeWorker = circuitProbing, job, c.worker
			cc.ProbeUntil = now.Add(probeWindow)
		}
		return won
	})
	if err != nil {
		return Pass{}, err
	}
	switch {
	case won:
		c.setProbing(key)
		return Pass{Go: true, Probe: true}, nil
	case after.State == circuitClosed:
		return Pass{Go: true}, nil
	default:
		return Pass{Wait: c.wait(after), Code: after.Code}, nil
	}
}

// probeDue tells whether the job may be let through now. The last one that was
// lets others go first: it may be the job that fails, and not the app. A time
// further off than it can have been when it was chosen is that of a clock ahead
// of this one, and means nothing here.
func (c *Circuit) probeDue(job string, now time.Time) bool {
	if c.State == circuitProbing {
		return now.After(c.ProbeUntil) || c.ProbeUntil.Sub(now) > probeWindow+5*time.Second
	}
	if c.RetryAt.Sub(now) > c.Cooldown+5*time.Second {
		return c.State == circuitOpen
	}
	due := c.RetryAt
	if job == c.LastProbe {
		due = due.Add(min(c.Cooldown/4, maxYield))
	}
	return c.State == circuitOpen && !now.Before(due)
}

// wait is a random part of the rest of the cooldown. It has a floor, so that
// ten thousand jobs do not all ask again and again in the last milliseconds.
func (c *Circuits) wait(known Circuit) time.Duration {
	rest := known.RetryAt.Sub(c.now())
	if known.State == circuitProbing {
		rest = known.Cooldown // until what the probe finds is known, and another may go
	}
	rest = min(rest, maxHoldWait)
	floor := max(known.Cooldown/10, 100*time.Millisecond)
	return max(time.Duration(c.rnd()*float64(rest)), floor)
}

// Glance is Allow by what this worker knows already: it asks nobody and takes
// no probe, so Go means that asking may be worth it.
func (c *Circuits) Glance(app, region, job string) Pass {
	known, ok := c.get(circuitKey(app, region))
	if !ok || known.State == circuitClosed || known.probeDue(job, c.now()) {
		return Pass{Go: true}
	}
	return Pass{Wait: c.wait(known), Code: known.Code}
}

// Failed counts a failure that concerns the whole app. It returns whether the
// circuit is open now, and how long the job waits if so.
func (c *Circuits) Failed(ctx context.Context, app, region, job string, d errors.Decision, probe bool) (wait time.Duration, open bool, err error) {
	key := circuitKey(app, region)
	after, err := c.change(ctx, key, app, region, func(cc *Circuit, now time.Time) bool {
		if cc.State != circuitClosed {
			if probe && cc.ProbeJob == job {
				cc.Code = d.Code
				cc.reopen(now, c.config.longer(cc.Cooldown))
				return true
			}
			return false
		}
		return cc.count(job, d, c.config, now)
	})
	c.endProbe(key, probe)
	if err != nil {
		return 0, false, err
	}
	if after.State == circuitClosed {
		return 0, false, nil
	}
	return c.wait(after), true, nil
}

// count adds a failure to a closed circuit and opens it when that is enough.
func (c *Circuit) count(job string, d errors.Decision, config CircuitConfig, now time.Time) bool {
	before := len(c.Failures)
	if !slices.Contains(c.Failures, job) {
		c.Failures = append(c.Failures, job)
	}
	if !d.OpensCircuit && len(c.Failures) < config.Failures {
		return len(c.Failures) != before
	}
	if c.Cooldown == 0 {
		c.Cooldown = config.Cooldown
	}
	c.Code, c.OpenedAt = d.Code, now
	c.reopen(now, c.Cooldown)
	return true
}

// longer is the cooldown after one that ended in vain.
func (c CircuitConfig) longer(cooldown time.Duration) time.Duration {
	return max(cooldown, min(2*cooldown, c.MaxCooldown))
}

func (c *Circuit) reopen(now time.Time, cooldown time.Duration) {
	c.State, c.Cooldown, c.RetryAt = circuitOpen, cooldown, now.Add(cooldown)
	c.LastProbe = c.ProbeJob
	c.ProbeJob, c.ProbeWorker, c.ProbeUntil = "", "", time.Time{}
	c.Good = 0
}

// Succeeded is told of each session that works. A probe's closes the circuit;
// any other ends a row of failures.
func (c *Circuits) Succeeded(ctx context.Context, app, region, job string, probe bool) error {
	key := circuitKey(app, region)
	if known, ok := c.get(key); !probe && (!ok || !known.learns(job, probe)) {
		return nil
	}
	_, err := c.change(ctx, key, app, region, func(cc *Circuit, _ time.Time) bool {
		if !cc.learns(job, probe) {
			return false
		}
		cc.State, cc.Failures = circuitClosed, nil
		cc.ProbeJob, cc.ProbeWorker, cc.ProbeUntil = "", "", time.Time{}
		if cc.Good++; cc.Good >= goodSessions {
			cc.Good, cc.Cooldown = 0, 0
		}
		return true
	})
	c.endProbe(key, probe)
	return err
}

// learns tells whether a session that works changes the circuit.
func (c *Circuit) learns(job string, probe bool) bool {
	if c.State != circuitClosed {
		return probe && c.ProbeJob == job
	}
	return len(c.Failures) > 0 || c.Cooldown > 0
}

// Inconclusive ends a probe that told nothing: it was interrupted, or failed
// for a reason of its own. The next one may start after the same cooldown, or
// at once if this one never got as far as the backend.
func (c *Circuits) Inconclusive(ctx context.Context, app, region, job string, reached bool) error {
	key := circuitKey(app, region)
	_, err := c.change(ctx, key, app, region, func(cc *Circuit, now time.Time) bool {
		if cc.State != circuitProbing || cc.ProbeJob != job {
			return false
		}
		cooldown := cc.Cooldown
		cc.reopen(now, cooldown)
		if !reached {
			cc.RetryAt = now
		}
		return true
	})
	c.endProbe(key, true)
	return err
}

// Renew keeps this worker's probes from counting as lost.
func (c *Circuits) Renew(ctx context.Context) error {
	for _, key := range c.probes() {
		known, ok := c.get(key)
		if !ok {
			continue
		}
		_, err := c.change(ctx, key, known.App, known.Region, func(cc *Circuit, now time.Time) bool {
			if cc.State != circuitProbing || cc.ProbeWorker != c.worker {
				return false
			}
			cc.ProbeUntil = now.Add(probeWindow)
			return true
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// change applies f by compare-and-set until it holds, or f sees nothing to do.
// It waits for an election, but not for a bucket that is gone: a job's own record
// has to be written in the time that is left.
func (c *Circuits) change(ctx context.Context, key, app, region string, f func(*Circuit, time.Time) bool) (Circuit, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.patience())
	defer cancel()
	for {
		cc := Circuit{App: app, Region: region, State: circuitClosed}
		revision, err := c.store.Get(ctx, key, &cc)
		if err != nil {
			return cc, err
		}
		cc.revision = revision
		if !f(&cc, c.now()) {
			c.Learn(key, cc, true)
			return cc, nil
		}
		cc.revision, err = c.store.Put(ctx, key, cc, revision)
		switch {
		case err == nil:
			c.Learn(key, cc, true)
			return cc, nil
		case !errors.Is(err, kv.ErrConflict):
			return cc, err
		}
	}
}

// Learn takes in a state of a circuit, by this worker's own change or by the
// watch. tell says whether an opening or closing is news.
func (c *Circuits) Learn(key string, next Circuit, tell bool) {
	c.mu.Lock()
	before := c.known[key]
	if next.revision <= before.revision {
		c.mu.Unlock()
		return
	}
	c.known[key] = next
	c.mu.Unlock()
	wasOpen := before.State != "" && before.State != circuitClosed
	isOpen := next.State != circuitClosed
	if tell && wasOpen != isOpen {
		c.changed(next, isOpen)
	}
}

func (c *Circuits) get(key string) (Circuit, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, ok := c.known[key]
	return known, ok
}

func (c *Circuits) setProbing(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.probing[key] = true
}

// endProbe stops renewing the probe, if it was the probe that ended. A change
// that did not come through leaves a probe that nobody renews: it runs out.
func (c *Circuits) endProbe(key string, probe bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if probe {
		delete(c.probing, key)
	}
}

func (c *Circuits) probes() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys := make([]string, 0, len(c.probing))
	for key := range c.probing {
		keys = append(keys, key)
	}
	return keys
}
