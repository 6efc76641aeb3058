package status_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
)

// A budget that is spent is named with what it holds, by a Store and by a Model.
func TestSpentBudgetsAreNamedWithTheJobsThatTheyHold(t *testing.T) {
	js, h := setup(t)
	deliver(t, js, h, 4)
	for i, r := range []lifecycle.Record{
		{HeldReason: lifecycle.HeldBudget, AppID: "a", Labels: map[string]string{"customer": "acme"}},
		{HeldReason: lifecycle.HeldBudget, AppID: "b", Labels: map[string]string{"customer": "acme"}},
		{HeldReason: lifecycle.HeldBudget, AppID: "b", Labels: map[string]string{"customer": "other"}},
		{HeldReason: lifecycle.HeldCircuit, AppID: "a", Labels: map[string]string{"customer": "acme"}},
	} {
		r.JobID, r.Run, r.StreamSeq, r.State, r.Queue = fmt.Sprintf("h%d", i), 1, uint64(i+1), lifecycle.StateHeld, "default"
		put(t, h, r)
	}
	until := time.Now().Add(time.Hour)
	spending := func(key, value string, credits, spent int64) budget.Spending {
		return budget.Spending{Key: key, Value: value, Per: budget.Month, Credits: credits, Spent: spent, Until: until}
	}
	list := []budget.Spending{spending("app_id", "b", 10, 12), spending("label.customer", "acme", 20, 20), spending("label.customer", "rich", 20, 19), spending("app_id", "a", 5, 4)}
	budgets := func(context.Context) ([]budget.Spending, error) { return list, nil }
	denied := func(context.Context) ([]budget.Spending, error) {
		return nil, errors.New("stream AVATAR_TOTALS: permission denied")
	}
	for name, open := range map[string]func(budgets status.Budgets) *status.Fleet{
		"store": func(budgets status.Budgets) *status.Fleet {
			f, err := status.NewStore(js, names, nil, 0).WithBudgets(budgets).Fleet(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return f
		},
		"model": func(budgets status.Budgets) *status.Fleet {
			m := status.NewModel(status.NewStore(js, names, nil, 0).WithBudgets(budgets), time.Hour)
			running(t, m)
			for { // they are read beside the polls
				refresh(t, m)
				f, err := m.Fleet(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if budgets == nil || len(f.Budgets) > 0 || f.BudgetsUnread != "" {
					return f
				}
			}
		},
	} {
		f := open(budgets)
		got := ""
		for _, b := range f.Budgets {
			got += fmt.Sprintf("%s %s %d/%d held %d; ", b.Key, b.Value, b.Spent, b.Credits, b.Held)
		}
		if want := "app_id b 12/10 held 2; label.customer acme 20/20 held 2; "; got != want || f.HeldBudget != 3 {
			t.Errorf("%s: %s, %d held, want %s", name, got, f.HeldBudget, want)
		}
		if text := strings.Join(f.Warnings, "\n"); !strings.Contains(text, `the budget of 10 credits per month for app_id "b" is spent (12 credits): its jobs are held until `+until.Format(time.RFC3339)+" (now: 2)") ||
			!strings.Contains(text, "avatarworker cost budget label.customer --per month --credits N") {
			t.Errorf("%s: %s", name, text)
		}
		if f := open(denied); f.HeldBudget != 3 || !strings.Contains(strings.Join(f.Warnings, " "), "the budgets can't be read: stream AVATAR_TOTALS") {
			t.Errorf("%s: %q, %d held", name, f.Warnings, f.HeldBudget)
		}
		// A configuration without the workers' budgets knows only that jobs are held.
		if f := open(nil); f.HeldBudget != 3 || !strings.Contains(strings.Join(f.Warnings, " "), "3 jobs are held because a budget is spent, and this configuration does not say which") {
			t.Errorf("%s: %q, %d held", name, f.Warnings, f.HeldBudget)
		}
	}
}

// A budget that is raised is seen at once, not when all of them are read next.
func TestAModelReadsBudgetsAgainWhenOneIsSet(t *testing.T) {
	js, h := setup(t)
	read := make(chan struct{}, 10)
	m := status.NewModel(status.NewStore(js, names, nil, 0).WithBudgets(func(context.Context) ([]budget.Spending, error) {
		read <- struct{}{}
		return nil, nil
	}), time.Hour)
	running(t, m)
	<-read
	refresh(t, m)
	if _, err := h.Fleet.Put(t.Context(), budget.SettingKey("app_id", budget.Day), []byte(`{"credits":7}`)); err != nil {
		t.Fatal(err)
	}
	refresh(t, m)
	select {
	case <-read:
	case <-time.After(natstest.Patience):
		t.Fatal("the budgets were not read again")
	}
}
