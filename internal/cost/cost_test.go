package cost_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	names = topology.Names{Prefix: "avatar"}
	march = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
)

// ledger holds six sessions over three days: one estimated and one whose estimate
// was replaced.
func ledger(t *testing.T) (*cost.Store, jetstream.JetStream) {
	t.Helper()
	js, err := jetstream.New(natstest.ConnectURL(t, natstest.Start(t).ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	l := usage.NewLedger(usage.Options{JS: js, Names: names, Tariff: usage.Tariff{Minimum: 1}, Window: time.Hour, Now: time.Now})
	write := func(n int, credits int64, change func(*usage.Record)) usage.Record {
		r := usage.Record{
			JobID: "J", Run: 1, Session: n, AppID: "app", Queue: "default", AvatarID: "a", ConnectionID: fmt.Sprintf("c%d", n),
			ConfirmedAt: march.AddDate(0, 0, n/2).Add(12 * time.Hour), ConnectedMS: credits * 6000, Credits: credits, OutcomeCode: "completed",
			Labels: map[string]string{"customer": "acme", "room": "r" + fmt.Sprint(n%2)},
		}
		change(&r)
		if _, err := l.Store(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if n == 3 { // some are in the counters, the others are not yet
			catchUp(t, js)
		}
		return r
	}
	write(0, 1, func(*usage.Record) {})
	write(1, 2, func(r *usage.Record) { r.AppID = "shop" })
	write(2, 4, func(r *usage.Record) { r.Queue, r.OutcomeCode = "vip", "serverError" })
	write(3, 8, func(r *usage.Record) { r.Labels = nil })
	write(4, 16, func(r *usage.Record) { r.Estimated, r.ConnectionID, r.OutcomeCode = true, "", "workerLost" })
	lost := write(5, 1000, func(r *usage.Record) { r.Estimated, r.OutcomeCode = true, "workerLost" })
	exact := lost
	exact.Estimated, exact.ConnectedMS, exact.Credits, exact.OutcomeCode = false, 32*6000, 32, "released"
	if err := l.Correct(t.Context(), lost, exact); err != nil {
		t.Fatal(err)
	}
	return cost.NewStore(js, names, []string{"customer"}), js
}

func catchUp(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	counters, err := usage.OpenCounters(t.Context(), js, names, []string{"customer"})
	if err == nil {
		err = counters.CatchUp(t.Context(), func(err error) { t.Error(err) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestSumsAreTheSameFromCountersAndFromRecords(t *testing.T) {
	s, js := ledger(t)
	records := cost.NewStore(js, names, nil) // knows of no label in the counters
	for by, want := range map[string]string{
		"app":            "app=61 shop=2",
		"queue":          "default=59 vip=4",
		"day":            "2026-03-01=3 2026-03-02=12 2026-03-03=48",
		"avatar":         "a=63",
		"label:customer": "acme=55 =8",
		"label:room":     "r1=34 r0=21 =8",
	} {
		for _, store := range []*cost.Store{s, records} {
			if got := sum(t, store, cost.Query{By: by}); got != want {
				t.Errorf("by %s: %s, want %s", by, got, want)
			}
		}
	}
	one := cost.Query{By: "app", Since: march.AddDate(0, 0, 1), Until: march.AddDate(0, 0, 2)}
	if got := sum(t, s, one); got != "app=12" {
		t.Errorf("one day: %s", got)
	}
	one.Since = one.Since.Add(13 * time.Hour) // a part of a day is summed from the records
	if got := sum(t, s, one); got != "" {
		t.Errorf("an afternoon: %s", got)
	}
	for _, month := range []struct {
		since, until time.Time
		want         string
	}{
		{time.Time{}, march, ""}, {march, time.Time{}, "acme=55 =8"}, {march, march.AddDate(0, 1, 0), "acme=55 =8"},
		{march.AddDate(0, -1, 3), march.AddDate(0, 0, 2), "=8 acme=7"}, {march.AddDate(0, -3, 3), march.AddDate(0, 0, 1), "acme=3"},
		{march.AddDate(0, 0, 2), march.AddDate(0, 2, 5), "acme=48"}, {march.AddDate(0, 0, 1), march.AddDate(0, 0, 2), "=8 acme=4"},
		{march.AddDate(0, 1, 0), time.Time{}, ""},
	} {
		q := cost.Query{By: "label:customer", Since: month.since, Until: month.until}
		for _, store := range []*cost.Store{s, records} {
			if got := sum(t, store, q); got != month.want {
				t.Errorf("from %s to %s: %s, want %s", q.Since, q.Until, got, month.want)
			}
		}
	}
	rows, err := s.Sum(t.Context(), cost.Query{By: "avatar"})
	if err != nil || len(rows) != 1 || rows[0].Totals != (usage.Totals{Sessions: 6, ConnectedMS: 63 * 6000, Credits: 63, EstimatedCredits: 16, FailedCredits: 20}) {
		t.Errorf("%+v, %v", rows, err)
	}
	for _, by := range []string{"", "apps", "label:"} {
		if _, err := s.Sum(t.Context(), cost.Query{By: by}); !errors.Is(err, cost.ErrBy) {
			t.Errorf("by %q: %v", by, err)
		}
	}
}

func sum(t *testing.T, s *cost.Store, q cost.Query) string {
	t.Helper()
	rows, err := s.Sum(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, r := range rows {
		texts = append(texts, fmt.Sprintf("%s=%d", r.Key, r.Credits))
	}
	return strings.Join(texts, " ")
}

func TestARebuiltCounterIsWhatItsRecordsAddUpTo(t *testing.T) {
	s, js := ledger(t)
	if c, err := s.Compare(t.Context()); err != nil || len(c.Differences) > 0 || c.Records != 6 || c.Totals.Credits != 63 || c.Pending != 3 {
		t.Fatalf("%+v, %v", c, err)
	}
	catchUp(t, js)
	if c, err := s.Compare(t.Context()); err != nil || len(c.Differences) > 0 || c.Pending != 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	// One counter is wrong, one has no records, and one record is in none yet.
	wrong := names.Totals(usage.ByLabels([]string{"customer"}), "2026-03-01", "app", "default", "customer=acme")
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: wrong, Header: nats.Header{"Nats-Incr": {"77"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: names.Totals("day", "2026-03-09", "app", "default"), Header: nats.Header{"Nats-Incr": {"5"}}}); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(usage.Record{JobID: "K", Run: 1, Session: 1, AppID: "app", Queue: "q", ConfirmedAt: march, Credits: 3})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), names.Usage("app", "q"), data, jetstream.WithMsgID("K.run1.s1")); err != nil {
		t.Fatal(err)
	}
	corrected, after, err := s.Rebuild(t.Context())
	if err != nil || len(corrected) != 2 || len(after.Differences) > 0 || after.Totals.Credits != 66 {
		t.Fatalf("corrected %+v; then %+v, %v", corrected, after, err)
	}
	if got := sum(t, s, cost.Query{By: "queue"}); got != "default=59 vip=4 q=3" {
		t.Errorf("by queue: %s", got)
	}
	// Labels that were added to the configuration later.
	both := cost.NewStore(js, names, []string{"customer", "room"})
	if got := sum(t, both, cost.Query{By: "label:room"}); got != "r1=34 r0=21 =11" { // none is in their counters yet
		t.Errorf("by room: %s", got)
	}
	if _, after, err = both.Rebuild(t.Context()); err != nil || len(after.Differences) > 0 {
		t.Fatalf("%+v, %v", after, err)
	}
	if got := sum(t, both, cost.Query{By: "label:room"}); got != "r1=34 r0=21 =11" {
		t.Errorf("by room: %s", got)
	}
	if got := sum(t, both, cost.Query{By: "label:customer"}); got != "acme=55 =11" {
		t.Errorf("by customer: %s", got)
	}
}

func TestTheOverviewIsOfTodayAndThisMonthInUTC(t *testing.T) {
	s, _ := ledger(t)
	// One o'clock of the third of March in a zone that is two hours ahead of UTC.
	now := time.Date(2026, 3, 3, 1, 0, 0, 0, time.FixedZone("", 2*3600))
	o, err := s.Overview(t.Context(), now)
	if err != nil || o.Today.Credits != 12 || o.Month.Credits != 63 || o.Month.FailedCredits != 20 || len(o.Days) != 2 && len(o.Days) != 3 {
		t.Errorf("%+v, %v", o, err)
	}
	if rows := o.ByLabel["customer"]; len(rows) != 2 || rows[0].Key != "acme" || rows[0].Credits != 55 {
		t.Errorf("by customer: %+v", rows)
	}
	for at, want := range map[time.Time][2]int64{now.AddDate(0, 0, 1): {48, 63}, march.Add(-time.Second): {0, 0}, march: {3, 63}, march.AddDate(0, 1, 0): {0, 0}} {
		today, err := s.Today(t.Context(), at)
		month, monthErr := s.ThisMonth(t.Context(), at)
		if err != nil || monthErr != nil || today.Credits != want[0] || month.Credits != want[1] {
			t.Errorf("at %s: %d today, %d this month, want %v; %v, %v", at, today.Credits, month.Credits, want, err, monthErr)
		}
	}
}

func TestSumsAreReadFromRecordsIfThereAreNoCounters(t *testing.T) {
	s, js := ledger(t)
	if err := js.DeleteStream(t.Context(), names.TotalsStream()); err != nil {
		t.Fatal(err)
	}
	if got := sum(t, s, cost.Query{By: "label:customer"}); got != "acme=55 =8" {
		t.Errorf("by customer: %s", got)
	}
	if _, err := s.Compare(t.Context()); !errors.Is(err, usage.ErrNoCounters) {
		t.Error(err)
	}
	if days, err := s.Days(t.Context(), march, true); err != nil || len(days) != 8 {
		t.Errorf("%+v, %v", days, err)
	}
}

// aYear returns a ledger of ten million sessions of a year. They are added to the
// counters from records that stand for many sessions each.
func aYear(tb testing.TB, days, customers int) *cost.Store {
	tb.Helper()
	js, err := jetstream.New(natstest.ConnectURL(tb, natstest.Start(tb).ClientURL()))
	if err != nil {
		tb.Fatal(err)
	}
	if _, _, err := topology.Ensure(tb.Context(), js, names, topology.DefaultSettings()); err != nil {
		tb.Fatal(err)
	}
	labels := []string{"customer"}
	counters, err := usage.OpenCounters(tb.Context(), js, names, labels)
	if err != nil {
		tb.Fatal(err)
	}
	perGroup := int64(10_000_000 / days / customers)
	var batch []usage.Stored
	from, seq := uint64(0), uint64(0)
	for d := range days {
		for n := range customers {
			seq++
			batch = append(batch, usage.Stored{Seq: seq, Record: usage.Record{
				JobID: "J", Run: 1, AppID: "app", Queue: "default", Labels: map[string]string{"customer": fmt.Sprint(n)},
				ConfirmedAt: march.AddDate(0, 0, -d), ConnectedMS: perGroup * 6000, Credits: perGroup, OutcomeCode: "completed",
			}})
		}
		if len(batch) > 2000 || d == days-1 {
			if err := counters.Add(tb.Context(), batch, from, seq); err != nil {
				tb.Fatal(err)
			}
			batch, from = nil, seq
		}
	}
	return cost.NewStore(js, names, labels)
}

// BenchmarkSumOfAYear says how long it takes.
func TestAYearIsSummedByDayAndLabelFromItsCountersAlone(t *testing.T) {
	const days, customers = 365, 10
	s := aYear(t, days, customers)
	for by, rows := range map[string]int{"label:customer": customers, "day": days} {
		found, err := s.Sum(t.Context(), cost.Query{By: by})
		if err != nil || len(found) != rows {
			t.Errorf("by %s: %d rows, %v", by, len(found), err)
		}
	}
}

func BenchmarkSumOfAYear(b *testing.B) {
	const days, customers = 365, 200
	s := aYear(b, days, customers)
	for by, rows := range map[string]int{"label:customer": customers, "day": days} {
		b.Run(by, func(b *testing.B) {
			for b.Loop() {
				found, err := s.Sum(b.Context(), cost.Query{By: by})
				if err != nil || len(found) != rows {
					b.Fatal(len(found), err)
				}
			}
		})
	}
}

// What the counters of lost records say is all that is left of them.
func TestARebuildLeavesTheSumsOfLostRecordsAlone(t *testing.T) {
	for name, lose := range map[string]func(jetstream.JetStream) error{
		"purged": func(js jetstream.JetStream) error {
			stream, err := js.Stream(t.Context(), names.UsageStream())
			if err != nil {
				return err
			}
			return stream.Purge(t.Context())
		},
		"the oldest dropped at max_bytes": func(js jetstream.JetStream) error {
			stream, err := js.Stream(t.Context(), names.UsageStream())
			if err != nil {
				return err
			}
			full := stream.CachedInfo().Config
			full.Discard, full.MaxBytes = jetstream.DiscardOld, int64(stream.CachedInfo().State.Bytes/2)
			if _, err := js.UpdateStream(t.Context(), full); err != nil {
				return err
			}
			info, err := stream.Info(t.Context())
			if err == nil && (info.State.FirstSeq == 1 || info.State.Msgs == 0) {
				err = fmt.Errorf("not some of the records were dropped: %+v", info.State)
			}
			return err
		},
		"made again, empty": func(js jetstream.JetStream) error {
			if err := js.DeleteStream(t.Context(), names.UsageStream()); err != nil {
				return err
			}
			_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, js := ledger(t)
			catchUp(t, js)
			sum := func() string {
				t.Helper()
				rows, err := s.Sum(t.Context(), cost.Query{By: cost.ByDay})
				if err != nil {
					t.Fatal(err)
				}
				return fmt.Sprint(rows)
			}
			want := sum()
			if err := lose(js); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				corrected, after, err := s.Rebuild(t.Context())
				if err != nil || len(corrected)+len(after.Differences) > 0 || after.Before == "" {
					t.Errorf("corrected %d, %+v, %v", len(corrected), after, err)
				}
				if got := sum(); got != want {
					t.Errorf("the sums are %s, want %s", got, want)
				}
				// One more record makes the stream no more complete.
				r := usage.Record{JobID: "K", Run: 1, Session: 1, AppID: "app", Queue: "default", ConfirmedAt: march.AddDate(0, 1, 0), Credits: 1}
				if _, err := usage.NewLedger(usage.Options{JS: js, Names: names, Window: time.Hour, Now: time.Now}).Store(t.Context(), r); err != nil {
					t.Fatal(err)
				}
				want = sum()
			}
		})
	}
}

// A full stream drops its oldest records while they are read.
func TestARebuildLeavesAloneWhatIsDroppedMeanwhile(t *testing.T) {
	_, js := ledger(t)
	catchUp(t, js)
	d := &dropping{JetStream: js, t: t}
	s := cost.NewStore(d, names, []string{"customer"})
	before, err := s.Sum(t.Context(), cost.Query{By: cost.ByDay})
	if err != nil {
		t.Fatal(err)
	}
	d.drop = true
	corrected, after, err := s.Rebuild(t.Context())
	if err != nil || len(corrected)+len(after.Differences) > 0 || after.Before == "" || !d.dropped {
		t.Errorf("corrected %+v, %+v, %v", corrected, after, err)
	}
	if got, err := s.Sum(t.Context(), cost.Query{By: cost.ByDay}); err != nil || fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("the sums are %v, they were %v; %v", got, before, err)
	}
}

// dropping drops the oldest usage records once the state of their stream was read.
type dropping struct {
	jetstream.JetStream
	t             *testing.T
	drop, dropped bool
	seen          int // looks at the stream of totals
}

func (d *dropping) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	stream, err := d.JetStream.Stream(ctx, name)
	if name == names.TotalsStream() && d.drop {
		d.seen++
	}
	if err == nil && d.seen == 2 && !d.dropped { // the first look opens the counters, the second follows that at the records
		d.dropped = true
		records, err := d.JetStream.Stream(ctx, names.UsageStream())
		if err != nil {
			d.t.Fatal(err)
		}
		if err := records.Purge(ctx, jetstream.WithPurgeSequence(3)); err != nil {
			d.t.Fatal(err)
		}
	}
	return stream, err
}

func TestAVendorsListIsHeldAgainstTheLedger(t *testing.T) {
	s, _ := ledger(t)
	list := "\xef\xbb\xbfCredits,Connection_ID,connected_seconds\n1,c0,6.9\n2,c1,12\n,c2,99\n8,c3,\n9,c9,1\n1,c0,6\n"
	charges, err := cost.ReadCharges(strings.NewReader(list))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Check(t.Context(), charges, march, march.AddDate(0, 1, 0), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range c.Findings {
		found = append(found, f.ConnectionID+" "+f.What)
	}
	want := "[c2 differs c9 not_in_ledger c0 twice_on_list c5 not_on_list]"
	if c.OK || fmt.Sprint(found) != want || c.Same != 3 || c.WithoutID != 1 || c.OurCredits != 47 || c.TheirCredits != 21 {
		t.Errorf("%v of %+v, want %s", found, c, want)
	}
}

func TestAnEstimateIsTheSameUpToItsBound(t *testing.T) {
	_, js := ledger(t)
	l := usage.NewLedger(usage.Options{JS: js, Names: names, Window: time.Hour, Now: time.Now})
	r := usage.Record{JobID: "E", Run: 1, Session: 1, AppID: "e", Queue: "q", ConnectionID: "e1", ConfirmedAt: march, ConnectedMS: 60_000, Credits: 10, Estimated: true}
	if _, err := l.Store(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	s := cost.NewStore(js, names, nil)
	for ms, want := range map[int64]bool{1000: true, 60_500: true, 62_000: false} {
		c, err := s.Check(t.Context(), []cost.Charge{{ConnectionID: "e1", ConnectedMS: ms, Credits: -1}}, march, march.Add(time.Second), time.Second)
		if err != nil || c.OK != want {
			t.Errorf("%d ms: %+v, %v", ms, c, err)
		}
	}
}

func TestAListThatCanNotBeReadNamesItsLine(t *testing.T) {
	for list, want := range map[string]string{
		"":                                       "empty",
		"id,credits\nc,1\n":                      "connection_id",
		"connection_id,credits\n,1\n":            "line 2",
		"connection_id,credits\nc,x\n":           `line 2: credits is "x"`,
		"connection_id,credits\nc,-1\n":          "line 2",
		"connection_id,seconds\nc,1\n":           "line 2: it has none",
		"connection_id,credits\nc\n":             "line 2",
		"{\"connection_id\":\"c\"}\n":            "line 1: it has none",
		"{\"connection_id\":\"c\",\n":            "line 1",
		"\n\n":                                   "empty",
		"connection_id,credits,Credits\nc,1,2\n": "credits twice",
		"{\"connection_id\":\"c\",\"credits\":1}{\"connection_id\":":                              "line 1 is not one JSON object",
		"{\"connection_id\":\"c\",\"credits\":1}\nnull\n":                                         "line 2 is not one JSON object",
		"{\"connection_id\":\"c\",\"credits\":1} {\"connection_id\":\"d\",\"credits\":1}":         "line 1 is not one JSON object",
		"{\"connection_id\":{\"id\":\"c\"},\"credits\":1}":                                        "connection_id is {",
		"{\"connection_id\":true,\"credits\":1}":                                                  "connection_id is true",
		"{\"connectionId\":\"c\",\"credits\":1}":                                                  "connection_id is empty or missing",
		"{\"connection_id\":\"c\",\"credits\":1}\n{\"x\":\"" + strings.Repeat("x", 2<<20) + "\"}": `behind connection_id "c"`,
		"{\"connection_id\":\"c\",\"credits\":1,\"confirmed_at\":\"x\"}":                          "confirmed_at",
	} {
		if _, err := cost.ReadCharges(strings.NewReader(list)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", list, err, want)
		}
	}
	charges, err := cost.ReadCharges(strings.NewReader("{\"connection_id\":\"c\",\"connected_ms\":41700,\"credits\":7,\"x\":null}\n\n"))
	if err != nil || len(charges) != 1 || charges[0].ConnectedMS != 41700 || charges[0].Credits != 7 {
		t.Errorf("%+v, %v", charges, err)
	}
}

func FuzzReadCharges(f *testing.F) {
	f.Add("connection_id,credits\nc,1\n")
	f.Add("{\"connection_id\":\"c\",\"connected_ms\":1e3}\n")
	f.Fuzz(func(t *testing.T, list string) {
		charges, err := cost.ReadCharges(strings.NewReader(list))
		for _, c := range charges {
			if err == nil && (c.ConnectionID == "" || c.ConnectedMS < -1 || c.Credits < -1 || c.ConnectedMS < 0 && c.Credits < 0) {
				t.Errorf("%q gave %+v", list, c)
			}
		}
	})
}
