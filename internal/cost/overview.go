package cost

import (
	"context"
	"time"

	"avatarworker/internal/jobs/usage"
)

// Overview is what sessions cost now: for a page, or a report. Days and months are
// UTC; a session counts for those of its confirm. FailedCredits of each sum is what
// was lost to failures.
type Overview struct {
	Today usage.Totals `json:"today"`
	Month usage.Totals `json:"month"`
	// ByLabel are this month's sums by each label of cost.labels and of budgets, most
	// credits first; Key "" is sessions without the label.
	ByLabel map[string][]Row `json:"by_label"`
	// Days are the sums of the last thirty days and today, in order; a day without
	// sessions is left out.
	Days []Row `json:"days"`
}

// Today returns what the sessions of the UTC day of now add up to.
func (s *Store) Today(ctx context.Context, now time.Time) (usage.Totals, error) {
	day := now.UTC().Truncate(24 * time.Hour)
	return s.total(ctx, day, day.AddDate(0, 0, 1))
}

// ThisMonth returns what the sessions of the UTC month of now add up to.
func (s *Store) ThisMonth(ctx context.Context, now time.Time) (usage.Totals, error) {
	month := monthOf(now.UTC())
	return s.total(ctx, month, month.AddDate(0, 1, 0))
}

// thisMonthBy returns this month's sums by a label, most credits first.
func (s *Store) thisMonthBy(ctx context.Context, label string, now time.Time) ([]Row, error) {
	month := monthOf(now.UTC())
	return s.Sum(ctx, Query{By: byLabel + label, Since: month, Until: month.AddDate(0, 1, 0)})
}

func (s *Store) total(ctx context.Context, since, until time.Time) (sum usage.Totals, err error) {
	rows, err := s.Sum(ctx, Query{By: ByDay, Since: since, Until: until})
	for _, r := range rows {
		sum = sum.Plus(r.Totals)
	}
	return sum, err
}

// Overview returns all of it.
func (s *Store) Overview(ctx context.Context, now time.Time) (Overview, error) {
	o := Overview{ByLabel: make(map[string][]Row)}
	today, month := now.UTC().Truncate(24*time.Hour), monthOf(now.UTC())
	since := today.AddDate(0, 0, -30)
	if month.Before(since) {
		since = month
	}
	rows, err := s.Sum(ctx, Query{By: ByDay, Since: since, Until: month.AddDate(0, 1, 0)})
	if err != nil {
		return o, err
	}
	for _, r := range rows {
		if r.Key >= usage.Day(month) {
			o.Month = o.Month.Plus(r.Totals)
		}
		if r.Key == usage.Day(today) {
			o.Today = r.Totals
		}
	}
	o.Days = rows
	for _, label := range s.labels {
		if o.ByLabel[label], err = s.thisMonthBy(ctx, label, now); err != nil {
			return o, err
		}
	}
	return o, nil
}

// Labels are those by which the counters add up.
func (s *Store) Labels() []string { return s.labels }
