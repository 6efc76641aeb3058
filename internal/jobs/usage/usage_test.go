package usage_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
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

func TestMain(m *testing.M) { natstest.Main(m) }

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

func TestACounterSaysWhatItIsAbout(t *testing.T) {
	r := usage.Record{AppID: "my.app *", Queue: "q", ConfirmedAt: time.Date(2026, 3, 1, 0, 30, 0, 0, time.FixedZone("", 3600)),
		Labels: map[string]string{"a=b.c": "x=>*", "long": strings.Repeat("y", 200), "empty": "", "unused": "z"}}
	by := []string{"a=b.c", "absent", "empty", "long"}
	subjects := usage.Subjects(names, r, by)
	want := []struct{ family, period string }{
		{usage.ByDay, "2026-02-28"}, {usage.ByLabels(by), "2026-02-28"}, {usage.ByMonth(by), "2026-02"},
	}
	for i, subject := range subjects {
		g, ok := usage.GroupOf(names, subject)
		if !ok || g.Family != want[i].family || g.Period != want[i].period || g.App != r.AppID || g.Queue != "q" {
			t.Errorf("%s became %+v, %t", subject, g, ok)
		}
		if i > 0 && (g.Labels["long"] != strings.Repeat("y", 64) || len(g.Labels) != 3) {
			t.Errorf("%s has labels %v", subject, g.Labels)
		}
		if len(subject) > 1000 || strings.ContainsAny(subject, " *>") {
			t.Errorf("not a subject: %s", subject)
		}
	}
	if len(subjects) != 3 || len(usage.Subjects(names, r, nil)) != 1 {
		t.Errorf("%d counters", len(subjects))
	}
	for _, other := range []string{"avatar.totals.upto.none", "avatar.usage.a.b", "avatar.totals.labels.2026-01-01.a.b.nopair", "avatar.totals.day.2026-01-01.a.=Z"} {
		if g, ok := usage.GroupOf(names, other); ok {
			t.Errorf("%s is %+v", other, g)
		}
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
	t.Parallel() // they mostly wait
	js, err := jetstream.New(natstest.ConnectURL(t, natstest.Start(t).ClientURL()))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), names.UsageStream())
	if err != nil {
		t.Fatal(err)
	}
	c := s.CachedInfo().Config
	c.Duplicates = 100 * time.Millisecond // ids are forgotten at once
	if _, err := js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	l := usage.NewLedger(usage.Options{JS: js, Names: names, Tariff: usage.Tariff{Minimum: 1}, Window: window, Now: time.Now})
	return stored{l, t, js}
}

var labels = []string{"customer"}

// counters opens the counters again, as another worker.
func (s stored) counters() *usage.Counters {
	s.t.Helper()
	c, err := usage.OpenCounters(s.t.Context(), s.js, names, labels)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// catchUp adds all that is stored.
func (s stored) catchUp() {
	s.t.Helper()
	if err := s.counters().CatchUp(s.t.Context(), func(error) {}); err != nil {
		s.t.Fatal(err)
	}
}

func (s stored) write(r usage.Record) {
	s.t.Helper()
	if _, err := s.Store(s.t.Context(), r); err != nil {
		s.t.Fatal(err)
	}
}

func record(session int) usage.Record {
	return usage.Record{
		JobID: "J", Run: 1, Session: session, AppID: "app", Queue: "default", Labels: map[string]string{"customer": "acme"},
		ConfirmedAt: time.Now().UTC().Add(-10 * time.Second), ConnectedMS: 6001, Credits: 2, OutcomeCode: "completed", ConnectionID: "c",
	}
}

// sums returns the number of records, and what each family of counters says.
func (s stored) sums() (records int, families map[string]usage.Totals) {
	s.t.Helper()
	err := usage.Scan(s.t.Context(), s.js, names.UsageStream(), names.AllUsage(), time.Time{}, func(jetstream.Msg) error { records++; return nil })
	if err != nil {
		s.t.Fatal(err)
	}
	families = make(map[string]usage.Totals)
	err = s.counters().Read(s.t.Context(), []string{names.AllTotals()}, func(c usage.Counter) {
		if g, ok := usage.GroupOf(names, c.Subject); ok {
			families[g.Family] = families[g.Family].Plus(c.Totals)
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return records, families
}

// expect checks the number of records, and that every family of counters has a sum.
func (s stored) expect(records int, want usage.Totals) {
	s.t.Helper()
	n, families := s.sums()
	if n != records || len(families) != 3 {
		s.t.Errorf("%d records, counters of %v; want %d records and three families", n, families, records)
	}
	for family, got := range families {
		if got != want {
			s.t.Errorf("by %s: %+v, want %+v", family, got, want)
		}
	}
}

// forgotten returns when the server no longer knows the ids of what is stored.
func (s stored) forgotten() {
	s.t.Helper()
	natstest.ForgetIDs(s.t, s.js, names.UsageStream(), names.Usage("probe", "p"))
}

func TestASessionWrittenAgainLongAfterTheDuplicateWindowCountsOnce(t *testing.T) {
	l := newLedger(t, 0) // everything is searched for
	for i := range 3 {
		fresh, err := l.Store(t.Context(), record(1))
		if err != nil || fresh != (i == 0) {
			t.Fatal(fresh, err)
		}
		l.forgotten()
		l.catchUp()
	}
	l.expect(1, record(1).Totals())
}

func TestSearchingForASessionOfLongAgoTakesNoLongerThanItMay(t *testing.T) {
	l := newLedger(t, 0) // everything is searched for
	wait := l.Send(record(1))
	if fresh, err := wait(t.Context(), time.Nanosecond); fresh || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%t, %v", fresh, err)
	}
	for i := range 2 {
		fresh, err := wait(t.Context(), time.Minute)
		if err != nil || fresh != (i == 0) {
			t.Errorf("%t, %v", fresh, err)
		}
		l.forgotten()
	}
}

func TestRecordsAreAddedOnceHoweverManyWorkersAddThem(t *testing.T) {
	l := newLedger(t, time.Hour)
	const each, workers = 40, 4
	var want usage.Totals
	for n := range each * workers {
		r := record(n)
		r.Labels["customer"] = fmt.Sprint(n % 7)
		want = want.Plus(r.Totals())
	}
	failures := make(chan error, workers)
	natstest.Together(workers, func(w int) {
		counters, err := usage.OpenCounters(t.Context(), l.js, names, labels)
		for n := range each {
			r := record(w*each + n)
			r.Labels["customer"] = fmt.Sprint((w*each + n) % 7)
			if err == nil {
				_, err = l.Store(t.Context(), r)
			}
			if err == nil && n%8 == 7 {
				err = counters.CatchUp(t.Context(), func(error) {})
			}
		}
		failures <- err
	})
	for range workers {
		if err := <-failures; err != nil {
			t.Fatal(err)
		}
	}
	l.catchUp()
	l.expect(each*workers, want)
}

func TestAWorkerThatDiedWhileItAddedIsGoneOnFrom(t *testing.T) {
	l := newLedger(t, time.Hour)
	a, b := record(1), record(2)
	b.Labels = map[string]string{"customer": "b"}
	l.write(a)
	l.catchUp()
	l.write(b)
	l.write(record(3))
	// It added one of the two, and did not come to say so.
	counters := l.counters()
	from, err := counters.Upto(t.Context())
	if err != nil || from != 1 {
		t.Fatal(from, err)
	}
	if err := counters.Add(t.Context(), []usage.Stored{{Seq: 2, ID: b.ID(), Record: b}}, from, from); err != nil {
		t.Fatal(err)
	}
	l.catchUp()
	l.expect(3, a.Totals().Plus(b.Totals()).Plus(record(3).Totals()))
	if upto, err := l.counters().Upto(t.Context()); err != nil || upto != 3 {
		t.Errorf("complete up to %d, %v; want 3", upto, err)
	}
	// One that was frozen adds what it had read long ago.
	if err := counters.Add(t.Context(), []usage.Stored{{Seq: 2, ID: b.ID(), Record: b}, {Seq: 3, ID: "x", Record: record(3)}}, from, 3); err != nil {
		t.Fatal(err)
	}
	l.expect(3, a.Totals().Plus(b.Totals()).Plus(record(3).Totals()))
}

func TestCountersGoOnFromAStreamOfRecordsThatWasMadeAgain(t *testing.T) {
	l := newLedger(t, time.Hour)
	for n := range 3 {
		l.write(record(n))
	}
	l.catchUp()
	if err := l.js.DeleteStream(t.Context(), names.UsageStream()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := topology.Ensure(t.Context(), l.js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	l.write(record(9))
	l.catchUp()
	want := record(1).Totals()
	want = want.Plus(want).Plus(want).Plus(want)
	l.expect(1, want)
}

// A stream restored from a backup was made when it was first made, and has fewer records
// than the counters have added.
func TestCountersGoOnFromAStreamOfRecordsThatWasRestored(t *testing.T) {
	l := newLedger(t, time.Hour)
	for n := range 3 {
		l.write(record(n))
	}
	l.catchUp()
	stream, err := l.js.Stream(t.Context(), names.UsageStream())
	if err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprintf("%d.500", stream.CachedInfo().Created.UnixMilli())
	totals, err := l.js.Stream(t.Context(), names.TotalsStream())
	if err != nil {
		t.Fatal(err)
	}
	info, err := totals.Info(t.Context(), jetstream.WithSubjectFilter(">"))
	if err != nil {
		t.Fatal(err)
	}
	for subject := range info.State.Subjects {
		msg := &nats.Msg{Subject: subject, Header: nats.Header{"Nats-Incr": {"0"}, "Avatar-Upto": {before}}}
		if _, err := l.js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
	}
	want := record(1).Totals()
	want = want.Plus(want).Plus(want)
	l.catchUp()
	for n := range 2 {
		l.write(record(10 + n))
		l.catchUp()
		want = want.Plus(record(1).Totals())
		l.expect(4+n, want)
	}
	if upto, err := l.counters().Upto(t.Context()); err != nil || upto != 5 {
		t.Errorf("complete up to %d, %v", upto, err)
	}
}

func TestWhatIsNotAUsageRecordCountsForNothing(t *testing.T) {
	l := newLedger(t, time.Hour)
	foreign := []string{``, `{}`, `x`, `{"job_id":"J","run":1,"session":1,"app_id":"a","confirmed_at":"2026-01-01T00:00:00Z","credits":-1}`, `{"job_id":"J","run":"1"}`}
	for _, body := range foreign {
		if _, err := l.js.Publish(t.Context(), names.Usage("app", "q"), []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	l.write(record(1))
	found := 0
	if err := l.counters().CatchUp(t.Context(), func(error) { found++ }); err != nil || found != len(foreign) {
		t.Errorf("%d foreign messages, %v; want %d", found, err, len(foreign))
	}
	l.expect(len(foreign)+1, record(1).Totals())
}

func TestAnAdderAddsWhileItIsItsTurnAndAtItsEnd(t *testing.T) {
	l := newLedger(t, time.Hour)
	added, turn := make(chan error, 16), make(chan bool, 1)
	turn <- false // another worker's at first
	a := usage.NewAdder(usage.AdderOptions{
		JS: l.js, Names: names, Labels: labels, Every: time.Millisecond, TurnEvery: 10 * time.Millisecond, Own: l.Own,
		Turn: func(context.Context) (bool, error) {
			select {
			case mine := <-turn:
				return mine, nil
			default:
				return true, nil
			}
		},
		Result: func(err error) { added <- err }, Foreign: func(err error) { t.Error(err) },
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	l.write(record(1))
	if err := <-added; err != nil {
		t.Error(err)
	}
	l.expect(1, record(1).Totals())
	stop()
	<-done
	l.write(record(2))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	a.Run(ended) // one that is stopped adds what there is
	l.expect(2, record(1).Totals().Plus(record(2).Totals()))
}

// A worker has its lease soon after its start, and its records are not to wait for the
// next turn.
func TestAnAdderWithoutALeaseAsksAgainSoon(t *testing.T) {
	l := newLedger(t, time.Hour)
	added, asked := make(chan error, 16), 0
	var kept atomic.Bool
	a := usage.NewAdder(usage.AdderOptions{
		JS: l.js, Names: names, Labels: labels, Every: time.Millisecond, TurnEvery: time.Hour,
		Own: func(from, upto uint64) ([]usage.Stored, bool) {
			kept.Store(true)
			return l.Own(from, upto)
		},
		Turn: func(context.Context) (bool, error) {
			if !kept.Load() {
				t.Error("what is stored now will be read back")
			}
			if asked++; asked <= 3 {
				return false, usage.ErrNotYet
			}
			return true, nil
		},
		Result: func(err error) { added <- err }, Foreign: func(err error) { t.Error(err) },
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	l.write(record(1))
	select {
	case err := <-added:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(natstest.Patience):
		t.Error("nothing was added")
	}
	stop()
	<-done
	l.expect(1, record(1).Totals())
}

func TestWhatALedgerHasStoredItselfIsNotReadAgain(t *testing.T) {
	l := newLedger(t, time.Hour)
	l.write(record(1)) // nobody has asked yet
	if own, all := l.Own(0, 1); all {
		t.Errorf("%+v", own)
	}
	l.write(record(2))
	l.write(record(3))
	if own, all := l.Own(1, 3); !all || len(own) != 2 || own[0].Session != 2 || own[1].Seq != 3 {
		t.Errorf("%+v, %t", own, all)
	}
	if _, all := l.Own(1, 3); all {
		t.Error("what was handed over once is still kept")
	}
	if _, err := l.js.Publish(t.Context(), names.Usage("app", "q"), []byte(`{}`)); err != nil { // another's
		t.Fatal(err)
	}
	l.write(record(5))
	if own, all := l.Own(3, 5); all {
		t.Errorf("%+v, with one that another has stored", own)
	}
}

func TestThereAreNoCountersOnAnOldServer(t *testing.T) {
	l := newLedger(t, time.Hour)
	if err := l.js.DeleteStream(t.Context(), names.TotalsStream()); err != nil {
		t.Fatal(err)
	}
	if _, err := usage.OpenCounters(t.Context(), l.js, names, labels); !errors.Is(err, usage.ErrNoCounters) {
		t.Error(err)
	}
	l.write(record(1)) // records are written all the same
}

func FuzzParse(f *testing.F) {
	data, err := json.Marshal(record(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, string(data))
	f.Add([]byte(`{}`), "x")
	f.Fuzz(func(t *testing.T, data []byte, replaced string) {
		s, err := usage.Parse(nats.Header{usage.HeaderReplaces: {replaced}}, data, 7)
		if err != nil {
			return
		}
		var sum usage.Totals
		for _, e := range s.Entries() {
			sum = sum.Plus(e.Totals)
		}
		if want := 1; replaced == "" && sum.Sessions != int64(want) || replaced != "" && sum.Sessions != 0 {
			t.Errorf("%d sessions of %s", sum.Sessions, data)
		}
	})
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
				if first == "estimate" {
					l.write(e)
					l.catchUp()
				}
				if err := l.Correct(t.Context(), e, exact); err != nil {
					t.Fatal(err)
				}
				if first != "estimate" {
					l.catchUp()
					l.write(e)
				}
				l.catchUp()
				l.expect(2, exact.Totals())
			})
		}
	}
}

func TestARecordThatIsNotTakenIsReportedAtTheFirstAttempt(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t) // without the stream
	unanswered := make(chan struct{}, 2)
	l := usage.NewLedger(usage.Options{
		JS: js, Names: names, Window: time.Hour, Now: time.Now, Unanswered: func() { unanswered <- struct{}{} },
	})
	now := time.Now()
	for name, ended := range map[string]time.Time{"sent": now, "searched for first": now.Add(-time.Hour)} {
		ctx, cancel := context.WithCancel(t.Context())
		failed := make(chan error, 1)
		go func() {
			_, err := l.Store(ctx, usage.Record{JobID: "j", AppID: "app", Queue: "default", Run: 1, Session: 1, ConfirmedAt: ended})
			failed <- err
		}()
		select {
		case <-unanswered: // while Store goes on
		case <-time.After(natstest.Patience):
			t.Errorf("%s: nothing was reported", name)
		}
		cancel()
		if err := <-failed; err == nil {
			t.Errorf("%s: stored without a stream", name)
		}
	}
}
