package status

import (
	"cmp"
	"context"
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/lifecycle"
)

// Budget is a budget that has nothing left for one more session.
type Budget struct {
	budget.Spending
	Held int `json:"held"` // jobs of it that are held because a budget is spent
}

// Budgets returns what is spent of each budget of the configuration in its period
// that now lies in.
type Budgets func(ctx context.Context) ([]budget.Spending, error)

// WithBudgets sets what reads the budgets, and returns the Store. Without it the
// fleet's state has none.
func (s *Store) WithBudgets(b Budgets) *Store {
	s.budgets = b
	return s
}

// budgetsTime bounds the reading of budgets beside the fleet's state: that is shown
// without them rather than late.
const budgetsTime = 10 * time.Second

// spent returns the budgets that are spent. unread is why they are not known; nil:
// they are.
func (s *Store) spent(ctx context.Context) (list []budget.Spending, unread error) {
	if s.budgets == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, budgetsTime)
	defer cancel()
	all, err := s.budgets(ctx)
	for _, b := range all {
		if b.Spent+max(s.tariff.Minimum, 1) > b.Credits {
			list = append(list, b)
		}
	}
	return list, err
}

// Refused returns the refusal of a job of which a budget is spent; nil: none is. An error
// says why that is not known. What is reserved for sessions that run is not looked at.
func (s *Store) Refused(ctx context.Context, job budget.Job) (*budget.Refusal, error) {
	if s.budgets == nil {
		return nil, errors.New("this configuration has no budgets: give it the workers'")
	}
	spent, err := s.spent(ctx)
	for _, b := range spent {
		if value, ok := job.Value(b.Key); ok && value == b.Value {
			return &budget.Refusal{Key: b.Key, Value: b.Value, Per: b.Per, Credits: b.Credits, Spent: b.Spent, Until: b.Until}, nil
		}
	}
	return nil, err
}

// heldBy counts the jobs that are held by budgets.
type heldBy struct {
	budgets []Budget
	of      map[string]map[string][]int // indexes of budgets, by key and value
	all     int
}

func newHeldBy(spent []budget.Spending) *heldBy {
	h := &heldBy{budgets: make([]Budget, len(spent)), of: make(map[string]map[string][]int)}
	for i, b := range spent {
		h.budgets[i] = Budget{Spending: b}
		if h.of[b.Key] == nil {
			h.of[b.Key] = make(map[string][]int)
		}
		h.of[b.Key][b.Value] = append(h.of[b.Key][b.Value], i)
	}
	return h
}

func (h *heldBy) add(app string, labels map[string]string) {
	h.all++
	job := budget.Job{App: app, Labels: labels}
	for key, byValue := range h.of {
		if value, ok := job.Value(key); ok {
			for _, i := range byValue[value] {
				h.budgets[i].Held++
			}
		}
	}
}

func (h *heldBy) fill(f *Fleet) {
	slices.SortStableFunc(h.budgets, func(a, b Budget) int { return cmp.Compare(b.Held, a.Held) })
	f.Budgets, f.HeldBudget = append(f.Budgets, h.budgets...), h.all
}

// mostBudgets is how many spent budgets are named one by one.
const mostBudgets = 5

// warnOfBudgets adds a warning for each budget that is spent.
func (f *Fleet) warnOfBudgets(add func(format string, args ...any)) {
	if f.BudgetsUnread != "" {
		add("the budgets can't be read: %s", f.BudgetsUnread)
	}
	for i, b := range f.Budgets {
		if i == mostBudgets {
			add("%d more budgets are spent: avatarworker cost budget lists them", len(f.Budgets)-i)
			break
		}
		add("the budget of %d credits per %s for %s %q is spent (%d credits): its jobs are held until %s (now: %d). Raise it with avatarworker cost budget %s --per %s --credits N, or wait",
			b.Credits, b.Per, b.Key, b.Value, b.Spent, b.Until.Format(time.RFC3339), b.Held, b.Key, b.Per)
	}
	if len(f.Budgets) == 0 && f.HeldBudget > 0 && f.BudgetsUnread == "" {
		add("%d jobs are held because a budget is spent, and this configuration does not say which: give it the workers' budgets", f.HeldBudget)
	}
}

// unread notes why the budgets could not be read; nil: they were.
func (f *Fleet) unread(err error) {
	if err != nil {
		f.BudgetsUnread = errors.RedactText(err.Error())
	}
}

const (
	// budgetsEvery is how often a Model reads the budgets while one holds jobs, and
	// calmEvery while none does.
	budgetsEvery = 10 * time.Second
	calmEvery    = time.Minute
	// budgetsShare is how much longer than a read the time between two is at least.
	budgetsShare = 20
)

// followBudgets reads the budgets now and then until ctx ends. It does not hold up the polls:
// sums of many sessions may take a while.
func (m *Model) followBudgets(ctx context.Context) {
	for {
		begun := time.Now()
		spent, err := m.store.spent(ctx)
		if ctx.Err() != nil {
			return
		}
		timer := time.NewTimer(max(m.takeBudgets(spent, err), budgetsShare*time.Since(begun)))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-m.budgetsDue:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// takeBudgets takes what was read, and returns how long that is good for.
func (m *Model) takeBudgets(spent []budget.Spending, err error) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		m.spent = spent
	}
	m.unread = err
	if m.records.held[heldNumber(lifecycle.HeldBudget)] > 0 || err != nil {
		return budgetsEvery
	}
	return calmEvery
}

// budgetSet has the budgets read at once.
func (m *Model) budgetSet() {
	select {
	case m.budgetsDue <- struct{}{}:
	default: // they will be anyway
	}
}
