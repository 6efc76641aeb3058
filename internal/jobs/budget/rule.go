package budget

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"avatarworker/internal/jobs/usage"
)

// Periods of a budget, UTC.
const (
	Day   = "day"
	Month = "month"
)

// Periods lists the periods.
func Periods() []string { return []string{Day, Month} }

// Check returns an error if a rule has a period that is none of Periods.
func Check(rules []Rule) error {
	for _, r := range rules {
		if !slices.Contains(Periods(), r.Per) {
			return fmt.Errorf("the budget for %s is per %q: want one of %s", r.Key, r.Per, strings.Join(Periods(), ", "))
		}
	}
	return nil
}

// Begin returns when the oldest of the rules' periods that now lies in began; now if
// there are no rules.
func Begin(rules []Rule, now time.Time) time.Time {
	begin := now.UTC()
	for _, r := range rules {
		if from, _ := r.bounds(now); from.Before(begin) {
			begin = from
		}
	}
	return begin
}

// Rule is one budget: for every app, or for every value of a label.
type Rule struct {
	Key     string // app_id or label.<name>
	Credits int64
	Per     string  // Day or Month
	Warn    float64 // share of Credits at which Warned is called; 0: none
}

// Job is the part of a job that budgets depend on.
type Job struct {
	App    string
	Labels map[string]string
}

// Value is the job's under a rule's key; false: it has none, and the rule is not
// for it.
func (j Job) Value(key string) (string, bool) {
	if name, ok := strings.CutPrefix(key, "label."); ok {
		value, ok := j.Labels[name]
		return usage.LabelValue(value), ok
	}
	return j.App, true
}

// account is what is spent under one rule.
type account struct {
	rule   int
	value  string
	period string // its first day
}

// periodOf is the period that a day (YYYY-MM-DD) belongs to: its first day.
func (r Rule) periodOf(day string) string {
	if r.Per == Day || len(day) < len("2006-01") {
		return day
	}
	return day[:len("2006-01")] + "-01"
}

// bounds are the begin and end of the period that a time lies in.
func (r Rule) bounds(at time.Time) (begin, end time.Time) {
	at = at.UTC()
	if r.Per == Day {
		begin = at.Truncate(24 * time.Hour)
		return begin, begin.AddDate(0, 0, 1)
	}
	begin = time.Date(at.Year(), at.Month(), 1, 0, 0, 0, 0, time.UTC)
	return begin, begin.AddDate(0, 1, 0)
}

// Spending is what one account has spent and may spend.
type Spending struct {
	Key     string    `json:"key"`
	Value   string    `json:"value"`
	Per     string    `json:"per"`
	Credits int64     `json:"credits"`
	Spent   int64     `json:"spent"`
	Until   time.Time `json:"until"`
}

// Spendings returns what is spent of each budget in the period that now lies in, the
// largest share first. sums are the ledger's, of days; settings what was set at run
// time, by key.
func Spendings(rules []Rule, sums []usage.Sum, settings map[string]int64, now time.Time) []Spending {
	spent := make(map[account]int64)
	for _, s := range sums {
		for i, r := range rules {
			if value, ok := (Job{App: s.App, Labels: s.Labels}).Value(r.Key); ok {
				spent[account{i, value, r.periodOf(s.Period)}] += s.Credits
			}
		}
	}
	list := []Spending{}
	for a, credits := range spent {
		r := rules[a.rule]
		if begin, end := r.bounds(now); a.period == usage.Day(begin) {
			limit := r.Credits
			if set, ok := settings[SettingKey(r.Key, r.Per)]; ok {
				limit = set
			}
			list = append(list, Spending{r.Key, a.value, r.Per, limit, credits, end})
		}
	}
	slices.SortFunc(list, func(a, b Spending) int {
		return cmp.Or(cmp.Compare(float64(b.Spent)/float64(max(b.Credits, 1)), float64(a.Spent)/float64(max(a.Credits, 1))),
			cmp.Compare(a.Key, b.Key), cmp.Compare(a.Value, b.Value), cmp.Compare(a.Per, b.Per))
	})
	return list
}
