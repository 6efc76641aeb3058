package circuit

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/retry"
)

const (
	// pause is the wait between two attempts to write what is pending.
	pause = time.Second
	// publishPause is the wait after an alert that could not be published. It is
	// also how long, at least, other workers leave an alert to the worker that
	// changed the circuit.
	publishPause = 5 * time.Second
	// stopTimeout bounds writing the ends of probes when the worker stops.
	stopTimeout = 2 * time.Second
)

// Run follows the fleet's circuits, publishes alerts and writes what could not be
// written before, until ctx ends. Call it once, and end it after the last permit.
func (c *Circuits) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { c.watch(ctx) })
	wg.Go(func() { c.publish(ctx) })
	for retry.Pause(ctx, pause, nil) == nil {
		c.endProbes(ctx)
	}
	wg.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	c.endProbes(ctx)
}

// endProbes ends the probes that the bucket attributes to this worker wrongly:
// those whose end could not be written, and those that this worker does not know.
func (c *Circuits) endProbes(ctx context.Context) {
	for _, p := range c.endedProbes() {
		if _, err := c.change(ctx, p.app, p.region, p.end); err != nil {
			c.o.Log.Debug().Err(err).Str("app_id", p.app).Msg("could not write how the probe of a circuit ended; trying again")
			return
		}
		c.drop(p)
	}
}

func (c *Circuits) endedProbes() []*Permit {
	worker := c.o.Worker()
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, k := range c.known {
		if k.State == Probing && k.ProbeWorker == worker && c.probes[key] == nil {
			p := &Permit{c: c, key: key, app: k.App, region: k.Region, worker: worker, number: k.Probes}
			p.end = p.aborted(false)
			c.probes[key] = p
		}
	}
	var ended []*Permit
	for _, p := range c.probes {
		if p.end != nil {
			ended = append(ended, p)
		}
	}
	return ended
}

// publish publishes pending alerts: those of this worker's changes at once, those
// of other workers after a pause.
func (c *Circuits) publish(ctx context.Context) {
	for {
		changed, wait := c.changed, pause
		if err := c.publishDue(ctx); err != nil && ctx.Err() == nil {
			c.o.Log.Warn().Err(err).Msg("could not publish an alert about a circuit; trying again")
			changed, wait = nil, publishPause
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-time.After(wait):
		}
	}
}

// publishDue publishes the alerts that are due, in a random order of circuits,
// and removes them from their entries. It stops at the first that can't be
// published.
func (c *Circuits) publishDue(ctx context.Context) error {
	for _, e := range c.due() {
		for _, a := range e.Unpublished {
			a.App, a.Region = e.App, e.Region
			if err := c.publishAlert(ctx, a); err != nil {
				return fmt.Errorf("%s of app %s: %w", a.Kind, a.App, err)
			}
		}
		_, err := c.change(ctx, e.App, e.Region, func(now *entry, _ time.Time) bool { return now.removeAlerts(e.Unpublished) })
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Circuits) publishAlert(ctx context.Context, a Alert) error {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	return c.o.Publish(ctx, a)
}

func (c *Circuits) due() []entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []entry
	for _, k := range c.known {
		if len(k.Unpublished) > 0 && !k.publishAt.After(c.o.Now()) {
			list = append(list, k.entry)
		}
	}
	return list
}

// watch follows the bucket. It starts again if the watch ends: the bucket may
// have been away, or replaced by another with the same name.
func (c *Circuits) watch(ctx context.Context) {
	var listed time.Time // when the bucket that was read last was created
	for {
		if err := c.follow(ctx, &listed); err != nil && ctx.Err() == nil {
			c.o.Log.Debug().Err(err).Msg("could not follow the circuits; trying again")
		}
		if retry.Pause(ctx, pause, nil) != nil {
			return
		}
	}
}

// follow reads all entries, and then follows the changes. It returns when it has to
// start again. listed is when the bucket was created whose entries were read last.
func (c *Circuits) follow(ctx context.Context, listed *time.Time) error {
	c.clearRevisions()
	watch, err := c.o.Store.Watch(ctx, Prefix+">")
	if err != nil {
		return err
	}
	defer watch.Stop()
	remade := !listed.IsZero() && !watch.Created.Equal(*listed)
	reread := time.After(closedLife) // an outage may have hidden that a circuit expired
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.behind:
			return nil
		case <-reread:
			return nil
		case e, open := <-watch.Updates():
			switch {
			case !open:
				return nil
			case e != nil:
				c.read(e)
				continue
			}
			if err := c.compare(ctx, remade); err != nil {
				return err
			}
			*listed = watch.Created
		}
	}
}

func (c *Circuits) read(kve jetstream.KeyValueEntry) {
	var e entry
	if kve.Operation() != jetstream.KeyValuePut || json.Unmarshal(kve.Value(), &e) != nil {
		c.remove(kve.Key(), kve.Revision())
		return
	}
	e.revision = kve.Revision()
	c.update(kve.Key(), e, false)
}

// update stores a circuit as it is in the bucket. With announce, this worker opened or
// closed it, and publishes that at once.
func (c *Circuits) update(key string, e entry, announce bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.known[key]
	switch {
	case e.revision < before.revision || e.revision == before.revision && !announce:
	case before.local && e.revision == before.base: // listed again
		before.revision = e.revision
		c.known[key] = before
	default:
		c.store(key, e, announce)
	}
}

// store is update without comparing revisions. The caller holds c.mu.
func (c *Circuits) store(key string, e entry, announce bool) {
	before, now := c.known[key], c.o.Now()
	next := known{entry: e, checkedAt: now, publishAt: before.publishAt}
	if e.sameProbe(before.entry) {
		next.checkedAt = before.checkedAt
	}
	switch {
	case announce:
		next.publishAt = now
		signal(c.changed)
	case len(before.Unpublished) == 0:
		next.publishAt = now.Add(c.jitter(publishPause))
	}
	c.known[key] = next
	if e.isOpen() != before.isOpen() {
		c.o.Changed(e.clone().Circuit, e.isOpen())
	}
}

// remove removes a circuit that the bucket no longer has as of that revision.
func (c *Circuits) remove(key string, revision uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, ok := c.known[key]
	if !ok || before.revision > revision {
		return
	}
	delete(c.known, key)
	if before.isOpen() {
		before.State = Closed
		c.o.Changed(before.Circuit, false)
	}
}

// clearRevisions clears the known revisions: in a bucket that was created again
// they start again.
func (c *Circuits) clearRevisions() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, k := range c.known {
		k.revision = 0
		c.known[key] = k
	}
}

// compare handles circuits that are known but were not listed. They were removed;
// but if the bucket was created again, open circuits and unpublished alerts are
// written again.
func (c *Circuits) compare(ctx context.Context, remade bool) error {
	c.mu.Lock()
	missing := make(map[string]entry)
	for key, k := range c.known {
		if k.revision == 0 && !k.local {
			missing[key] = k.entry
		}
	}
	c.mu.Unlock()
	for key, e := range missing {
		if !remade || !e.isOpen() && len(e.Unpublished) == 0 {
			c.remove(key, 0)
			continue
		}
		_, err := c.change(ctx, e.App, e.Region, func(now *entry, _ time.Time) bool {
			if now.revision == 0 {
				*now = e.clone()
			}
			return now.revision == 0
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// jitter returns between one and three times d, so that workers do not act at the
// same moment.
func (c *Circuits) jitter(d time.Duration) time.Duration {
	return d + time.Duration(2*c.o.Random()*float64(d))
}
