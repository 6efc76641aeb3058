package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// maxTotalLabels bounds the labels by which each day is added up, and so the length
// of a counter's subject.
const maxTotalLabels = 3

var labelName = regexp.MustCompile(`^[^\x00-\x1f]{1,64}$`)

func (v *validator) cost() {
	c := &v.c.Cost
	v.duration("cost.credit", c.Credit, time.Millisecond, day)
	v.between("cost.minimum", c.Minimum, 0, 1_000_000)
	for i, name := range c.Labels {
		key := fmt.Sprintf("cost.labels[%d]", i)
		v.matches(key, name, labelName, "give a label's name, 1 to 64 bytes without control characters")
		if slices.Contains(c.Labels[:i], name) {
			v.fail(key, "is %s, which is in the list already: keep one", quote(name))
		}
	}
	for i, b := range v.c.Budgets {
		key := fmt.Sprintf("budgets[%d]", i)
		v.budget(key, b)
		if slices.ContainsFunc(v.c.Budgets[:i], func(other Budget) bool { return other.Key == b.Key && other.Per == b.Per }) {
			v.fail(key, "is a second budget for %s per %s: keep one", quote(b.Key), b.Per)
		}
	}
	if labels := v.c.TotalLabels(); len(labels) > maxTotalLabels {
		v.fail("cost.labels", "with the labels of budgets makes %d (%s): give at most %d in all", len(labels), strings.Join(labels, ", "), maxTotalLabels)
	}
}

// BudgetPeriods lists what a budget may be per.
func BudgetPeriods() []string { return []string{"day", "month"} }

func (v *validator) budget(key string, b Budget) {
	name, isLabel := strings.CutPrefix(b.Key, "label.")
	if b.Key != "app_id" && (!isLabel || !labelName.MatchString(name)) {
		v.fail(key+".key", "is %s: give app_id or label.<name>", quote(b.Key))
	}
	v.between(key+".credits", b.Credits, 1, MaxBudget)
	v.oneOf(key+".per", b.Per, BudgetPeriods()...)
	if b.Warn < 0 || b.Warn >= 1 {
		v.fail(key+".warn", "is %g: give a share from 0 (no alert) to below 1", b.Warn)
	}
}

// TotalLabels lists the labels by which each day is added up: those of cost.labels
// and of budgets, sorted.
func (c *Config) TotalLabels() []string {
	names := slices.Clone(c.Cost.Labels)
	for _, b := range c.Budgets {
		if name, ok := strings.CutPrefix(b.Key, "label."); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
