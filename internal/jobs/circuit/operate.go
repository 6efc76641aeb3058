package circuit

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

// ErrNone is in the chain of an error about an app that has no open circuit.
var ErrNone = errors.New("no circuit of this app is open")

// Operator changes circuits on a person's behalf, by compare-and-set like a worker.
// All fields are required.
type Operator struct {
	Store  *kv.Store          // AVATAR_FLEET
	Bucket jetstream.KeyValue // the same, for listing
	Now    func() time.Time   // by the server's clock
}

// NotClosed lists the circuits of the app that are open or being probed, by app and
// region. An empty app means all apps. A nil region means all regions, and an empty
// one the circuit of an app whose regions share one.
func (o Operator) NotClosed(ctx context.Context, app string, region *string) ([]Circuit, error) {
	watcher, err := o.Bucket.Watch(ctx, Prefix+">", jetstream.IgnoreDeletes())
	if err != nil {
		return nil, err
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	list := []Circuit{}
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case kve, open := <-watcher.Updates():
			if !open || kve == nil { // all there is
				slices.SortFunc(list, func(a, b Circuit) int {
					return cmp.Or(strings.Compare(a.App, b.App), strings.Compare(a.Region, b.Region))
				})
				return list, ctx.Err()
			}
			var e entry
			if json.Unmarshal(kve.Value(), &e) == nil && e.isOpen() && (app == "" || e.App == app) && (region == nil || e.Region == *region) {
				list = append(list, e.Circuit)
			}
		}
	}
}

// Probe lets the next job of an open circuit through as its probe, now. One that is
// being probed is left as it is. It returns the circuit as it then is; ErrNone:
// it is closed.
func (o Operator) Probe(ctx context.Context, app, region string) (Circuit, error) {
	return o.change(ctx, app, region, func(e *entry, now time.Time) bool {
		if e.State != Open || e.LastProbe == "" && !e.RetryAt.After(now) {
			return false
		}
		// The job of the last probe may be this one too.
		e.RetryAt, e.LastProbe = now, ""
		return true
	})
}

// Close closes a circuit; how a probe that is under way ends then counts as any
// session. It returns the circuit as it then is; ErrNone: it was closed already.
func (o Operator) Close(ctx context.Context, app, region string) (Circuit, error) {
	return o.change(ctx, app, region, func(e *entry, now time.Time) bool {
		e.close(now)
		return true
	})
}

func (o Operator) change(ctx context.Context, app, region string, f func(e *entry, now time.Time) bool) (Circuit, error) {
	key := key(app, region)
	for {
		var e entry
		revision, err := o.Store.Get(ctx, key, &e)
		switch {
		case err != nil:
			return Circuit{}, err
		case revision == 0 || !e.isOpen():
			return Circuit{}, ErrNone
		case !f(&e, o.Now().UTC()):
			return e.Circuit, nil
		}
		_, err = o.Store.PutTTL(ctx, key, e, revision, e.life())
		if !errors.Is(err, kv.ErrConflict) {
			return e.Circuit, err
		}
	}
}
