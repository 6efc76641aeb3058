// Package invariant checks, after a run in which things were broken on purpose,
// that what the worker promises still held: every job one outcome, nothing left
// behind, no session run again without a fault that explains it.
package invariant

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lease"
	"avatarworker/internal/jobs/lifecycle"
)

// Run is what the test knows of the run.
type Run struct {
	Accepted    []string // ids of the jobs that the jobs stream acknowledged
	MaxAttempts int      // the limit for attempts, and for crashes
	Lease       time.Duration
	Faults      []Fault
	Delays      []Span // in which a worker or the backend may have learned late of what the other did
}

// Span is a time.
type Span struct{ Start, End time.Time }

// Fault is something that may take sessions away from a worker: it was killed
// or frozen, drained, or cut off from the queue. One fault explains one
// session of each job: whatever goes on beyond that is a loop.
type Fault struct {
	Kind string
	// WorkerID is the worker whose sessions it takes, whichever lease it holds;
	// empty: every worker's.
	WorkerID   string
	Jobs       string // how the ids of the jobs begin that it concerns; empty: all
	Start, End time.Time
	// Lasting faults take a session away only if they last about as long as
	// the lease; a kill does at once.
	Lasting bool
}

// slack allows for a write that was on its way when the fault came.
const slack = 2 * time.Second

// takes reports whether the fault may have ended a session that its worker held
// from start to end.
func (f Fault) takes(job, worker string, start, end time.Time, window time.Duration) bool {
	if !strings.HasPrefix(job, f.Jobs) {
		return false
	}
	if f.WorkerID != "" && f.WorkerID != worker && !strings.HasPrefix(worker, f.WorkerID+"-") {
		return false
	}
	// The worker gives its lease up a margin early, and may have renewed it a
	// quarter of it ago.
	if f.Lasting && f.End.Sub(f.Start) < window-window/4-lease.Margin(window) {
		return false
	}
	if f.Lasting { // nothing can begin behind a cut
		return !f.Start.After(end) && f.End.After(start)
	}
	return !f.Start.After(end) && f.End.After(start.Add(-slack))
}

// Report is what the check found.
type Report struct {
	Jobs     int
	Outcomes map[lifecycle.State]int
	Sessions int // take-overs in all
	// Lost counts sessions that neither failed nor were handed back: their worker
	// died, froze or lost its lease. Again counts those that another followed.
	Lost       int
	Again      int
	Held       int // sessions that some fault may have ended
	Released   int // sessions handed back by a drain
	Crashes    int // counted against jobs
	Failures   int // attempts that failed
	Repeated   int // events stored a second time under the same id
	Exact      int // sessions of the backend's session log in the ledger
	Estimated  int // those with an upper bound
	Unseen     int // those that ended as soon as they were confirmed, and are not in it
	Violations []string

	// Connected is the time that all sessions were connected at the backend, and
	// Wasted the part of it that only a fault explains: those lost.
	Connected, Wasted time.Duration
}

// String is the report on one line, without the violations.
func (r Report) String() string {
	return fmt.Sprintf("jobs %d, completed %d, dead-lettered %d, expired %d, cancelled %d; sessions %d, failed attempts %d, "+
		"handed back %d, held at a fault %d, lost %d, run again %d, crashes counted %d, events repeated %d; connected %s, of it lost to faults %s; %s; violations %d",
		r.Jobs, r.Outcomes[lifecycle.StateCompleted], r.Outcomes[lifecycle.StateDeadLettered], r.Outcomes[lifecycle.StateExpired],
		r.Outcomes[lifecycle.StateCancelled], r.Sessions, r.Failures, r.Released, r.Held, r.Lost, r.Again, r.Crashes, r.Repeated,
		r.Connected.Round(time.Millisecond), r.Wasted.Round(time.Millisecond), r.ledgerText(), len(r.Violations))
}

// Check compares what was seen after the run with what was promised.
func Check(run Run, seen Seen) Report {
	c := &check{run: run, seen: seen, report: Report{Outcomes: map[lifecycle.State]int{}}}
	c.events()
	ids := slices.Clone(run.Accepted)
	for id := range seen.History {
		ids = append(ids, id) // a publish whose answer was lost may have been accepted
	}
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		c.job(id)
	}
	c.connected()
	c.leftOver()
	c.ledger()
	return c.report
}

type check struct {
	run    Run
	seen   Seen
	report Report

	ends    map[key][]Event        // distinct events of outcomes
	letters map[key][]Letter       // distinct dead letters
	failed  map[session]bool       // sessions with an error event
	held    map[string][]*takeOver // by job, oldest first
}

type key struct {
	job string
	run int
}

type session struct {
	key
	number int
}

func (c *check) violate(format string, args ...any) {
	c.report.Violations = append(c.report.Violations, fmt.Sprintf(format, args...))
}

// events sorts the events by job, once each.
func (c *check) events() {
	c.ends, c.letters = map[key][]Event{}, map[key][]Letter{}
	c.failed, c.held = map[session]bool{}, map[string][]*takeOver{}
	known := map[string]bool{}
	for _, ev := range c.seen.Events {
		if known[ev.ID] {
			c.report.Repeated++
			continue
		}
		known[ev.ID] = true
		k := key{ev.JobID, ev.Run}
		switch {
		case ev.Type == event.TypeError:
			c.report.Failures++
			c.failed[session{k, ev.Session}] = true
		case lifecycle.State(ev.Type).Final():
			c.ends[k] = append(c.ends[k], ev)
		}
	}
	for _, l := range c.seen.Letters {
		k := key{l.JobID, l.Run}
		if !slices.ContainsFunc(c.letters[k], func(o Letter) bool { return o.ID == l.ID }) {
			c.letters[k] = append(c.letters[k], l)
		}
	}
}

func (c *check) job(id string) {
	c.report.Jobs++
	history := c.seen.History[id]
	if len(history) == 0 {
		c.violate("job %s: accepted, but it has no record: lost", id)
		return
	}
	for len(history) > 0 {
		n := 0
		for n < len(history) && history[n].Record.Run == history[0].Record.Run {
			n++
		}
		c.jobRun(key{id, history[0].Record.Run}, history[:n])
		history = history[n:]
	}
}

// jobRun checks one run of a job by all revisions of its record.
func (c *check) jobRun(k key, history []Revision) {
	first := slices.IndexFunc(history, func(r Revision) bool { return r.Record.State.Final() })
	last := history[len(history)-1].Record
	if first < 0 {
		c.violate("job %s run %d: no outcome; its record says %s (worker %s, session %d)", k.job, k.run, last.State, last.WorkerID, last.Session)
		return
	}
	for _, r := range history[first+1:] {
		c.violate("job %s run %d: the record was written after its outcome %s: %s by %s", k.job, k.run,
			history[first].Record.Outcome, r.Record.State, r.Record.WorkerID)
	}
	outcome := history[first].Record
	c.report.Outcomes[outcome.Outcome]++
	c.effectsOnce(k, outcome)
	if spent := outcome.Spent(); spent > min(outcome.MaxAttempts, c.run.MaxAttempts) {
		c.violate("job %s run %d: %d attempts, the limit is %d", k.job, k.run, spent, min(outcome.MaxAttempts, c.run.MaxAttempts))
	}
	if outcome.Crashes-outcome.CrashesPast > c.run.MaxAttempts {
		c.violate("job %s run %d: %d crashes, the limit is %d", k.job, k.run, outcome.Crashes, c.run.MaxAttempts)
	}
	c.sessions(k, history)
}

// effectsOnce checks what follows from an outcome: its event, and its dead letter.
func (c *check) effectsOnce(k key, outcome lifecycle.Record) {
	ends := c.ends[k]
	if len(ends) != 1 || ends[0].Type != string(outcome.Outcome) {
		c.violate("job %s run %d: outcome %s, but the events say %s", k.job, k.run, outcome.Outcome, eventIDs(ends))
	}
	want := 0
	if outcome.Outcome == lifecycle.StateDeadLettered {
		want = 1
	}
	if got := len(c.letters[k]); got != want {
		c.violate("job %s run %d: outcome %s with %d dead letters", k.job, k.run, outcome.Outcome, got)
	}
}

func eventIDs(events []Event) []string {
	ids := []string{}
	for _, ev := range events {
		ids = append(ids, ev.ID)
	}
	return ids
}

func clock(t time.Time) string { return t.Format("15:04:05.000") }

// leftOver checks that nothing waits and nothing is open.
func (c *check) leftOver() {
	if c.seen.Waiting > 0 {
		c.violate("%d messages are left in the jobs stream", c.seen.Waiting)
	}
	for _, s := range c.seen.Sessions {
		if s.Closed.IsZero() {
			c.violate("session %s of avatar %s is still open at the backend", s.ConnectionID, s.AvatarID)
		}
	}
}
