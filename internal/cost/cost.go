// Package cost reads the ledger of connected time: sums by app, queue, avatar,
// label or day, the counters rebuilt from the records, and the vendor's own list
// compared with it. docs/cost.md explains it. It owns these sums, and must not know how
// a record gets into the ledger.
package cost

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/topology"
)

// What sums can be by, besides "label:NAME".
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

// Sum returns the sums, most credits first, days in order. Whole days of what the
// counters have are read from them, and from the records that are not in them yet;
// all else is summed from the records.
func (s *Store) Sum(ctx context.Context, q Query) ([]Row, error) {
	label, isLabel := strings.CutPrefix(q.By, byLabel)
	if !isLabel && !slices.Contains([]string{ByApp, ByQueue, ByAvatar, ByDay}, q.By) || isLabel && label == "" {
		return nil, fmt.Errorf("sum by %q: %w", q.By, ErrBy)
	}
	var sums map[string]usage.Totals
	err := usage.ErrNoCounters
	if s.counted(q.By, label, isLabel) && wholeDay(q.Since) && wholeDay(q.Until) {
		sums, err = s.fromCounters(ctx, q, label)
	}
	if errors.Is(err, usage.ErrNoCounters) {
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
	family, months := usage.ByDay, false
	if q.By != ByDay && q.By != ByApp && q.By != ByQueue {
		family, months = usage.ByLabels(s.labels), true
	}
	err := s.sums(ctx, family, months, q.Since, q.Until, func(g usage.Group, t usage.Totals) {
		key := g.Labels[label]
		switch q.By {
		case ByApp:
			key = g.App
		case ByQueue:
			key = g.Queue
		case ByDay:
			key = g.Period
		}
		sums[key] = sums[key].Plus(t)
	})
	return sums, err
}

// sums hands over the sums of a family of days, from the counters and from the
// records that are not in them yet. months: whole months may come as one.
func (s *Store) sums(ctx context.Context, family string, months bool, since, until time.Time, f func(usage.Group, usage.Totals)) error {
	counters, err := usage.OpenCounters(ctx, s.js, s.names, s.labels)
	if err != nil {
		return err
	}
	// Before the counters: what is added meanwhile is in neither else.
	from, err := counters.Upto(ctx)
	if err != nil {
		return err
	}
	span := newSpan(family, since, until)
	if months {
		span.takeMonths(usage.ByMonth(s.labels), since.UTC(), until.UTC())
	}
	span.listDays(since, until)
	upto := make(map[string]uint64)
	err = counters.Read(ctx, span.filters(s.names), func(c usage.Counter) {
		g, ok := usage.GroupOf(s.names, c.Subject)
		if !ok || !span.holds(g.Family, g.Period) {
			return
		}
		if c.Upto > from {
			upto[c.Subject] = c.Upto
		}
		f(g, c.Totals)
	})
	if err != nil {
		return err
	}
	_, err = usage.After(ctx, s.js, s.names.UsageStream(), s.names.AllUsage(), from, func(r usage.Stored) error {
		for _, e := range r.Entries() {
			for _, subject := range usage.Subjects(s.names, e.Record, s.labels) {
				g, ok := usage.GroupOf(s.names, subject)
				if ok && span.holds(g.Family, g.Period) && r.Seq > upto[subject] {
					f(g, e.Totals)
				}
			}
		}
		return nil
	}, func(error) {})
	return err
}

// Days returns what the sessions of each whole day since one add up to: by app and
// queue, or with labels by those too.
func (s *Store) Days(ctx context.Context, since time.Time, labels bool) ([]usage.Sum, error) {
	sums := []usage.Sum{}
	add := func(g usage.Group, t usage.Totals) { sums = append(sums, usage.Sum{Group: g, Totals: t}) }
	family := usage.ByDay
	if labels && len(s.labels) > 0 {
		family = usage.ByLabels(s.labels)
	}
	err := s.sums(ctx, family, false, since, time.Time{}, add)
	if errors.Is(err, usage.ErrNoCounters) {
		err = s.Records(ctx, since, time.Time{}, func(r usage.Record, t usage.Totals) {
			add(usage.Group{Family: family, Period: r.Day(), App: r.AppID, Queue: r.Queue, Labels: r.Labels}, t)
		})
	}
	return sums, err
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
// and t is negative. What is in the stream and is not a usage record is left out.
func (s *Store) Records(ctx context.Context, since, until time.Time, f func(r usage.Record, t usage.Totals)) error {
	in := func(r usage.Record) bool {
		return (since.IsZero() || !r.ConfirmedAt.Before(since)) && (until.IsZero() || r.ConfirmedAt.Before(until))
	}
	// A record is stored after its session's confirm.
	from := since
	if !from.IsZero() {
		from = from.Add(-time.Minute)
	}
	return usage.Scan(ctx, s.js, s.names.UsageStream(), s.names.AllUsage(), from, func(msg jetstream.Msg) error {
		r, err := usage.Parse(msg.Headers(), msg.Data(), 0)
		if err != nil {
			return nil //nolint:nilerr // another's message: it costs nothing
		}
		for _, e := range r.Entries() {
			if in(e.Record) {
				f(e.Record, e.Totals)
			}
		}
		return nil
	})
}

// Difference is a counter that is not what its records add up to.
type Difference struct {
	Counter string       `json:"counter"` // its subject
	Have    usage.Totals `json:"have"`
	Want    usage.Totals `json:"want"`

	counter usage.Counter // as it was read
}

// Compared is what a comparison of counters and records found.
type Compared struct {
	Records     int64        `json:"records"`    // sessions summed
	Pending     int64        `json:"pending"`    // of those, not in the counters yet
	Unreadable  int64        `json:"unreadable"` // messages that are not usage records
	Counters    int          `json:"counters"`   // compared
	Totals      usage.Totals `json:"totals"`     // of all records
	Before      string       `json:"before"`     // days before this one were left alone, since their records are no longer complete; "": none
	Differences []Difference `json:"differences"`
}

// Compare sums all records and compares the counters with them: each with those
// that it says it has. The error is usage.ErrNoCounters if there are none.
func (s *Store) Compare(ctx context.Context) (Compared, error) {
	counters, err := usage.OpenCounters(ctx, s.js, s.names, s.labels)
	if err != nil {
		return Compared{Differences: []Difference{}}, err
	}
	return s.compare(ctx, counters)
}

func (s *Store) compare(ctx context.Context, counters *usage.Counters) (Compared, error) {
	c := Compared{Differences: []Difference{}}
	stream, err := s.js.Stream(ctx, s.names.UsageStream())
	if err != nil {
		return c, fmt.Errorf("stream %s: %w", s.names.UsageStream(), err)
	}
	totals, err := s.js.Stream(ctx, s.names.TotalsStream())
	if err != nil {
		return c, fmt.Errorf("stream %s: %w", s.names.TotalsStream(), err)
	}
	left := func(info *jetstream.StreamInfo) {
		if begin := completeSince(info, totals.CachedInfo().Created); !begin.IsZero() {
			// Of this day some records may be gone, of those before all are.
			c.Before = max(c.Before, usage.Day(begin.Add(24*time.Hour)))
		}
	}
	left(stream.CachedInfo())
	from, err := counters.Upto(ctx)
	if err != nil {
		return c, err
	}
	have := make(map[string]usage.Counter)
	if err := counters.Read(ctx, []string{s.names.AllTotals()}, func(n usage.Counter) { have[n.Subject] = n }); err != nil {
		return c, err
	}
	want := make(map[string]usage.Totals)
	_, err = usage.After(ctx, s.js, s.names.UsageStream(), s.names.AllUsage(), 0, func(r usage.Stored) error {
		if r.Seq > from {
			c.Pending++
		}
		for _, e := range r.Entries() {
			c.Records += e.Totals.Sessions
			c.Totals = c.Totals.Plus(e.Totals)
			for _, subject := range usage.Subjects(s.names, e.Record, s.labels) {
				if r.Seq <= max(from, have[subject].Upto) {
					want[subject] = want[subject].Plus(e.Totals)
				}
			}
		}
		return nil
	}, func(error) { c.Unreadable++ })
	if err != nil {
		return c, err
	}
	// The oldest records may have gone while they were read, or before they were: the
	// stream is full, or they are too old.
	info, err := stream.Info(ctx)
	if err != nil {
		return c, fmt.Errorf("stream %s: %w", s.names.UsageStream(), err)
	}
	left(info)
	all := maps.Clone(want)
	for subject := range have {
		all[subject] = want[subject]
	}
	for _, subject := range slices.Sorted(maps.Keys(all)) {
		if g, ok := usage.GroupOf(s.names, subject); !ok || !s.ours(g.Family) || g.Period < c.Before[:min(len(c.Before), len(g.Period))] || g.Period == c.Before[:min(len(c.Before), len("2006-01"))] {
			continue
		}
		c.Counters++
		if have[subject].Totals != want[subject] {
			n := have[subject]
			n.Subject, n.Upto = subject, max(n.Upto, from)
			c.Differences = append(c.Differences, Difference{subject, have[subject].Totals, want[subject], n})
		}
	}
	return c, nil
}

// completeSince is the time since which all records are there. Zero: all are that
// there ever were. Older ones aged out, were removed, or went with the stream, which
// was made again after the counters.
func completeSince(records *jetstream.StreamInfo, countersMade time.Time) time.Time {
	oldest := records.State.FirstTime
	if records.State.Msgs == 0 {
		oldest = records.TimeStamp
	}
	switch {
	case records.State.FirstSeq > 1:
		return oldest
	case countersMade.Before(records.Created) && !oldest.Before(records.Created): // a restored one has older records
		return records.Created
	default:
		return time.Time{}
	}
}

// ours reports whether a family of counters is of the labels that are configured.
func (s *Store) ours(family string) bool {
	return family == usage.ByDay || family == usage.ByLabels(s.labels) || family == usage.ByMonth(s.labels)
}

// Rebuild adds the records that are not in the counters yet, brings counters to what
// their records add up to, and returns what it corrected and what a last comparison
// found. Workers may go on adding meanwhile.
func (s *Store) Rebuild(ctx context.Context) (corrected []Difference, after Compared, err error) {
	corrected = []Difference{}
	counters, err := usage.OpenCounters(ctx, s.js, s.names, s.labels)
	if err != nil {
		return corrected, Compared{Differences: []Difference{}}, err
	}
	if err := counters.CatchUp(ctx, func(error) {}); err != nil {
		return corrected, Compared{Differences: []Difference{}}, err
	}
	before, err := s.compare(ctx, counters)
	if err != nil || len(before.Differences) == 0 {
		return corrected, before, err
	}
	for _, d := range before.Differences {
		if err := counters.Correct(ctx, d.counter, d.Want.Minus(d.Have)); err != nil {
			return corrected, before, err
		}
		corrected = append(corrected, d)
	}
	after, err = s.compare(ctx, counters)
	return corrected, after, err
}
