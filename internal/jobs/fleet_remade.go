package jobs

import (
	"context"
	"maps"
	"time"
)

// FleetRemade is to be called when the fleet's bucket was deleted and made
// again. Its revisions begin anew, so that what this worker knows would look
// newer than whatever it is told from then on; and it is empty, so that
// circuits that are open would be forgotten.
func (w *Worker) FleetRemade(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, w.fleet.store.timeout)
	defer cancel()
	if err := w.circuits.tellAgain(ctx); err != nil && ctx.Err() == nil {
		w.log.Warn().Err(err).Msg("could not tell the fleet of the circuits that are open; each worker finds them out for itself")
	}
}

// tellAgain writes the circuits that are not closed where nobody has yet.
func (c *Circuits) tellAgain(ctx context.Context) error {
	c.mu.Lock()
	for key, known := range c.known {
		known.revision = 0
		c.known[key] = known
	}
	all := maps.Clone(c.known)
	c.mu.Unlock()
	for key, known := range all {
		_, err := c.change(ctx, key, known.App, known.Region, func(cc *Circuit, _ time.Time) bool {
			tell := cc.revision == 0 && known.State != circuitClosed
			if tell {
				*cc = known
			}
			return tell
		})
		if err != nil {
			return err
		}
	}
	return nil
}
