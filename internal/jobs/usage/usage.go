// Package usage is the ledger of connected time: one record for each session that
// the backend confirmed, in the stream AVATAR_USAGE, and counters of each day's
// sessions next to it, in AVATAR_TOTALS. docs/cost.md says how it counts.
//
// It owns both streams' formats, and must not know how jobs are run.
package usage

import (
	"hash/fnv"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/topology"
)

// Outcome codes of sessions that did not fail. That of one that did is its error
// code, or CodeStorage.
const (
	CodeCompleted = "completed"
	CodeCancelled = "cancelled" // the publisher wanted the job to end
	CodeReleased  = "released"  // the worker handed the job back: a drain, a lost lease
	CodeStorage   = "storage"   // a store of our own kept the session from going on
)

// Session is what one session of a job used, as the job's record keeps it until it
// is known to be in the ledger.
type Session struct {
	Session     int           `json:"session"`
	Connected   time.Duration `json:"connected_ns"`
	OutcomeCode string        `json:"outcome_code"`

	// What follows is left out of the record's last session, of which the record says
	// the same.
	Attempt      int       `json:"attempt,omitempty"`
	AppID        string    `json:"app_id,omitempty"`
	Region       string    `json:"region,omitempty"`
	WorkerID     string    `json:"worker_id,omitempty"`
	ConnectionID string    `json:"connection_id,omitempty"` // "": not known
	ConfirmedAt  time.Time `json:"confirmed_at,omitzero"`

	// Estimated: the session was lost with its worker; Connected is the most that
	// it can have been.
	Estimated bool `json:"estimated,omitempty"`
	// Stored: it is in the ledger.
	Stored bool `json:"stored,omitempty"`
}

// Record is the body of a usage record.
type Record struct {
	JobID        string            `json:"job_id"`
	Run          int               `json:"run"`
	Session      int               `json:"session"`
	Attempt      int               `json:"attempt"`
	AppID        string            `json:"app_id"`
	Queue        string            `json:"queue"`
	AvatarID     string            `json:"avatar_id"`
	Labels       map[string]string `json:"labels"`
	Region       string            `json:"region"`
	WorkerID     string            `json:"worker_id"`
	ConnectionID string            `json:"connection_id"` // "": the worker died before it was written down
	ConfirmedAt  time.Time         `json:"confirmed_at"`  // UTC
	ConnectedMS  int64             `json:"connected_ms"`
	Credits      int64             `json:"credits"`
	OutcomeCode  string            `json:"outcome_code"`
	Estimated    bool              `json:"estimated"` // an upper bound
}

// ended is when the session was closed, before which its record can't have been
// stored.
func (r Record) ended() time.Time {
	return r.ConfirmedAt.Add(time.Duration(r.ConnectedMS) * time.Millisecond)
}

// ID names the session: "J.run1.s2". It is the record's Nats-Msg-Id, with
// ".exact" for one that replaces an estimate.
func (r Record) ID() string {
	return r.JobID + ".run" + strconv.Itoa(r.Run) + ".s" + strconv.Itoa(r.Session)
}

// Day is the UTC day that the session counts for, YYYY-MM-DD: that of its confirm.
func (r Record) Day() string { return Day(r.ConfirmedAt) }

// Day is the UTC day of a time, YYYY-MM-DD.
func Day(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// Failed reports whether the session's money was lost to a failure, or to the death
// of its worker.
func (r Record) Failed() bool {
	switch r.OutcomeCode {
	case CodeCompleted, CodeCancelled, CodeReleased:
		return false
	default:
		return true
	}
}

// Totals are what the session adds to sums.
func (r Record) Totals() Totals {
	t := Totals{Sessions: 1, ConnectedMS: r.ConnectedMS, Credits: r.Credits}
	if r.Estimated {
		t.EstimatedCredits = r.Credits
	}
	if r.Failed() {
		t.FailedCredits = r.Credits
	}
	return t
}

// Tariff turns connected time into credits.
type Tariff struct {
	Credit  time.Duration // connected time that one credit pays for; 0: 6 s
	Minimum int64         // credits of the shortest session
}

// Credits is what a session of that connected time costs: each credit that was
// begun.
func (t Tariff) Credits(connected time.Duration) int64 { return t.Sum(connected, 1) }

// Sum is the least that a number of sessions with that connected time in all cost.
func (t Tariff) Sum(connected time.Duration, sessions int) int64 {
	credit := t.Credit
	if credit <= 0 {
		credit = 6 * time.Second
	}
	connected = max(connected, 0)
	return max(int64((connected+credit-1)/credit), t.Minimum*int64(sessions))
}

// maxLabel bounds a label's value in the subject of a counter.
const maxLabel = 64

// LabelValue is a label's value as counters have it: at most its first 64 bytes.
func LabelValue(value string) string { return value[:min(len(value), maxLabel)] }

// ByDay is the family of counters that add up a UTC day's sessions by app and queue.
const ByDay = "day"

// ByLabels is the family of counters that add up a day's sessions by labels too, and
// ByMonth that of those of a month. Each set of labels has families of its own: where
// the set is changed, its counters are made from the records.
func ByLabels(labels []string) string { return "labels-" + setOf(labels) }

// ByMonth is explained at ByLabels.
func ByMonth(labels []string) string { return "month-" + setOf(labels) }

// setOf names a set of labels.
func setOf(labels []string) string {
	if len(labels) == 0 {
		return "none"
	}
	h := fnv.New64a()
	for _, name := range labels {
		_, _ = h.Write(append([]byte(name), 0)) // never fails
	}
	return strconv.FormatUint(h.Sum64(), 36)
}

// Subjects are those of the counters that a record is added to: that of its
// day, and if there are labels to add up by, those of its labels for the day and the
// month. labels are names, in order; one that the record has not is left out.
func Subjects(names topology.Names, r Record, labels []string) []string {
	day := r.Day()
	all := []string{names.Totals(ByDay, day, r.AppID, r.Queue)}
	if len(labels) > 0 {
		pairs := pairs(r.Labels, labels)
		all = append(all, names.Totals(ByLabels(labels), day, r.AppID, r.Queue, pairs...),
			names.Totals(ByMonth(labels), day[:len("2006-01")], r.AppID, r.Queue, pairs...))
	}
	return all
}

func pairs(values map[string]string, labels []string) []string {
	var pairs []string
	for _, name := range labels {
		if value, ok := values[name]; ok {
			pairs = append(pairs, name+"="+LabelValue(value))
		}
	}
	return pairs
}

// Group is what one counter is about.
type Group struct {
	Family string // ByDay, or one of ByLabels or ByMonth
	Period string // YYYY-MM-DD, or YYYY-MM of ByMonth
	App    string
	Queue  string
	Labels map[string]string
}

// GroupOf reads a counter's subject; false if it is none.
func GroupOf(names topology.Names, subject string) (Group, bool) {
	family, period, app, queue, pairs, ok := names.TotalsOf(subject)
	g := Group{Family: family, Period: period, App: app, Queue: queue}
	for _, pair := range pairs {
		name, value, found := strings.Cut(pair, "=")
		if !found {
			return Group{}, false
		}
		if g.Labels == nil {
			g.Labels = make(map[string]string, len(pairs))
		}
		g.Labels[name] = value
	}
	return g, ok
}
