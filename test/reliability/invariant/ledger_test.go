package invariant

import (
	"strings"
	"testing"

	"avatarworker/internal/cost"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/simulator"
)

func used(id, connection string, second int, ms int64, estimated bool) Usage {
	r := usage.Record{JobID: "a", Run: 1, Session: 1, ConnectionID: connection, ConfirmedAt: at(second), ConnectedMS: ms, Estimated: estimated, AvatarID: "ok"}
	if id == "a.run1.s2" {
		r.Session = 2
	}
	return Usage{ID: id, Record: r}
}

// goodLedger is of one session that was lost with its worker and one that ended.
func goodLedger() Seen {
	return Seen{
		Sessions: []simulator.Session{
			{ConnectionID: "lost", AvatarID: "ok", Confirmed: at(1), Closed: at(3)},
			{ConnectionID: "done", AvatarID: "ok", Confirmed: at(10), Closed: at(12)},
			{ConnectionID: "refused", AvatarID: "ok", Closed: at(12)},
			{ConnectionID: "crossed", AvatarID: "ok", Confirmed: at(12), Closed: at(12)},
		},
		Ledger: &Ledger{Records: []Usage{used("a.run1.s1", "lost", 1, 8000, true), used("a.run1.s2", "done", 10, 2100, false)}},
	}
}

func TestTheLedgerIsComparedWithTheBackendsSessions(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Seen)
		want   string // "": nothing
	}{
		"as it should be":                     {func(*Seen) {}, ""},
		"an estimate without a connection id": {func(s *Seen) { s.Ledger.Records[0].ConnectionID = "" }, ""},
		"an estimate that was corrected": {func(s *Seen) {
			s.Ledger.Records = append(s.Ledger.Records, used("a.run1.s1.exact", "lost", 1, 2000, false))
		}, ""},
		"an estimate below the truth": {func(s *Seen) { s.Ledger.Records[0].ConnectedMS = 1000 }, "below the truth"},
		"a session that is missing":   {func(s *Seen) { s.Ledger.Records = s.Ledger.Records[:1] }, "session done of avatar ok was connected for 2s and is not in the ledger"},
		"a session that is in it twice": {func(s *Seen) {
			s.Ledger.Records = append(s.Ledger.Records, used("b", "done", 10, 2000, false))
			s.Ledger.Records[2].JobID = "b"
		}, "session done is in the ledger as"},
		"a record stored twice": {func(s *Seen) { s.Ledger.Records = append(s.Ledger.Records, s.Ledger.Records[1]) }, "is stored twice"},
		"two exact records of a session": {func(s *Seen) {
			s.Ledger.Records = append(s.Ledger.Records, used("a.run1.s2", "done", 10, 2000, false))
			s.Ledger.Records[2].ID = "x"
		}, "has two usage records"},
		"an exact record that is wrong":  {func(s *Seen) { s.Ledger.Records[1].ConnectedMS = 2600 }, "says 2.6s, but session done was connected for 2s"},
		"an exact record without an id":  {func(s *Seen) { s.Ledger.Records[1].ConnectionID = "" }, "is exact and has no connection id"},
		"a session nobody has confirmed": {func(s *Seen) { s.Ledger.Records[1].ConnectionID = "refused" }, "which the backend has not confirmed"},
		"counters that do not add up":    {func(s *Seen) { s.Ledger.Counters.Totals.Sessions = 2 }, "the counters add up to"},
		"a counter that is wrong": {func(s *Seen) {
			s.Ledger.Counters.Differences = []cost.Difference{{Counter: "x"}}
		}, "counter x is"},
	} {
		seen := goodLedger()
		c.change(&seen)
		checked := &check{seen: seen}
		checked.ledger()
		r := checked.report
		text := strings.Join(r.Violations, "\n")
		if c.want == "" && text != "" || !strings.Contains(text, c.want) {
			t.Errorf("%s: found %q, want %q", name, text, c.want)
		}
		if c.want == "" && (r.Unseen != 1 || r.Exact+r.Estimated != 2) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
