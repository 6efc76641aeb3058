// Package cost reads the ledger of connected time: sums by app, queue, avatar,
// label or day, the counters rebuilt from the records, and the vendor's own list
// held against it. docs/cost.md explains it.
package cost

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/topology"
)

// What sums can be by, beside "label:NAME".
const (
	ByApp    = "app"
	ByQueue  = "queue"
	ByAvatar = "avatar"
	ByDay    = "day"

	byLabel = "label:"
)

// ErrBy is in the chain of an error about what to sum by.
var ErrBy = errors.New("want app, queue, avatar, day or label:NAME")

// Query chooses sessions and says what to sum them by.
type Query struct {
	By string
	// Since and Until bound the time of the confirm: at Since or later, before
	// Until. Zero: no bound.
	Since, Until time.Time
}

// Row is the sum of one group. Key is the app, queue, avatar, day (YYYY-MM-DD, UTC)
// or label's value; "" is sessions without the label.
type Row struct {
	Key string `json:"key"`
	usage.Totals
}

// Store reads one fleet's ledger.
type Store struct {
	js     jetstream.JetStream
	names  topology.Names
	labels []string
}

// NewStore returns a Store. labels are the names by which workers add days up.
func NewStore(js jetstream.JetStream, names topology.Names, labels []string) *Store {
	return &Store{js: js, names: names, labels: labels}
}

// Sum returns the sums, most credits first, days in order. Whole days by what the
// counters know are read from those; all else is summed from the records.
func (s *Store) Sum(ctx context.Context, q Query) ([]Row, error) {
	label, isLabel := strings.CutPrefix(q.By, byLabel)
	if !isLabel && !slices.Contains([]string{ByApp, ByQueue, ByAvatar, ByDay}, q.By) || isLabel && label == "" {
		return nil, fmt.Errorf("sum by %q: %w", q.By, ErrBy)
	}
	var sums map[string]usage.Totals
	var err error
	if s.counted(q.By, label, isLabel) && wholeDay(q.Since) && wholeDay(q.Until) {
		sums, err = s.fromCounters(ctx, q, label)
	} else {
		sums, err = s.fromRecords(ctx, q, label)
	}
	if err != nil {
		return nil, err
	}
	rows := []Row{}
	for key, t := range sums {
		if t != (usage.Totals{}) {
			rows = append(rows, Row{key, t})
		}
	}
	slices.SortFunc(rows, func(a, b Row) int {
		if q.By == ByDay {
			return cmp.Compare(a.Key, b.Key)
		}
		return cmp.Or(cmp.Compare(b.Credits, a.Credits), cmp.Compare(a.Key, b.Key))
	})
	return rows, nil
}

func (s *Store) counted(by, label string, isLabel bool) bool {
	return by != ByAvatar && (!isLabel || slices.Contains(s.labels, label))
}

func wholeDay(t time.Time) bool { return t.IsZero() || t.Equal(t.UTC().Truncate(24*time.Hour)) }

func (s *Store) fromCounters(ctx context.Context, q Query, label string) (map[string]usage.Totals, error) {
	sums := make(map[string]usage.Totals)
	from, to := "", "~" // behind every day
	if !q.Since.IsZero() {
		from = usage.Day(q.Since)
	}
	if !q.Until.IsZero() {
		to = usage.Day(q.Until)
	}
	err := s.counters(ctx, func(subject string, _ uint64, t usage.Totals) {
		g, ok := usage.GroupOf(s.names, subject)
		if !ok || g.Day < from || g.Day >= to {
			return
		}
		key := g.Labels[label]
		switch q.By {
		case ByApp:
			key = g.App
		case ByQueue:
			key = g.Queue
		case ByDay:
			key = g.Day
		}
		sums[key] = sums[key].Plus(t)
	})
	return sums, err
}

// counters hands over each counter with its newest sequence.
func (s *Store) counters(ctx context.Context, f func(subject string, seq uint64, t usage.Totals)) error {
	return usage.ScanLast(ctx, s.js, s.names.TotalsStream(), s.names.AllTotals(), func(msg jetstream.Msg) error {
		t, err := usage.ParseCounter(msg.Data())
		if err != nil {
			return fmt.Errorf("%s in stream %s: %w", msg.Subject(), s.names.TotalsStream(), err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		f(msg.Subject(), meta.Sequence.Stream, t)
		return nil
	})
}

// Credits returns the credits of each counter, by its subject.
func (s *Store) Credits(ctx context.Context) (map[string]int64, error) {
	credits := make(map[string]int64)
	err := s.counters(ctx, func(subject string, _ uint64, t usage.Totals) { credits[subject] = t.Credits })
	return credits, err
}

func (s *Store) fromRecords(ctx context.Context, q Query, label string) (map[string]usage.Totals, error) {
	sums := make(map[string]usage.Totals)
	err := s.Records(ctx, q.Since, q.Until, func(r usage.Record, t usage.Totals) {
		key := r.Labels[label]
		switch q.By {
		case ByApp:
			key = r.AppID
		case ByQueue:
			key = r.Queue
		case ByAvatar:
			key = r.AvatarID
		case ByDay:
			key = r.Day()
		}
		sums[key] = sums[key].Plus(t)
	})
	return sums, err
}

// Records hands over what each record adds to sums. An estimate that was replaced
// is taken back, so that each session counts once in the end: r then is the estimate
// and t is negative.
func (s *Store) Records(ctx context.Context, since, until time.Time, f func(r usage.Record, t usage.Totals)) error {
	estimates, replaced := make(map[string]usage.Record), make(map[string]bool)
	in := func(r usage.Record) bool {
		return (since.IsZero() || !r.ConfirmedAt.Before(since)) && (until.IsZero() || r.ConfirmedAt.Before(until))
	}
	// A record is stored after its session's confirm.
	from := since
	if !from.IsZero() {
		from = from.Add(-time.Minute)
	}
	return usage.Scan(ctx, s.js, s.names.UsageStream(), s.names.AllUsage(), from, func(msg jetstream.Msg) error {
		var r usage.Record
		if err := json.Unmarshal(msg.Data(), &r); err != nil {
			return fmt.Errorf("a usage record of subject %s: %w", msg.Subject(), err)
		}
		id := r.ID()
		switch exact := msg.Headers().Get(nats.MsgIdHdr) != id; {
		case r.Estimated && replaced[id]:
			return nil
		case r.Estimated:
			estimates[id] = r
		case exact:
			replaced[id] = true
			if e, ok := estimates[id]; ok && in(e) {
				f(e, usage.Totals{}.Minus(e.Totals()))
			}
		}
		if in(r) {
			f(r, r.Totals())
		}
		return nil
	})
}

// Difference is a counter that is not what its records add up to.
type Difference struct {
	Counter string       `json:"counter"` // its subject
	Have    usage.Totals `json:"have"`
	Want    usage.Totals `json:"want"`

	seq uint64 // of the counter's newest message
}

// Compared is what a comparison of counters and records found.
type Compared struct {
	Records     int64        `json:"records"`  // sessions summed
	Counters    int          `json:"counters"` // compared
	Totals      usage.Totals `json:"totals"`   // of all records
	Before      string       `json:"before"`   // days before this one were left alone, since their records are no longer complete; "": none
	Differences []Difference `json:"differences"`
}

// Compare sums all records and holds the counters against them.
func (s *Store) Compare(ctx context.Context) (Compared, error) {
	c := Compared{Differences: []Difference{}}
	stream, err := s.js.Stream(ctx, s.names.UsageStream())
	if err != nil {
		return c, fmt.Errorf("stream %s: %w", s.names.UsageStream(), err)
	}
	if state := stream.CachedInfo().State; state.FirstSeq > 1 {
		// Of the oldest day some records may be gone, of those before all are.
		c.Before = usage.Day(state.FirstTime.Add(24 * time.Hour))
	}
	want := make(map[string]usage.Totals)
	err = s.Records(ctx, time.Time{}, time.Time{}, func(r usage.Record, t usage.Totals) {
		c.Records += t.Sessions
		c.Totals = c.Totals.Plus(t)
		subject := usage.Counter(s.names, r, s.labels)
		want[subject] = want[subject].Plus(t)
	})
	if err != nil {
		return c, err
	}
	have, seqs := make(map[string]usage.Totals), make(map[string]uint64)
	err = s.counters(ctx, func(subject string, seq uint64, t usage.Totals) { have[subject], seqs[subject] = t, seq })
	if err != nil {
		return c, err
	}
	all := maps.Clone(have)
	maps.Copy(all, want)
	for _, subject := range slices.Sorted(maps.Keys(all)) {
		if g, ok := usage.GroupOf(s.names, subject); !ok || g.Day < c.Before {
			continue
		}
		c.Counters++
		if have[subject] != want[subject] {
			c.Differences = append(c.Differences, Difference{subject, have[subject], want[subject], seqs[subject]})
		}
	}
	return c, nil
}

// settleTime is how long a session may be in the records and not in the counters
// yet, or the other way round as a reader sees them.
const settleTime = 3 * time.Second

// Rebuild brings counters to what their records add up to, and returns what it
// corrected and what a last comparison found. Sessions that end meanwhile are left
// alone: only what differs twice, by the same, is corrected.
func (s *Store) Rebuild(ctx context.Context) (corrected []Difference, after Compared, err error) {
	corrected = []Difference{}
	first, err := s.Compare(ctx)
	if err != nil || len(first.Differences) == 0 {
		return corrected, first, err
	}
	if err := pause(ctx); err != nil {
		return corrected, first, err
	}
	second, err := s.Compare(ctx)
	if err != nil {
		return corrected, second, err
	}
	for _, d := range second.Differences {
		if !slices.ContainsFunc(first.Differences, func(o Difference) bool {
			return o.Counter == d.Counter && o.Want.Minus(o.Have) == d.Want.Minus(d.Have)
		}) {
			continue
		}
		msg := &nats.Msg{Subject: d.Counter, Header: nats.Header{"Nats-Incr": {d.Want.Minus(d.Have).Number().String()}}}
		// Two that rebuild from the same state correct once.
		id := fmt.Sprintf("rebuild.%s.%d", d.Counter, d.seq)
		if _, err := s.js.PublishMsg(ctx, msg, jetstream.WithMsgID(id)); err != nil {
			return corrected, second, fmt.Errorf("counter %s: %w", d.Counter, err)
		}
		corrected = append(corrected, d)
	}
	after, err = s.Compare(ctx)
	return corrected, after, err
}

func pause(ctx context.Context) error {
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
