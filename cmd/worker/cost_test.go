package main

import (
	"encoding/csv"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/cost"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

// used stores usage records: two of March and one of this month.
func (b *bench) used() {
	b.t.Helper()
	l := usage.NewLedger(usage.Options{JS: b.js, Names: topology.Names{Prefix: "avatar"}, Window: 1 << 62, Now: time.Now})
	for i, r := range []usage.Record{
		{AppID: "app", ConfirmedAt: time.Date(2026, 3, 1, 23, 59, 59, 0, time.UTC), ConnectedMS: 13_000, Credits: 3, OutcomeCode: "completed"},
		{AppID: "shop", ConfirmedAt: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC), ConnectedMS: 6000, Credits: 1, OutcomeCode: "serverError"},
		{AppID: "app", ConfirmedAt: time.Now().UTC(), ConnectedMS: 60_000, Credits: 10, OutcomeCode: "workerLost", Estimated: true},
	} {
		r.JobID, r.Run, r.Session, r.Queue, r.ConnectionID = "J", 1, i+1, "default", "c"+string(rune('1'+i))
		r.Labels = map[string]string{"customer": "acme"}
		if _, err := l.Store(b.t.Context(), r); err != nil {
			b.t.Fatal(err)
		}
	}
}

func TestCostsAreSummedByAnythingAndPrintedInEveryForm(t *testing.T) {
	b := newBench(t)
	expect(t, 0, []string{"total"}, b.args("cost")...) // nothing was used yet
	expect(t, 0, []string{"no budgets: set them"}, b.args("cost", "budget")...)
	b.used()
	expect(t, 0, []string{"app", "13", "shop", "total", "14"}, b.args("cost")...)
	rows := decode[[]cost.Row](t, expect(t, 0, nil, b.args("cost", "--by", "day", "--since", "2026-03-01", "--until", "2026-03-03", "--json")...))
	if len(rows) != 2 || rows[0].Key != "2026-03-01" || rows[0].Credits != 3 || rows[1].FailedCredits != 1 {
		t.Errorf("%+v", rows)
	}
	out := expect(t, 0, nil, b.args("cost", "--by", "label:customer", "--since", "24h", "--csv")...)
	if want := "key,sessions,connected_ms,credits,estimated_credits,failed_credits\nacme,1,60000,10,10,10\n"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
	if out := expect(t, 0, nil, b.args("cost", "--until", "2026-01-01", "--json")...); strings.TrimSpace(out) != "[]" {
		t.Errorf("nothing is %q", out)
	}
	for _, wrong := range [][]string{
		{"--by", "month"}, {"--by", "label:"}, {"--since", "yesterday"}, {"--until", "2026-13-01"}, {"--since", "2026-03-02", "--until", "2026-03-01"}, {"--json", "--csv"},
	} {
		expect(t, 2, []string{wrong[0]}, b.args(append([]string{"cost"}, wrong...)...)...)
	}
}

func TestCSVHasNoFormulas(t *testing.T) {
	var keys []cost.Row
	for _, key := range []string{"=1+2", "@SUM(A1)", "-x", "+cmd|' /C calc'!A0", "\tx", "-17", "+4917", "", "a=b", "a,\"b\nc"} {
		keys = append(keys, cost.Row{Key: key})
	}
	var out strings.Builder
	if err := writeCSV(&out, keys); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(strings.NewReader(out.String())).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, row := range rows[1:] {
		got = append(got, row[0])
	}
	want := []string{"'=1+2", "'@SUM(A1)", "'-x", "'+cmd|' /C calc'!A0", "'\tx", "-17", "+4917", "", "a=b", "a,\"b\nc"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestAVendorsListIsCheckedAndOneThatCanNotBeReadNamesItsLine(t *testing.T) {
	b := newBench(t)
	b.used()
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "list")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	march := []string{"--since", "2026-03-01", "--until", "2026-04-01"}
	check := func(name string) []string { return b.args(append([]string{"cost", "check", name}, march...)...) }
	expect(t, 0, []string{"the same"}, check(file("connection_id,connected_seconds,credits\nc1,13.2,3\nc2,6,1\n"))...)
	expect(t, 0, []string{"the same"}, check(file("{\"connection_id\":\"c1\",\"credits\":3}\n{\"connection_id\":\"c2\",\"connected_ms\":6000}\n"))...)
	expect(t, 0, []string{"the list has none"}, check(file("connection_id,connected_seconds\nc1,13.2\nc2,6\n"))...)
	expect(t, 1, []string{"c1", "differs", "c2", "not_on_list", "c9", "not_in_ledger"}, check(file("connection_id,credits\nc1,4\nc9,1\n"))...)
	for text, want := range map[string]string{
		"": "the list is empty", "id;seconds\nc1;13\n": "names no column connection_id", "connection_id,credits\nc1,many\n": "line 2",
		"PK\x03\x04\x00\x00": "connection_id", "[{\"connection_id\":\"c1\"}]": "connection_id", "{\"connection_id\":1": "line 1",
	} {
		expect(t, 1, []string{want}, check(file(text))...)
	}
	expect(t, 1, []string{"no such file"}, check(filepath.Join(t.TempDir(), "none"))...)
	expect(t, 2, []string{"no FILE given"}, b.args("cost", "check")...)
}

func TestCountersAreRebuiltAndBudgetsAreShownAndChanged(t *testing.T) {
	b := newBench(t)
	b.used()
	expect(t, 0, []string{"records", "3 sessions", "pending", "3"}, b.args("cost", "rebuild", "--dry-run")...)
	expect(t, 0, []string{"pending"}, b.args("cost", "rebuild")...)
	config := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(config, []byte("budgets:\n- {key: app_id, credits: 100, per: month}\n- label.customer=50/day\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(args ...string) []string { return append(b.args(args...), "--config", config) }
	list := decode[[]budget.Spending](t, expect(t, 0, nil, with("cost", "budget", "--json")...))
	if len(list) != 2 || list[0].Key != "label.customer" || list[0].Spent != 10 || list[0].Credits != 50 || list[1].Spent != 10 {
		t.Errorf("%+v", list)
	}
	expect(t, 0, []string{"Queues"}, with("status")...)
	expect(t, 0, []string{"10 credits now"}, with("cost", "budget", "app_id", "--credits", "10")...)
	expect(t, 0, []string{"Budgets that are spent", "app_id", "the budget of 10 credits per month for app_id \"app\" is spent (10 credits)", "avatarworker cost budget app_id --per month --credits N"}, with("status")...)
	fleet := decode[status.Fleet](t, expect(t, 0, nil, with("status", "--json")...))
	if len(fleet.Budgets) != 1 || fleet.Budgets[0].Value != "app" || fleet.Budgets[0].Spent != 10 || !fleet.Budgets[0].Until.After(time.Now()) {
		t.Errorf("%+v", fleet.Budgets)
	}
	expect(t, 0, []string{"200 credits now"}, with("cost", "budget", "app_id", "--credits", "200")...)
	expect(t, 0, []string{"200"}, with("cost", "budget")...)
	expect(t, 0, []string{"configuration's again"}, with("cost", "budget", "app_id", "--reset")...)
	expect(t, 1, []string{"no budget for app_id per day"}, with("cost", "budget", "app_id", "--credits", "2", "--per", "day")...)
	for _, wrong := range [][]string{{"--credits", "5"}, {"app_id"}, {"app_id", "--credits", "0"}, {"app_id", "--credits", "1000000001"}, {"app_id", "--credits", "5", "--per", "week"}, {"--per", "day"}, {"app_id", "--credits", "1", "--reset"}} {
		expect(t, 2, nil, with(append([]string{"cost", "budget"}, wrong...)...)...)
	}
}

func TestRebuildWithoutCountersSaysHowToMakeThem(t *testing.T) {
	b := newBench(t)
	b.used()
	if err := b.js.DeleteStream(t.Context(), "AVATAR_TOTALS"); err != nil {
		t.Fatal(err)
	}
	expect(t, 1, []string{"'avatarworker setup' makes them"}, b.args("cost", "rebuild")...)
	expect(t, 0, []string{"AVATAR_TOTALS"}, b.args("setup")...)
	expect(t, 0, []string{"different  0"}, b.args("cost", "rebuild")...)
}
