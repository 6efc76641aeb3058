package budget_test

import (
	"testing"
	"time"

	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/usage"
)

func TestEveryPeriodHasItsBounds(t *testing.T) {
	now := time.Date(2026, 3, 18, 12, 0, 0, 0, time.UTC)
	begins := make(map[time.Time]string)
	for _, per := range budget.Periods() {
		rules := []budget.Rule{{Key: "app_id", Credits: 9, Per: per}}
		if err := budget.Check(rules); err != nil {
			t.Error(err)
		}
		begin := budget.Begin(rules, now)
		if other, taken := begins[begin]; taken {
			t.Errorf("%s and %s both begin at %s", per, other, begin)
		}
		begins[begin] = per
		sums := []usage.Sum{sum(usage.Day(begin.Add(-time.Hour)), "a", "", 1), sum(usage.Day(begin), "a", "", 2)}
		list := budget.Spendings(rules, sums, nil, now)
		if len(list) != 1 || list[0].Spent != 2 || !list[0].Until.After(now) {
			t.Errorf("%s since %s: %+v", per, begin, list)
		}
	}
	if err := budget.Check([]budget.Rule{{Key: "app_id", Credits: 9, Per: "week"}}); err == nil {
		t.Error("a week is taken for a period")
	}
}
