package budget_test

import (
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// Its sequences begin again: what is spent is in records that have lower ones than
// those followed before.
func TestWhatIsSpentCountsInAStreamThatWasMadeAgain(t *testing.T) {
	e := newEnv(t)
	for range 50 {
		e.spend("other", "", 1)
	}
	warned := make(chan budget.Warning, 16)
	b := e.budgets("one", alive, warned, budget.Rule{Key: "app_id", Credits: 8, Per: budget.Month})
	e.reserve(b, "app", "")()
	if err := e.js.DeleteStream(t.Context(), names.UsageStream()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), e.js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		e.spend("app", "", 1)
	}
	natstest.Eventually(t, "the budget is spent", func() bool {
		release := e.reserve(b, "app", "")
		if release != nil {
			release()
		}
		return release == nil
	})
	for app := false; !app; {
		select {
		case w := <-warned: // that of other was spent before
			if app = w.Value == "app"; !w.Over {
				t.Errorf("%+v", w)
			}
		case <-time.After(natstest.Patience):
			t.Fatal("nothing was said when it was spent")
		}
	}
	// The key says that its sessions are recorded up to a sequence of the stream before.
	from := time.Now()
	for range 4 {
		e.reserve(b, "fresh", "")
		e.reserve(b, "other", "")
	}
	if took := time.Since(from); took > natstest.Unhurried(4*time.Second) {
		t.Errorf("8 sessions waited %s", took)
	}
}

// The records can't be read: the jobs of budgets are held, at once and with a reason.
func TestWhereWhatIsSpentIsNotKnownNoSessionStarts(t *testing.T) {
	e := newEnv(t)
	e.now = time.Now().UTC()
	if err := e.js.DeleteStream(t.Context(), names.UsageStream()); err != nil {
		t.Fatal(err)
	}
	b := e.budgets("one", alive, nil, budget.Rule{Key: "label.customer", Credits: 8, Per: budget.Month})
	acme := budget.Job{App: "app", Labels: map[string]string{"customer": "acme"}}
	natstest.Eventually(t, "it says why", func() bool {
		r := b.Peek(acme)
		return r != nil && strings.Contains(r.String(), "not known") && b.Err() != nil
	})
	if r := b.Peek(budget.Job{App: "app"}); r != nil {
		t.Errorf("a job without a budget: %s", r)
	}
	if _, _, err := topology.Ensure(t.Context(), e.js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	natstest.Eventually(t, "it goes on", func() bool { return b.Err() == nil && b.Peek(acme) == nil })
	e.reserve(b, "app", "acme")()
}
