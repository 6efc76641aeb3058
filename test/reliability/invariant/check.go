// Package invariant checks, after a run in which things were broken on purpose,
// that what the worker promises still held: every job one outcome, nothing left
// behind, no session run again without a fault that explains it.
package invariant

import (
	"fmt"
	"slices"
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// Run is what the test knows of the run.
type Run struct {
	Accepted    []string // ids of the jobs that the jobs stream acknowledged
	MaxAttempts int      // the limit for attempts, and for crashes
	Lease       time.Duration
	Faults      []Fault
}

// Fault is something that may take sessions away from a worker: it was killed
// or frozen, or cut off from the queue.
type Fault struct {
	Kind       string
	WorkerID   string // whose sessions; empty: every worker's
	Start, End time.Time
	// Lasting faults take a session away only if they last about as long as
	// the lease; a kill does at once.
	Lasting bool
}

// slack allows for a write that was on its way when the fault came.
const slack = 2 * time.Second

// takes tells whether the fault may have ended a session that its worker held
// from start to end.
func (f Fault) takes(worker string, start, end time.Time, lease time.Duration) bool {
	if f.WorkerID != "" && f.WorkerID != worker {
		return false
	}
	// The worker gives a lease up a third of it early, and may have extended
	// it a third ago.
	if f.Lasting && f.End.Sub(f.Start) < lease/3 {
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
	// Again counts sessions that followed one that neither failed nor was
	// handed back: its worker died, froze or lost its lease.
	Again      int
	Held       int // sessions that some fault may have ended
	Released   int // sessions handed back by a drain
	Crashes    int // counted against jobs
	Failures   int // attempts that failed
	Repeated   int // events stored a second time under the same id
	Exact      int // sessions of the backend's book in the ledger
	Estimated  int // those with an upper bound
	Unseen     int // those that ended as soon as they were confirmed, and are not in it
	Violations []string
}

// String is the report on one line, without the violations.
func (r Report) String() string {
	return fmt.Sprintf("jobs %d, completed %d, dead-lettered %d, expired %d, cancelled %d; sessions %d, failed attempts %d, "+
		"handed back %d, held at a fault %d, run again %d, crashes counted %d, events repeated %d, %s, violations %d",
		r.Jobs, r.Outcomes[lifecycle.StateCompleted], r.Outcomes[lifecycle.StateDeadLettered], r.Outcomes[lifecycle.StateExpired],
		r.Outcomes[lifecycle.StateCancelled], r.Sessions, r.Failures, r.Released, r.Held, r.Again, r.Crashes, r.Repeated, r.ledgerText(), len(r.Violations))
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
	c.leftOver()
	c.ledger()
	return c.report
}

type check struct {
	run    Run
	seen   Seen
	report Report

	told    map[key][]Event  // distinct events of outcomes
	letters map[key][]Letter // distinct dead letters
}

type key struct {
	job string
	run int
}

func (c *check) violate(format string, args ...any) {
	c.report.Violations = append(c.report.Violations, fmt.Sprintf(format, args...))
}

// events sorts what was told by job, once each.
func (c *check) events() {
	c.told, c.letters = map[key][]Event{}, map[key][]Letter{}
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
		case lifecycle.State(ev.Type).Final():
			c.told[k] = append(c.told[k], ev)
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
	c.toldOnce(k, outcome)
	if spent := outcome.Spent(); spent > min(outcome.MaxAttempts, c.run.MaxAttempts) {
		c.violate("job %s run %d: %d attempts, the limit is %d", k.job, k.run, spent, min(outcome.MaxAttempts, c.run.MaxAttempts))
	}
	if outcome.Crashes > c.run.MaxAttempts {
		c.violate("job %s run %d: %d crashes, the limit is %d", k.job, k.run, outcome.Crashes, c.run.MaxAttempts)
	}
	c.sessions(k, history)
}

// toldOnce checks what follows from an outcome: its event, and its dead letter.
func (c *check) toldOnce(k key, outcome lifecycle.Record) {
	told := c.told[k]
	if len(told) != 1 || told[0].Type != string(outcome.Outcome) {
		c.violate("job %s run %d: outcome %s, but the events tell %s", k.job, k.run, outcome.Outcome, eventIDs(told))
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

// sessions goes through the take-overs of a run and looks for what ended each.
func (c *check) sessions(k key, history []Revision) {
	var begun time.Time // of the session that runs
	for i, now := range history {
		running := now.Record.State == lifecycle.StateRunning
		if i == 0 {
			if running {
				c.report.Sessions++
				begun = now.Time
			}
			continue
		}
		before := history[i-1]
		wasRunning := before.Record.State == lifecycle.StateRunning
		tookOver := running && now.Record.Session > before.Record.Session
		if before.Record.Crashes < now.Record.Crashes {
			c.report.Crashes++
		}
		if now.Record.State == lifecycle.StateReleased {
			c.report.Released++
		}
		over := wasRunning && (tookOver || !running)
		if over && c.faulty(before.Record.WorkerID, begun, now.Time) {
			c.report.Held++
		}
		if wasRunning && tookOver {
			c.report.Again++
			if !c.faulty(before.Record.WorkerID, begun, now.Time) {
				c.violate("job %s run %d: session %d (worker %s, from %s) was run again at %s although no fault took it",
					k.job, k.run, before.Record.Session, before.Record.WorkerID, clock(begun), clock(now.Time))
			}
		}
		if tookOver {
			c.report.Sessions++
			begun = now.Time
		}
	}
}

func (c *check) faulty(worker string, start, end time.Time) bool {
	return slices.ContainsFunc(c.run.Faults, func(f Fault) bool { return f.takes(worker, start, end, c.run.Lease) })
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
