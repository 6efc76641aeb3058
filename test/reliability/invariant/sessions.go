package invariant

import (
	"slices"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/simulator"
)

// JobParam is the extra parameter with which each job of a run names itself, so
// that the backend's session log says whose session was paid for.
const JobParam = "job_id"

// takeOver is one session of a job, as its record has it.
type takeOver struct {
	session
	worker      string
	begun, over time.Time // over: zero while it runs
	lost        bool      // only a fault explains its end
	drained     bool      // and that was a drain: it was handed back
	seen        int       // connected sessions of it at the backend
}

// sessions goes through the take-overs of a run and looks for what ended each.
func (c *check) sessions(k key, history []Revision) {
	var runs *takeOver
	var list []*takeOver
	for i, now := range history {
		if i > 0 && history[i-1].Record.AllCrashes() < now.Record.AllCrashes() {
			c.report.Crashes++
		}
		running := now.Record.State == lifecycle.StateRunning
		if runs != nil && (!running || now.Record.Session != runs.number) {
			runs.over = now.Time
			c.ended(runs, history[i-1].Record, now.Record)
			runs = nil
		}
		if running && runs == nil {
			runs = &takeOver{session: session{k, now.Record.Session}, worker: now.Record.WorkerID, begun: now.Time}
			list = append(list, runs)
		}
	}
	c.report.Sessions += len(list)
	c.held[k.job] = append(c.held[k.job], list...)
	c.explain(list)
}

// ended looks how a session ended by the records before and after.
func (c *check) ended(t *takeOver, before, after lifecycle.Record) {
	switch {
	case after.AllCrashes() > before.AllCrashes(), after.State == lifecycle.StateRunning:
		t.lost = true
	case after.State == lifecycle.StateReleased && after.Reason == "drain":
		c.report.Released++
		t.lost, t.drained = true, true
	case after.State == lifecycle.StateReleased:
		t.lost = after.Reason != "worker_key" // that one never got a session
	case after.State == lifecycle.StateHeld && (after.HeldReason == lifecycle.HeldStorage || after.HeldReason == lifecycle.HeldUnsettled):
		t.lost = true
	case after.State == lifecycle.StateRetrying, after.State == lifecycle.StateHeld:
		if !c.failed[t.session] {
			c.violate("job %s run %d: session %d ended %s, but there is no error event of a failed attempt", t.job, t.run, t.number, after.State)
		}
	}
	if c.faulty(t.job, t.worker, t.begun, t.over) {
		c.report.Held++
	}
	if t.lost && !t.drained {
		c.report.Lost++
	}
}

// explain looks for a fault for each session that was lost. The same fault
// explains no second session of the job: a loop under a fault that lasts is
// still a loop.
func (c *check) explain(list []*takeOver) {
	used := make([]bool, len(c.run.Faults))
	for i, t := range list {
		if !t.lost {
			continue
		}
		best := -1
		for j, f := range c.run.Faults {
			if !used[j] && f.takes(t.job, t.worker, t.begun, t.over, c.run.Lease) && (best < 0 || f.End.Before(c.run.Faults[best].End)) {
				best = j
			}
		}
		if best >= 0 {
			used[best] = true
		} else {
			c.violate("job %s run %d: session %d (worker %s, from %s) was lost at %s although no fault took it",
				t.job, t.run, t.number, t.worker, clock(t.begun), clock(t.over))
		}
		if i+1 < len(list) && !t.drained {
			c.report.Again++
		}
	}
}

func (c *check) faulty(job, worker string, start, end time.Time) bool {
	return slices.ContainsFunc(c.run.Faults, func(f Fault) bool { return f.takes(job, worker, start, end, c.run.Lease) })
}

// closing is how long after the end of a take-over its session may still be
// closing at the backend, on a narrow line.
const closing = 5 * time.Second

// connected looks for what explains each connected second at the backend: every
// session belongs to one take-over, which ended with an outcome, a failed attempt
// or a fault, and is closed by then.
func (c *check) connected() {
	for _, s := range c.seen.Sessions {
		if s.Confirmed.IsZero() || s.Closed.IsZero() {
			continue // not paid for; or still open, which leftOver finds
		}
		c.report.Connected += s.Closed.Sub(s.Confirmed)
		c.paid(s)
	}
}

func (c *check) paid(s simulator.Session) {
	id, length := s.ExtraParams[JobParam], s.Closed.Sub(s.Confirmed).Round(time.Millisecond)
	var t *takeOver
	var before []*takeOver
	for _, one := range c.held[id] {
		if !one.begun.After(s.Opened) {
			if t != nil {
				before = append(before, t)
			}
			t = one
		}
	}
	if t == nil {
		c.violate("backend session %s: connected for %s at %s, while no worker had job %q", s.ConnectionID, length, clock(s.Opened), id)
		return
	}
	if t.seen > 0 {
		// A worker that was frozen while it opened its session woke, and went on
		// until it saw that its lease was lost; others may have had several since.
		frozen := func(o *takeOver) bool {
			return o.seen == 0 && o.lost && c.faulty(o.job, o.worker, s.Opened, s.Closed)
		}
		if i := slices.IndexFunc(before, frozen); i >= 0 {
			t = before[i]
		}
	}
	if t.lost && !t.drained {
		c.report.Wasted += s.Closed.Sub(s.Confirmed)
	}
	if t.seen++; t.seen > 1 {
		c.violate("backend session %s: connected for %s at %s, a second one in session %d of job %s", s.ConnectionID, length, clock(s.Opened), t.number, id)
	}
	if t.over.IsZero() || !s.Closed.After(t.over.Add(closing)) && !s.Opened.After(t.over) {
		return
	}
	if !c.faulty(t.job, t.worker, s.Opened, s.Closed) {
		c.violate("backend session %s: connected for %s until %s, but session %d of job %s was over at %s",
			s.ConnectionID, length, clock(s.Closed), t.number, id, clock(t.over))
	}
}
