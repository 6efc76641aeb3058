package usage_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestSumOfSessionsIsWhatWasBegunAndAtLeastTheMinimumOfEach(t *testing.T) {
	for _, c := range []struct {
		connected time.Duration
		sessions  int
		want      int64
	}{{0, 0, 0}, {time.Millisecond, 1, 1}, {6 * time.Second, 1, 1}, {6001 * time.Millisecond, 1, 2}, {time.Second, 4, 4}, {time.Minute, 3, 10}} {
		if got := (usage.Tariff{Minimum: 1}).Sum(c.connected, c.sessions); got != c.want {
			t.Errorf("%s in %d sessions: %d credits, want %d", c.connected, c.sessions, got, c.want)
		}
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var names = topology.Names{Prefix: "avatar"}

func TestSumsInACounterComeOutAsTheyWentIn(t *testing.T) {
	big := int64(400_000_000_000_000_000)
	for _, want := range []usage.Totals{
		{}, {Sessions: 1, ConnectedMS: 1, Credits: 1, EstimatedCredits: 1, FailedCredits: 1},
		{Sessions: 10_000_000, ConnectedMS: big, Credits: big, FailedCredits: big},
		{ConnectedMS: -5, Credits: -1, EstimatedCredits: -1},
		{Sessions: 3, ConnectedMS: -1, Credits: 2, FailedCredits: -7},
		{FailedCredits: -big},
	} {
		if got := usage.Unpack(want.Number()); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		if got, err := usage.ParseCounter([]byte(`{"val":"` + want.Number().String() + `"}`)); err != nil || got != want {
			t.Errorf("parsed %+v, want %+v: %v", got, want, err)
		}
	}
}

func FuzzSumsOfPackedNumbersArePackedSums(f *testing.F) {
	f.Add(int64(1), int64(6000), int64(-1), int64(2), int64(-3))
	f.Fuzz(func(t *testing.T, a, b, c, d, e int64) {
		const most = 1 << 57
		x := usage.Totals{Sessions: a % most, ConnectedMS: b % most, Credits: c % most, EstimatedCredits: d % most, FailedCredits: e % most}
		y := usage.Totals{Sessions: e % most, ConnectedMS: a % most, Credits: b % most, EstimatedCredits: c % most, FailedCredits: d % most}
		sum := x.Number()
		sum.Add(sum, y.Number())
		if got := usage.Unpack(sum); got != x.Plus(y) {
			t.Errorf("got %+v, want %+v", got, x.Plus(y))
		}
	})
}

func TestEveryBegunCreditCounts(t *testing.T) {
	for ms, want := range map[int64]int64{-5: 1, 0: 1, 1: 1, 6000: 1, 6001: 2, 60_000: 10, 60_001: 11} {
		if got := (usage.Tariff{Minimum: 1}).Credits(time.Duration(ms) * time.Millisecond); got != want {
			t.Errorf("%d ms are %d credits, want %d", ms, got, want)
		}
	}
	if got := (usage.Tariff{Credit: time.Second, Minimum: 5}).Credits(2 * time.Second); got != 5 {
		t.Errorf("got %d credits, want the minimum", got)
	}
}

func TestACounterTellsWhatItIsAbout(t *testing.T) {
	r := usage.Record{AppID: "my.app *", Queue: "q", ConfirmedAt: time.Date(2026, 3, 1, 0, 30, 0, 0, time.FixedZone("", 3600)),
		Labels: map[string]string{"a=b.c": "x=>*", "long": strings.Repeat("y", 200), "empty": "", "unused": "z"}}
	subject := usage.Counter(names, r, []string{"a=b.c", "absent", "empty", "long"})
	g, ok := usage.GroupOf(names, subject)
	if !ok || g.Day != "2026-02-28" || g.App != r.AppID || g.Queue != "q" || g.Labels["long"] != strings.Repeat("y", 64) || len(g.Labels) != 3 {
		t.Errorf("%s became %+v, %t", subject, g, ok)
	}
	if len(subject) > 1000 || strings.ContainsAny(subject, " *>") {
		t.Errorf("not a subject: %s", subject)
	}
}

// stored is a ledger over streams of its own.
type stored struct {
	*usage.Ledger
	t  *testing.T
	js jetstream.JetStream
}

// newLedger makes a ledger to which a session noted before now−late is no longer
// known by its id.
func newLedger(t *testing.T, window time.Duration) stored {
	t.Helper()
	js, err := jetstream.New(natstest.ConnectURL(t, natstest.Start(t).ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{names.UsageStream(), names.TotalsStream()} { // ids are forgotten at once
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		c := s.CachedInfo().Config
		c.Duplicates = 100 * time.Millisecond
		if _, err := js.UpdateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	l := usage.NewLedger(usage.Options{JS: js, Names: names, Tariff: usage.Tariff{Minimum: 1}, Labels: []string{"customer"}, Window: window, Now: time.Now})
	return stored{l, t, js}
}

func record(session int) usage.Record {
	return usage.Record{
		JobID: "J", Run: 1, Session: session, AppID: "app", Queue: "default", Labels: map[string]string{"customer": "acme"},
		ConfirmedAt: time.Now().UTC(), ConnectedMS: 6001, Credits: 2, OutcomeCode: "completed", ConnectionID: "c",
	}
}

// sums returns the number of records, and what the counters say.
func (s stored) sums() (records int, t usage.Totals) {
	s.t.Helper()
	err := usage.Scan(s.t.Context(), s.js, names.UsageStream(), names.AllUsage(), time.Time{}, func(jetstream.Msg) error { records++; return nil })
	if err != nil {
		s.t.Fatal(err)
	}
	err = usage.ScanLast(s.t.Context(), s.js, names.TotalsStream(), names.AllTotals(), func(msg jetstream.Msg) error {
		c, err := usage.ParseCounter(msg.Data())
		t = t.Plus(c)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return records, t
}

// forgotten returns when the server no longer knows the ids of what is stored.
func (s stored) forgotten() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	for n := 0; ; n++ {
		ack, err := s.js.Publish(ctx, names.Usage("probe", "p"), []byte(`{}`), jetstream.WithMsgID("probe"))
		if err != nil {
			s.t.Fatal(err)
		}
		if n > 0 && !ack.Duplicate {
			break
		}
	}
	stream, err := s.js.Stream(ctx, names.UsageStream())
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject(names.Usage("probe", "p")))
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func TestASessionToldAgainLongAfterTheDuplicateWindowCountsOnce(t *testing.T) {
	l := newLedger(t, 0) // everything is searched for
	noted := time.Now()
	for range 3 {
		if _, err := l.Store(t.Context(), record(1), noted); err != nil {
			t.Fatal(err)
		}
		l.forgotten()
	}
	if n, sum := l.sums(); n != 1 || sum.Sessions != 1 || sum.Credits != 2 {
		t.Errorf("%d records, sums %+v; want one session", n, sum)
	}
}

func TestAWorkerThatDiedBetweenRecordAndCounterIsMadeUpForDaysLater(t *testing.T) {
	l := newLedger(t, 0)
	data, err := json.Marshal(record(1))
	if err != nil {
		t.Fatal(err)
	}
	noted := time.Now()
	if _, err := l.js.Publish(t.Context(), names.Usage("app", "default"), data, jetstream.WithMsgID("J.run1.s1")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l.forgotten()
		if fresh, err := l.Store(t.Context(), record(1), noted); err != nil || fresh {
			t.Fatal(fresh, err)
		}
	}
	if n, sum := l.sums(); n != 1 || sum.Sessions != 1 {
		t.Errorf("%d records, sums %+v; want one session", n, sum)
	}
}

func TestASessionIsFoundToBeCountedAlsoWhereItsCounterHasForgottenIt(t *testing.T) {
	l := newLedger(t, time.Hour)
	noted := time.Now()
	if _, err := l.Store(t.Context(), record(1), noted); err != nil {
		t.Fatal(err)
	}
	for n := range topology.TotalsHistory {
		if _, err := l.Store(t.Context(), record(n+2), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	late := usage.NewLedger(usage.Options{JS: l.js, Names: names, Labels: []string{"customer"}, Now: time.Now})
	l.forgotten()
	if _, err := late.Store(t.Context(), record(1), noted); err != nil {
		t.Fatal(err)
	}
	if n, sum := l.sums(); n != topology.TotalsHistory+1 || sum.Sessions != topology.TotalsHistory+1 {
		t.Errorf("%d records, sums %+v; want %d sessions", n, sum, topology.TotalsHistory+1)
	}
}

func TestWhatASessionReallyUsedReplacesItsEstimate(t *testing.T) {
	estimate := record(1)
	estimate.Estimated, estimate.ConnectedMS, estimate.Credits, estimate.OutcomeCode = true, 60_000, 10, "workerLost"
	exact := record(1)
	exact.OutcomeCode = "released"
	yesterday := estimate
	yesterday.ConfirmedAt = estimate.ConfirmedAt.AddDate(0, 0, -1)
	for name, e := range map[string]usage.Record{"the same day": estimate, "another day": yesterday} {
		for _, first := range []string{"estimate", "correction"} {
			t.Run(fmt.Sprintf("%s, %s first", name, first), func(t *testing.T) {
				l := newLedger(t, time.Hour)
				write := func() {
					if _, err := l.Store(t.Context(), e, time.Now()); err != nil {
						t.Fatal(err)
					}
				}
				if first == "estimate" {
					write()
				}
				if err := l.Correct(t.Context(), e, exact); err != nil {
					t.Fatal(err)
				}
				if first != "estimate" {
					write()
				}
				if n, sum := l.sums(); n != 2 || sum != exact.Totals() {
					t.Errorf("%d records, sums %+v; want %+v", n, sum, exact.Totals())
				}
			})
		}
	}
}

// BenchmarkSumOfAYear reads the counters of a year of 200 customers, as many as ten
// million sessions have left.
func BenchmarkSumOfAYear(b *testing.B) {
	js, err := jetstream.New(natstest.ConnectURL(b, natstest.Start(b).ClientURL()))
	if err != nil {
		b.Fatal(err)
	}
	if _, _, err := topology.Ensure(b.Context(), js, names, topology.DefaultSettings()); err != nil {
		b.Fatal(err)
	}
	l := usage.NewLedger(usage.Options{JS: js, Names: names, Labels: []string{"customer"}, Window: time.Hour, Now: time.Now})
	days, customers := 365, 200
	if testing.Short() {
		days, customers = 30, 10
	}
	work := make(chan usage.Record)
	failures := make(chan error, 64)
	go func() {
		defer close(work)
		for d := range days {
			for n := range customers {
				r := record(1)
				r.JobID, r.ConfirmedAt, r.Labels = fmt.Sprintf("J%d-%d", d, n), r.ConfirmedAt.AddDate(0, 0, -d), map[string]string{"customer": fmt.Sprint(n)}
				work <- r
			}
		}
	}()
	natstest.Together(cap(failures), func(int) {
		var failed error
		for r := range work {
			if _, err := l.Store(b.Context(), r, time.Now()); err != nil {
				failed = err
			}
		}
		failures <- failed
	})
	close(failures)
	for err := range failures {
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		n := 0
		err := usage.ScanLast(b.Context(), js, names.TotalsStream(), names.AllTotals(), func(msg jetstream.Msg) error {
			n++
			_, err := usage.ParseCounter(msg.Data())
			return err
		})
		if err != nil || n != days*customers {
			b.Fatal(n, err)
		}
	}
}
