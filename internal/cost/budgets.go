package cost

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/budget"
)

// Budgets returns what is spent of each budget in the period that now lies in, the
// largest share first. What was set at run time counts before the rules' credits.
func (s *Store) Budgets(ctx context.Context, rules []budget.Rule, now time.Time) ([]budget.Spending, error) {
	if len(rules) == 0 {
		return []budget.Spending{}, nil
	}
	if err := budget.Check(rules); err != nil {
		return nil, err
	}
	sums, err := s.Days(ctx, budget.Begin(rules, now), true)
	if err != nil {
		return nil, err
	}
	settings, err := s.budgetSettings(ctx)
	if err != nil {
		return nil, err
	}
	return budget.Spendings(rules, sums, settings, now), nil
}

// budgetSettings reads what was set at run time, by key.
func (s *Store) budgetSettings(ctx context.Context) (map[string]int64, error) {
	bucket, err := s.js.KeyValue(ctx, s.names.FleetBucket())
	if err != nil {
		return nil, s.names.Unavailable("bucket "+s.names.FleetBucket(), err)
	}
	watch, err := bucket.Watch(ctx, budget.Prefix+">", jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", s.names.FleetBucket(), err)
	}
	defer func() { _ = watch.Stop() }() // it was only read
	found := make(map[string][]byte)
	for {
		select {
		case entry, open := <-watch.Updates():
			if entry == nil || !open {
				return budget.ParseSettings(found), nil
			}
			found[entry.Key()] = entry.Value()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
