package invariant

import (
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/simulator"
)

var start = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }

func revision(second int, state lifecycle.State, session int, worker string) Revision {
	r := lifecycle.Record{JobID: "a", Run: 1, State: state, Session: session, WorkerID: worker, Attempt: 1, MaxAttempts: 5}
	if state.Final() {
		r.Outcome = state
	}
	return Revision{Record: r, Time: at(second)}
}

// good is a run in which one job's worker was killed at second 2, and another
// worker finished the job.
func good() (Run, Seen) {
	again := revision(10, lifecycle.StateRunning, 2, "w2")
	again.Record.Crashes = 1
	done := revision(11, lifecycle.StateCompleted, 2, "w2")
	done.Record.Crashes = 1
	run := Run{
		Accepted: []string{"a"}, MaxAttempts: 5, Lease: 6 * time.Second,
		Faults: []Fault{{Kind: "kill", WorkerID: "w1", Start: at(2), End: at(2)}},
	}
	return run, Seen{
		History:  map[string][]Revision{"a": {revision(0, lifecycle.StateRunning, 1, "w1"), again, done}},
		Events:   []Event{{ID: "a.run1.s2.completed", Type: "completed", JobID: "a", Run: 1}},
		Sessions: []simulator.Session{{ConnectionID: "c", Closed: at(11)}},
	}
}

func TestARunThatKeptEveryPromisePasses(t *testing.T) {
	run, seen := good()
	seen.Events = append(seen.Events, seen.Events[0])
	r := Check(run, seen)
	if len(r.Violations) > 0 {
		t.Fatal(r.Violations)
	}
	if r.Jobs != 1 || r.Outcomes[lifecycle.StateCompleted] != 1 || r.Sessions != 2 || r.Again != 1 || r.Held != 1 || r.Crashes != 1 || r.Repeated != 1 {
		t.Fatal(r)
	}
}

func TestEveryBrokenPromiseIsFound(t *testing.T) {
	for name, c := range map[string]struct {
		broken func(*Run, *Seen)
		want   string
	}{
		"an accepted job without a record": {func(r *Run, _ *Seen) { r.Accepted = append(r.Accepted, "b") }, "job b: accepted, but it has no record: lost"},
		"a job without an outcome":         {func(_ *Run, s *Seen) { s.History["a"] = s.History["a"][:2] }, "no outcome; its record says running"},
		"an outcome overwritten": {func(_ *Run, s *Seen) {
			s.History["a"] = append(s.History["a"], revision(12, lifecycle.StateDeadLettered, 1, "w1"))
		}, "written after its outcome completed: dead_lettered by w1"},
		"an outcome nobody was told": {func(_ *Run, s *Seen) { s.Events = nil }, "outcome completed, but the events tell []"},
		"an outcome told two ways": {func(_ *Run, s *Seen) {
			s.Events = append(s.Events, Event{ID: "x", Type: "expired", JobID: "a", Run: 1})
		}, "but the events tell [a.run1.s2.completed x]"},
		"a completed event told twice": {func(_ *Run, s *Seen) {
			s.Events = append(s.Events, Event{ID: "y", Type: "completed", JobID: "a", Run: 1})
		}, "but the events tell"},
		"the wrong outcome told": {func(_ *Run, s *Seen) { s.Events[0].Type = "expired" }, "outcome completed, but the events tell"},
		"a dead letter of a job that completed": {func(_ *Run, s *Seen) {
			s.Letters = []Letter{{ID: "a.run1.dead", JobID: "a", Run: 1}}
		}, "outcome completed with 1 dead letters"},
		"a dead-lettered job without its letter": {func(_ *Run, s *Seen) {
			s.History["a"][2] = revision(11, lifecycle.StateDeadLettered, 2, "w2")
			s.Events[0].Type = "dead_lettered"
		}, "outcome dead_lettered with 0 dead letters"},
		"a job left in the queue":       {func(_ *Run, s *Seen) { s.Waiting = 3 }, "3 messages are left"},
		"a session left open":           {func(_ *Run, s *Seen) { s.Sessions[0].Closed = time.Time{} }, "session c of avatar  is still open"},
		"an attempt too many":           {func(_ *Run, s *Seen) { s.History["a"][2].Record.Attempt = 6 }, "6 attempts, the limit is 5"},
		"a crash too many":              {func(_ *Run, s *Seen) { s.History["a"][2].Record.Crashes = 6 }, "6 crashes, the limit is 5"},
		"a session run again untouched": {func(r *Run, _ *Seen) { r.Faults = nil }, "session 1 (worker w1, from 12:00:00.000) was run again at 12:00:10.000 although no fault took it"},
		"a fault of another worker":     {func(r *Run, _ *Seen) { r.Faults[0].WorkerID = "w3" }, "no fault took it"},
		"a fault at another time":       {func(r *Run, _ *Seen) { r.Faults[0].Start, r.Faults[0].End = at(20), at(21) }, "no fault took it"},
		"a cut much shorter than the lease": {func(r *Run, _ *Seen) {
			r.Faults[0] = Fault{Kind: "cut", Start: at(2), End: at(3), Lasting: true}
		}, "no fault took it"},
		"a job nobody accepted, lost": {func(_ *Run, s *Seen) {
			s.History["b"] = []Revision{revision(0, lifecycle.StateRetrying, 1, "w1")}
		}, "job b run 1: no outcome"},
	} {
		t.Run(name, func(t *testing.T) {
			run, seen := good()
			c.broken(&run, &seen)
			got := Check(run, seen).Violations
			if !strings.Contains(strings.Join(got, "\n"), c.want) {
				t.Errorf("want %q in %q", c.want, got)
			}
		})
	}
}

func TestACutThatOutlastsTheLeaseExplainsASessionRunAgain(t *testing.T) {
	run, seen := good()
	run.Faults = []Fault{{Kind: "cut", Start: at(1), End: at(7), Lasting: true}}
	if r := Check(run, seen); len(r.Violations) > 0 || r.Held != 1 {
		t.Fatal(r, r.Violations)
	}
}

func TestHandedBackAndRetriedSessionsAreNotRunAgain(t *testing.T) {
	run, seen := good()
	run.Faults = nil
	retrying := revision(1, lifecycle.StateRetrying, 1, "w1")
	seen.History["a"] = []Revision{
		revision(0, lifecycle.StateRunning, 1, "w1"), retrying, revision(2, lifecycle.StateRunning, 2, "w1"),
		revision(3, lifecycle.StateReleased, 2, "w1"), revision(4, lifecycle.StateRunning, 3, "w2"), revision(5, lifecycle.StateCompleted, 3, "w2"),
	}
	r := Check(run, seen)
	if len(r.Violations) > 0 || r.Again != 0 || r.Released != 1 || r.Sessions != 3 {
		t.Fatal(r, r.Violations)
	}
}
