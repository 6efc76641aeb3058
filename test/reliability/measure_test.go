package reliability

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/test/reliability/invariant"
)

// natsAway is an outage of NATS. Only one that lasts explains a lost lease.
var natsAway = invariant.Fault{Kind: "NATS away", Lasting: true}

// measureOutages notes, until the test ends, each time in which ask had no answer
// from NATS: as long as a test or an election takes it away, or the machine is too
// busy for it. Each is such a fault.
func (f *fleet) measureOutages(fault invariant.Fault, ask func(ctx context.Context) error) {
	f.background(func(ctx context.Context) {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		var since time.Time
		for {
			asked := time.Now()
			once, cancel := context.WithTimeout(ctx, time.Second)
			err := ask(once)
			cancel()
			if since.IsZero() {
				since = asked
			}
			if err == nil {
				if out := time.Since(since); out > min(time.Second, f.lease/5) {
					f.t.Logf("%s: %s for %s", since.UTC().Format(time.StampMilli), fault.Kind, out.Round(100*time.Millisecond))
					fault.Start, fault.End = since, time.Now().Add(reconnect)
					f.fault(fault)
				}
				since = time.Time{}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
}

// background runs a function until the test ends.
func (f *fleet) background(run func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background()) // not t.Context(): it ends before the clean-ups
	var wg sync.WaitGroup
	wg.Go(func() { run(ctx) })
	f.t.Cleanup(func() { cancel(); wg.Wait() })
}

// answers asks, by this client, the consumer's leader and the bucket of leases and
// records.
func (f *fleet) answers(js jetstream.JetStream) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		if _, err := js.Consumer(ctx, f.names.JobsStream(), "default"); err != nil {
			return err
		}
		return f.takesRecords(js)(ctx)
	}
}

// takesRecords writes a key that no worker reads: a leader may answer while it finds no
// quorum for what is written, and a lease is kept by writes.
func (f *fleet) takesRecords(js jetstream.JetStream) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		_, err := js.Publish(ctx, "$KV."+f.names.StateBucket()+".test.away", nil)
		return err
	}
}

// streamAnswers asks the leader of a stream.
func streamAnswers(js jetstream.JetStream, stream string) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		_, err := js.Stream(ctx, stream)
		return err
	}
}

// measureDelays notes when the machine was too busy to wake this process in time.
func (f *fleet) measureDelays(ctx context.Context) {
	const every = 20 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	for before := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if now.Sub(before) > 4*every {
			f.delayed(before, now)
		}
		before = now
	}
}

// delayed notes a time in which a worker or the backend may have learned late of
// what the other did.
func (f *fleet) delayed(since, until time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delays = append(f.delays, invariant.Span{Start: since.Add(-time.Second), End: until.Add(time.Second)})
}

// late is how much of a time the machine was too busy to wake this process, or NATS
// to answer.
func (f *fleet) late(since, until time.Time) (d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	spans := slices.Clone(f.delays)
	for _, fault := range f.faults {
		if fault.Kind == natsAway.Kind {
			spans = append(spans, invariant.Span{Start: fault.Start, End: fault.End})
		}
	}
	slices.SortFunc(spans, func(a, b invariant.Span) int { return a.Start.Compare(b.Start) })
	for _, span := range spans { // they may overlap
		if span.Start.After(since) {
			since = span.Start
		}
		end := span.End
		if end.After(until) {
			end = until
		}
		if end.After(since) {
			d += end.Sub(since)
			since = end
		}
	}
	return d
}
