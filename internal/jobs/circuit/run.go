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
	// pause is between two looks at what is to be written.
	pause = time.Second
	// tellPause is the pause after an alert that could not be published, and how
	// long alerts are left to the worker that changed the circuit, at least.
	tellPause = 5 * time.Second
	// lookEvery is how often the bucket is checked to be the same one.
	lookEvery = 10 * time.Second
	// lastTime bounds writing the ends of probes when the worker stops.
	lastTime = 2 * time.Second
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
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTime)
	defer cancel()
	c.endProbes(ctx)
}

// endProbes ends what the bucket still has as probes of this worker: those whose
// end could not be written, and those that it knows nothing of.
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

// publish publishes what is untold: of this worker's changes at once, of others'
// if they have not done so after a pause.
func (c *Circuits) publish(ctx context.Context) {
	for {
		changed, wait := c.changed, pause
		if err := c.publishDue(ctx); err != nil && ctx.Err() == nil {
			c.o.Log.Warn().Err(err).Msg("could not publish an alert about a circuit; trying again until it can be")
			changed, wait = nil, tellPause
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-time.After(wait):
		}
	}
}

// publishDue publishes the alerts that are due, in a random order of circuits, and
// removes them from their entries. It stops at the first that can't be published.
func (c *Circuits) publishDue(ctx context.Context) error {
	for _, e := range c.due() {
		for _, a := range e.Untold {
			a.App, a.Region = e.App, e.Region
			if err := c.tell(ctx, a); err != nil {
				return fmt.Errorf("%s of app %s: %w", a.Kind, a.App, err)
			}
		}
		_, err := c.change(ctx, e.App, e.Region, func(now *entry, _ time.Time) bool { return now.told(e.Untold) })
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Circuits) tell(ctx context.Context, a Alert) error {
	ctx, cancel := context.WithTimeout(ctx, c.o.Patience)
	defer cancel()
	return c.o.Tell(ctx, a)
}

func (c *Circuits) due() []entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []entry
	for _, k := range c.known {
		if len(k.Untold) > 0 && !k.tellAt.After(c.o.Now()) {
			list = append(list, k.entry)
		}
	}
	return list
}

// watch follows the bucket. A watch that ends is begun again: the bucket may have
// been away, or be another one with the same name.
func (c *Circuits) watch(ctx context.Context) {
	var listed time.Time // when the bucket that was read last was made
	for {
		made, err := c.made(ctx)
		if err == nil {
			remade := !listed.IsZero() && !made.Equal(listed)
			err = c.follow(ctx, made, remade, func() { listed = made })
		}
		if err != nil && ctx.Err() == nil {
			c.o.Log.Debug().Err(err).Msg("could not follow the circuits; trying again")
		}
		if retry.Pause(ctx, pause, nil) != nil {
			return
		}
	}
}

// made returns when the bucket was made.
func (c *Circuits) made(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Patience)
	defer cancel()
	status, err := c.o.Bucket.Status(ctx)
	if bucket, ok := status.(*jetstream.KeyValueBucketStatus); ok {
		return bucket.StreamInfo().Created, nil
	}
	return time.Time{}, err
}

// follow reads all there is, calls listed, and goes on to follow the changes. It
// returns when there is a reason to begin again.
func (c *Circuits) follow(ctx context.Context, made time.Time, remade bool, listed func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.unread()
	// The client waits for ever for the answer to a request that was lost.
	stuck := time.AfterFunc(c.o.Patience, cancel)
	watcher, err := c.o.Bucket.Watch(ctx, Prefix+">")
	stuck.Stop()
	if err != nil {
		return err
	}
	defer watcher.Stop() //nolint:errcheck // the watch has ended, or the connection
	look := time.NewTicker(c.jitter(lookEvery / 2))
	defer look.Stop()
	reread := time.After(closedLife) // an outage may have hidden that a circuit expired
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.behind:
			return nil
		case <-reread:
			return nil
		case <-look.C:
			if now, err := c.made(ctx); err == nil && !now.Equal(made) {
				return nil
			}
		case e, open := <-watcher.Updates():
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
			listed()
		}
	}
}

func (c *Circuits) read(kve jetstream.KeyValueEntry) {
	var e entry
	if kve.Operation() != jetstream.KeyValuePut || json.Unmarshal(kve.Value(), &e) != nil {
		c.forget(kve.Key(), kve.Revision())
		return
	}
	e.revision = kve.Revision()
	c.learn(kve.Key(), e, false)
}

// learn takes in a circuit as the bucket has it. tell: this worker made it open or
// close, and publishes that at once.
func (c *Circuits) learn(key string, e entry, tell bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, now := c.known[key], c.o.Now()
	if e.revision < before.revision || e.revision == before.revision && !tell {
		return
	}
	next := known{entry: e, asked: now, tellAt: before.tellAt}
	if e.sameProbe(before.entry) {
		next.asked = before.asked
	}
	switch {
	case tell:
		next.tellAt = now
		signal(c.changed)
	case len(before.Untold) == 0:
		next.tellAt = now.Add(c.jitter(tellPause))
	}
	c.known[key] = next
	if e.isOpen() != before.isOpen() {
		c.o.Changed(e.clone().Circuit, e.isOpen())
	}
}

// forget removes a circuit that the bucket does not have any more, as of that
// revision.
func (c *Circuits) forget(key string, revision uint64) {
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

// unread takes the revisions from all that is known: in a bucket that was made
// again they begin again.
func (c *Circuits) unread() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, k := range c.known {
		k.revision = 0
		c.known[key] = k
	}
}

// compare looks at what is known and was not listed. It was removed, unless the
// bucket was made again: then what is open or untold is written again.
func (c *Circuits) compare(ctx context.Context, remade bool) error {
	c.mu.Lock()
	missing := make(map[string]entry)
	for key, k := range c.known {
		if k.revision == 0 {
			missing[key] = k.entry
		}
	}
	c.mu.Unlock()
	for key, e := range missing {
		if !remade || !e.isOpen() && len(e.Untold) == 0 {
			c.forget(key, 0)
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

// jitter is between one and three times d, so that not all workers do the same at
// the same moment.
func (c *Circuits) jitter(d time.Duration) time.Duration {
	return d + time.Duration(2*c.o.Random()*float64(d))
}
