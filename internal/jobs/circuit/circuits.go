package circuit

import (
	"context"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

// Leases reports which workers are alive.
type Leases interface {
	// Valid reports whether the lease with that worker ID is valid.
	Valid(ctx context.Context, workerID string) (bool, error)
}

// Options configure Circuits. All fields but PerApp are required.
type Options struct {
	Store  *kv.Store // AVATAR_FLEET
	Config Config
	PerApp bool // one circuit for all regions of an app: they share one backend
	Leases Leases
	Window time.Duration    // how long a lease lasts after its last renewal
	Worker func() string    // the id of this worker's lease, empty while it has none
	Now    func() time.Time // by the server's clock
	Random func() float64   // in [0, 1)
	// Timeout bounds the wait for the bucket, and for the publication of an
	// alert. The job's own record is written in the time that is left.
	Timeout time.Duration
	// Publish publishes an alert. Several workers may publish the same one, so the
	// message's ID is made from its Kind, OpenedAt, App and Region.
	Publish func(ctx context.Context, a Alert) error
	// Changed is called each time this worker learns that a circuit opened or
	// closed. It must not block, and must not call the Circuits.
	Changed func(c Circuit, open bool)
	Log     zerolog.Logger
}

// Circuits is a worker's view of all circuits. It is safe for concurrent use.
type Circuits struct {
	o       Options
	changed chan struct{} // this worker has opened or closed a circuit
	behind  chan struct{} // the bucket has less than this worker has seen

	mu     sync.Mutex
	known  map[string]known
	probes map[string]*Permit // this worker's, by key, until their end is written
}

// known is what this worker knows of a circuit.
type known struct {
	entry
	checkedAt time.Time // when the probe was first seen here, or its worker's lease last checked
	publishAt time.Time // when this worker publishes the alerts
}

// New returns Circuits without any entries; Run keeps them current.
func New(o Options) *Circuits {
	return &Circuits{
		o: o, changed: make(chan struct{}, 1), behind: make(chan struct{}, 1),
		known: make(map[string]known), probes: make(map[string]*Permit),
	}
}

// NotClosed lists the circuits that are open or being probed.
func (c *Circuits) NotClosed() []Circuit {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := []Circuit{}
	for _, k := range c.known {
		if k.isOpen() {
			list = append(list, k.clone().Circuit)
		}
	}
	return list
}

// AnyOpen reports whether there is a circuit that is open or being probed.
func (c *Circuits) AnyOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.known {
		if k.isOpen() {
			return true
		}
	}
	return false
}

// Refusal is the reply to a job that may not start now.
type Refusal struct {
	Wait time.Duration // before the job asks again
	Code errors.Code   // what opened the circuit
}

// Permit lets one job start. Its holder reports how the session went: Success at
// the first sign that it works, Fail for a failure that concerns the whole app,
// and Abort in any case, which does nothing after the others. A probe ends with
// the first of them; a Fail after that counts as any job's failure.
//
// Their errors mean that the bucket could not be written. Run then writes the end
// of a probe as soon as it can, so the caller only logs the error. Failures are
// counted on this worker alone meanwhile, and open the circuit for its jobs.
type Permit struct {
	c                     *Circuits
	key, app, region, job string
	worker                string                             // of the probe
	number                int                                // of the probe; 0: never begun
	probe, worked         bool                               // it is the fleet's one probe and has not ended; Success was called
	end                   func(e *entry, now time.Time) bool // of the probe, to be written by Run
}

func (c *Circuits) permit(app, region, job string) *Permit {
	if c.o.PerApp {
		region = ""
	}
	return &Permit{c: c, key: key(app, region), app: app, region: region, job: job, worker: c.o.Worker()}
}

// Peek is Allow on what this worker already knows: it makes no round trip and
// starts no probe. It returns nil if the job may call Allow.
func (c *Circuits) Peek(app, region, job string) *Refusal {
	if !c.AnyOpen() {
		return nil
	}
	_, refusal := c.checkLocal(c.permit(app, region, job), false)
	return refusal
}

// Allow returns a permit for a session of the app, or a refusal. It returns an
// error if the bucket, or the lease of the probing worker, could not be read.
func (c *Circuits) Allow(ctx context.Context, app, region, job string) (*Permit, *Refusal, error) {
	p := c.permit(app, region, job)
	before, refusal := c.checkLocal(p, true)
	switch {
	case refusal != nil:
		return nil, refusal, nil
	case !before.isOpen():
		return p, nil, nil
	}
	if before.State == Probing {
		valid, err := c.o.Leases.Valid(ctx, before.ProbeWorker)
		if err != nil || valid {
			c.drop(p)
		}
		switch {
		case err != nil:
			return nil, nil, err
		case valid:
			return nil, c.refuse(before), nil
		}
	}
	won := false
	after, err := c.change(ctx, p.app, p.region, func(e *entry, now time.Time) bool {
		if won = e.due(job, now) || e.sameProbe(before); won {
			e.probe(job, p.worker)
			p.number = e.Probes
		}
		return won
	})
	switch {
	case err != nil:
		c.later(p, p.aborted(false)) // it may have started despite the error
		return nil, nil, err
	case won:
		return p, nil, nil
	}
	c.drop(p)
	if after.isOpen() {
		return nil, c.refuse(after), nil
	}
	return p, nil, nil
}

// checkLocal returns what is known of the permit's circuit, and a refusal if the
// job may not ask for the probe. With claim, the job is about to ask for it, and
// no other job of this worker asks meanwhile. The lease of a probing worker is
// checked once per window.
func (c *Circuits) checkLocal(p *Permit, claim bool) (entry, *Refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, now := c.known[p.key], c.o.Now()
	if !k.isOpen() {
		return k.entry, nil
	}
	asks := k.due(p.job, now) || k.State == Probing && now.Sub(k.checkedAt) >= c.o.Window
	if !asks || c.probes[p.key] != nil || p.worker == "" {
		return k.entry, c.refuse(k.entry)
	}
	if claim {
		k.checkedAt, p.probe = now, true
		c.known[p.key], c.probes[p.key] = k, p
	}
	return k.entry, nil
}

// refuse returns a refusal whose wait is a random part of the remaining cooldown.
// The wait has a minimum, so that ten thousand jobs do not try again in its last
// milliseconds.
func (c *Circuits) refuse(e entry) *Refusal {
	rest := e.RetryAt.Sub(c.o.Now())
	if e.State == Probing {
		rest = e.Cooldown
	}
	wait := time.Duration(c.o.Random() * float64(min(rest, maxWait)))
	return &Refusal{Wait: min(max(wait, e.Cooldown/10, minWait), maxWait), Code: e.Code}
}

// Probe reports whether the permit is the fleet's one probe and has not ended.
func (p *Permit) Probe() bool {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	return p.probe
}

// Success reports that the session works. A probe's success closes the circuit;
// any other ends a row of failures.
func (p *Permit) Success(ctx context.Context) error {
	p.c.mu.Lock()
	k := p.c.known[p.key]
	changes := p.probe || !p.worked && k.State == Closed && k.remembers()
	p.worked = true
	p.c.mu.Unlock()
	if !changes {
		return nil
	}
	_, err := p.done(ctx, func(e *entry, now time.Time) bool {
		switch {
		case p.holds(e):
			e.close(now)
		case e.State == Closed && e.remembers():
			e.succeed()
		default:
			return false
		}
		return true
	})
	return err
}

// Fail counts a failure that concerns the whole app. It returns whether the
// circuit is open now and, if so, how long the job waits. With an error, the
// result is what this worker knows.
func (p *Permit) Fail(ctx context.Context, d errors.Decision) (wait time.Duration, open bool, err error) {
	config := p.c.o.Config
	after, err := p.done(ctx, func(e *entry, now time.Time) bool {
		if p.holds(e) {
			e.Code = d.Code
			e.reopen(now, config.longer(e.Cooldown))
			return true
		}
		return e.State == Closed && e.fail(p.job, d, config, now)
	})
	if !after.isOpen() {
		return 0, false, err
	}
	return p.c.refuse(after).Wait, true, err
}

// Abort ends a probe without a result: it was interrupted, or failed for an
// unrelated reason. The next one may start after the same cooldown, or at once if
// this one never reached the backend.
func (p *Permit) Abort(ctx context.Context, reached bool) error {
	if !p.Probe() {
		return nil
	}
	_, err := p.done(ctx, p.aborted(reached))
	return err
}

func (p *Permit) aborted(reached bool) func(e *entry, now time.Time) bool {
	return func(e *entry, now time.Time) bool {
		held := p.holds(e)
		if held {
			e.abort(now, reached)
		}
		return held
	}
}

// holds reports whether this permit is the circuit's current probe.
func (p *Permit) holds(e *entry) bool {
	return p.number != 0 && e.State == Probing && e.ProbeWorker == p.worker && e.Probes == p.number
}

// done writes the session's result, which ends a probe. With an error, it returns
// the circuit as this worker knows it.
func (p *Permit) done(ctx context.Context, end func(e *entry, now time.Time) bool) (entry, error) {
	c := p.c
	c.mu.Lock()
	probe := p.probe
	p.probe = false
	c.mu.Unlock()
	after, err := c.change(ctx, p.app, p.region, end)
	switch {
	case err != nil && probe:
		c.later(p, end)
	case probe:
		c.drop(p)
	}
	return after, err
}

// later makes Run write how the probe ended.
func (c *Circuits) later(p *Permit, end func(e *entry, now time.Time) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.probe, p.end = false, end
}

// drop removes a permit that is not, or no longer, a probe.
func (c *Circuits) drop(p *Permit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.probe = false
	if c.probes[p.key] == p {
		delete(c.probes, p.key)
	}
}

// change applies f by compare-and-set until that succeeds, or until f returns
// false because nothing has to change. With an error, it returns the circuit as
// it is known.
func (c *Circuits) change(ctx context.Context, app, region string, f func(e *entry, now time.Time) bool) (entry, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	key := key(app, region)
	for {
		before := c.get(key)
		e := entry{Circuit: Circuit{App: app, Region: region, State: Closed}}
		revision, err := c.o.Store.Get(ctx, key, &e)
		if err != nil {
			return c.changeLocal(app, region, f, err)
		}
		if revision < before.revision {
			signal(c.behind)
		}
		if before.local && revision == before.base || revision == 0 && before.isOpen() {
			e = before.clone() // not written before, or the bucket was created again, empty
		}
		e.revision = revision
		waiting := len(e.Unpublished)
		if !f(&e, c.o.Now().UTC()) {
			c.update(key, e, false)
			return e, nil
		}
		e.local = false
		e.revision, err = c.o.Store.PutTTL(ctx, key, e, revision, e.life())
		switch {
		case err == nil:
			c.update(key, e, len(e.Unpublished) > waiting)
			return e, nil
		case !errors.Is(err, kv.ErrConflict):
			return c.changeLocal(app, region, f, err)
		}
	}
}

// changeLocal applies f on this worker alone, because the bucket failed with err.
// Otherwise all jobs of the app would run into the failure that opens its circuit.
// A circuit that the bucket has as open stays as it is: the fleet has one probe of
// it. The error is nil if the circuit was changed on this worker alone before.
func (c *Circuits) changeLocal(app, region string, f func(e *entry, now time.Time) bool, err error) (entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := key(app, region)
	before, known := c.known[key]
	e := before.clone()
	switch {
	case before.local:
		err = nil
	case before.isOpen():
		return before.entry, err
	case !known:
		e.Circuit = Circuit{App: app, Region: region, State: Closed}
	}
	waiting := len(e.Unpublished)
	if !f(&e, c.o.Now().UTC()) {
		return before.entry, err
	}
	if !before.local {
		e.local, e.base = true, before.revision
	}
	c.store(key, e, len(e.Unpublished) > waiting)
	return e, err
}

func (c *Circuits) get(key string) entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[key].entry
}

func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
