package cost

import (
	"time"

	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/topology"
)

// maxDays bounds the days that are asked for one by one.
const maxDays = 62

// span is a time in whole days, and in which counters it is.
type span struct {
	family       string
	byMonth      string // the family of whole months; "": none are read as one
	since, until string // days, at since or later and before until; "": no bound
	// Whole months in the middle are read as one, and only the days outside them by
	// themselves. "": there are none.
	firstMonth, lastMonth string
	days                  []string // asked for one by one; nil: all of the family
}

func newSpan(family string, since, until time.Time) span {
	s := span{family: family}
	if !since.IsZero() {
		s.since = usage.Day(since)
	}
	if !until.IsZero() {
		s.until = usage.Day(until)
	}
	return s
}

// listDays has the days of a short span asked for one by one.
func (s *span) listDays(since, until time.Time) {
	if s.byMonth == "" && s.since != "" && s.until != "" && until.Sub(since) <= maxDays*24*time.Hour {
		s.days = daysOf(since.UTC(), until.UTC())
	}
}

// takeMonths has whole months read as one. An open end is one of the months.
func (s *span) takeMonths(family string, since, until time.Time) {
	first, last := time.Time{}, time.Time{} // the begin of the first month, and of the one behind the last
	if s.since != "" {
		first = monthOf(since)
		if first.Before(since) {
			first = first.AddDate(0, 1, 0)
		}
		s.firstMonth = usage.Day(first)[:len("2006-01")]
	}
	if s.until != "" {
		last = monthOf(until)
		s.lastMonth = usage.Day(last)[:len("2006-01")]
	}
	if s.since != "" && s.until != "" && !first.Before(last) {
		s.firstMonth, s.lastMonth = "", ""
		return
	}
	s.byMonth = family
	if s.since != "" {
		s.days = append(s.days, daysOf(since, first)...)
	}
	if s.until != "" {
		s.days = append(s.days, daysOf(last, until)...)
	}
}

func monthOf(t time.Time) time.Time { return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC) }

func daysOf(from, until time.Time) []string {
	var days []string
	for day := from; day.Before(until); day = day.AddDate(0, 0, 1) {
		days = append(days, usage.Day(day))
	}
	return days
}

// filters match the counters of the span, and maybe others.
func (s span) filters(names topology.Names) []string {
	var filters []string
	for _, day := range s.days {
		filters = append(filters, names.TotalsFilter(s.family, day))
	}
	switch {
	case s.byMonth != "":
		filters = append(filters, names.TotalsFilter(s.byMonth, ""))
	case s.days == nil:
		filters = append(filters, names.TotalsFilter(s.family, ""))
	}
	return filters
}

// holds reports whether the counters of a family and a period are in the span.
func (s span) holds(family, period string) bool {
	if s.byMonth != "" && family == s.byMonth {
		return period >= s.firstMonth && (s.lastMonth == "" || period < s.lastMonth)
	}
	if family != s.family || period < s.since || s.until != "" && period >= s.until {
		return false
	}
	month := period[:min(len(period), len("2006-01"))]
	return s.byMonth == "" || month < s.firstMonth || s.lastMonth != "" && month >= s.lastMonth
}
