package limit

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/retry"
)

// releaseTimeout bounds the writes that free keys when the worker stops.
const releaseTimeout = 5 * time.Second

// Run follows the keys until ctx ends, then waits until released keys are
// removed. It watches nothing if no limits are configured.
func (l *Limits) Run(ctx context.Context) {
	if len(l.o.Apps) > 0 || len(l.o.Rules) > 0 {
		l.wg.Go(func() { l.rewriteHeld(ctx) })
		l.watch(ctx)
	}
	stop := time.AfterFunc(releaseTimeout, l.stopReleasing)
	l.wg.Wait()
	stop.Stop()
	l.stopReleasing()
}

func (l *Limits) watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := l.follow(ctx); err != nil && ctx.Err() == nil {
			l.mu.Lock()
			l.fault = err
			l.mu.Unlock()
			l.o.Log.Warn().Err(err).Msg("could not follow the session limits; trying again")
		}
		if retry.Pause(ctx, time.Second, nil) != nil {
			return
		}
	}
}

func (l *Limits) follow(ctx context.Context) error {
	watch, err := l.o.Store.Watch(ctx, Prefix+">")
	if err != nil {
		return err
	}
	defer watch.Stop()
	l.begin(watch.Created)
	found := make(map[limitKey]bool)
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, open := <-watch.Updates():
			if !open {
				return nil
			}
			if e == nil {
				l.finishListing(found)
				found = nil
				continue
			}
			limit, n, ok := ParseKey(e.Key())
			if !ok {
				continue
			}
			p := limitKey{limit, n}
			h := holder{revision: e.Revision()}
			if e.Operation() != jetstream.KeyValuePut || json.Unmarshal(e.Value(), &h) != nil {
				l.setRemoved(p, e.Revision())
				continue
			}
			l.update(p, h)
			if found != nil {
				found[p] = true
			}
		}
	}
}

// begin forgets the keys of others if the bucket was made again: in the new one
// revisions begin again.
func (l *Limits) begin(created time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !created.Equal(l.created) {
		for limit, keys := range l.keys {
			for n, h := range keys.holders {
				if _, ours := l.held[limitKey{limit, n}]; !ours && !h.writing {
					keys.set(n, holder{})
				}
			}
		}
	}
	l.created = created
}

// finishListing frees the keys that the watch did not list: they were removed
// while nothing watched.
func (l *Limits) finishListing(found map[limitKey]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listed, l.fault = true, nil
	for limit, keys := range l.keys {
		for n, h := range keys.holders {
			p := limitKey{limit, n}
			if _, ours := l.held[p]; !ours && !h.writing && !found[p] {
				keys.set(n, holder{})
			}
		}
		keys.notify()
		l.dropUnused(limit)
	}
}

// rewriteHeld writes held keys again before the bucket expires them: a session
// may be open for longer than records are kept.
func (l *Limits) rewriteHeld(ctx context.Context) {
	if l.o.RewriteInterval == 0 {
		return
	}
	for retry.Pause(ctx, l.o.RewriteInterval, nil) == nil {
		l.mu.Lock()
		held := slices.Collect(maps.Keys(l.held))
		l.mu.Unlock()
		for _, p := range held {
			l.rewrite(ctx, p)
		}
	}
}

func (l *Limits) rewrite(ctx context.Context, p limitKey) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	h, ours := l.held[p]
	l.mu.Unlock()
	if !ours {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	if revision, err := l.o.Store.Put(ctx, p.key(), h, h.revision); err == nil {
		h.revision = revision
		l.setHeld(p, h)
	}
}
