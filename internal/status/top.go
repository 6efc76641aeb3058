package status

import (
	"cmp"
	"slices"
	"time"
)

// topRows keeps the first rows of an order.
type topRows struct {
	order Order
	limit int
	rows  []Row
	least *Row // of the rows kept, once there are more than limit
}

func (t *topRows) add(r Row) {
	if t.least != nil && t.order.compare(t.least, &r) < 0 {
		return
	}
	t.rows = append(t.rows, r)
	// One more than the limit says that there are more.
	if t.limit > 0 && len(t.rows) >= 2*(t.limit+1) {
		t.cut()
	}
}

// cut sorts the rows and drops those that are too many. Of two rows of one job
// the one of the later run stays, or that of the record, or the one published first.
func (t *topRows) cut() {
	slices.SortFunc(t.rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(b.Run, a.Run), cmp.Compare(waitingLast(a), waitingLast(b)), a.published.Compare(b.published))
	})
	t.rows = slices.CompactFunc(t.rows, func(a, b Row) bool { return a.ID == b.ID })
	slices.SortFunc(t.rows, func(a, b Row) int { return t.order.compare(&a, &b) })
	if t.limit > 0 && len(t.rows) > t.limit {
		t.rows = slices.Delete(t.rows, t.limit+1, len(t.rows))
		least := t.rows[t.limit]
		t.least = &least
	}
}

func waitingLast(r Row) int {
	if r.State == StateWaiting {
		return 1
	}
	return 0
}

// byAge reports whether the newest jobs are enough.
func (t *topRows) byAge() bool { return (t.order == ByAge || t.order == "") && t.limit > 0 }

// complete reports whether no job published before that time can be among the
// first rows any more.
func (t *topRows) complete(before time.Time) bool {
	if !t.byAge() {
		return false
	}
	if t.least == nil && len(t.rows) > t.limit {
		t.cut()
	}
	return t.least != nil && t.least.published.After(before)
}

func (t *topRows) end() (rows []Row, more bool) {
	t.cut()
	if t.limit > 0 && len(t.rows) > t.limit {
		return t.rows[:t.limit], true
	}
	if t.rows == nil {
		return []Row{}, false
	}
	return t.rows, false
}
