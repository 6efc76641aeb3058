package budget_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

func sum(day, app, customer string, credits int64) usage.Sum {
	g := usage.Group{Family: usage.ByLabels([]string{"customer"}), Period: day, App: app, Queue: "default"}
	if customer != "" {
		g.Labels = map[string]string{"customer": customer}
	}
	return usage.Sum{Group: g, Totals: usage.Totals{Credits: credits}}
}

func TestWhatIsSpentIsOfThePeriodInUTC(t *testing.T) {
	rules := []budget.Rule{
		{Key: "app_id", Credits: 100, Per: budget.Day}, {Key: "app_id", Credits: 1000, Per: budget.Month},
		{Key: "label.customer", Credits: 50, Per: budget.Month}, {Key: "label.unused", Credits: 1, Per: budget.Day},
	}
	sums := []usage.Sum{
		sum("2026-01-31", "a", "x", 7), sum("2026-02-01", "a", "x", 20), sum("2026-02-27", "a", "", 30),
		sum("2026-02-28", "a", "x", 11), sum("2026-02-28", "b", "y", 13), sum("2026-03-01", "a", "x", 40),
	}
	settings := map[string]int64{budget.SettingKey("label.customer", budget.Month): 31}
	// Half past midnight on the first of March in Berlin is still February.
	now := time.Date(2026, 3, 1, 0, 30, 0, 0, time.FixedZone("", 3600))
	spent := map[string]int64{}
	for _, s := range budget.Spendings(rules, sums, settings, now) {
		spent[s.Per+" "+s.Key+" "+s.Value] = s.Spent
		if s.Key == "label.customer" && s.Credits != 31 {
			t.Errorf("%+v, want what was set at run time", s)
		}
		if end := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC); !s.Until.Equal(end) {
			t.Errorf("%+v ends at %s, want %s", s, s.Until, end)
		}
	}
	want := map[string]int64{
		"day app_id a": 11, "day app_id b": 13, "month app_id a": 61, "month app_id b": 13,
		"month label.customer x": 31, "month label.customer y": 13,
	}
	if len(spent) != len(want) {
		t.Errorf("got %v, want %v", spent, want)
	}
	for key, credits := range want {
		if spent[key] != credits {
			t.Errorf("%s: %d, want %d", key, spent[key], credits)
		}
	}
	later := budget.Spendings(rules, sums, settings, now.Add(time.Hour)) // March has begun
	if len(later) != 3 || later[0].Key != "label.customer" || later[0].Spent != 40 {
		t.Errorf("an hour later: %+v", later)
	}
}

func TestASettingThatMakesNoSenseChangesNothing(t *testing.T) {
	entries := map[string][]byte{"a": []byte(`{"credits":5}`), "b": []byte(`{"credits":0}`), "c": []byte(`{"credits":-1}`), "d": []byte(`x`), "e": nil}
	if got := budget.ParseSettings(entries); len(got) != 1 || got["a"] != 5 {
		t.Errorf("%v", got)
	}
}

func TestARefusalNamesTheBudgetAndWhenItEnds(t *testing.T) {
	r := budget.Refusal{Key: "label.customer", Value: "acme", Per: budget.Month, Credits: 100, Spent: 100, Until: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)}
	for _, part := range []string{"100 credits per month", `label.customer "acme"`, "2026-03-01T00:00:00Z", "avatarworker cost budget"} {
		if !strings.Contains(r.String(), part) {
			t.Errorf("%q does not say %s", r, part)
		}
	}
	whole := r.String()
	if r.Spent, r.Reserved = 98, 2; r.String() != whole {
		t.Errorf("%q, and with something reserved %q", whole, r)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}
