package invariant

import (
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs/event"
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

func released(second, session int, worker, reason string) Revision {
	r := revision(second, lifecycle.StateReleased, session, worker)
	r.Record.Reason = reason
	return r
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
		Sessions: []simulator.Session{connected("c1", "a", 0, 2), connected("c2", "a", 10, 11)},
	}
}

// connected is a session at the backend, from and to these seconds.
func connected(id, job string, from, to int) simulator.Session {
	return simulator.Session{
		ConnectionID: id, ExtraParams: map[string]string{JobParam: job},
		Opened: at(from), Confirmed: at(from), Closed: at(to),
	}
}

func TestARunThatKeptEveryPromisePasses(t *testing.T) {
	run, seen := good()
	seen.Events = append(seen.Events, seen.Events[0])
	r := Check(run, seen)
	if len(r.Violations) > 0 {
		t.Fatal(r.Violations)
	}
	if r.Jobs != 1 || r.Outcomes[lifecycle.StateCompleted] != 1 || r.Sessions != 2 || r.Again != 1 || r.Lost != 1 || r.Held != 1 || r.Crashes != 1 || r.Repeated != 1 ||
		r.Connected != 3*time.Second || r.Wasted != 2*time.Second {
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
		"an outcome without an event": {func(_ *Run, s *Seen) { s.Events = nil }, "outcome completed, but the events say []"},
		"an outcome with two events": {func(_ *Run, s *Seen) {
			s.Events = append(s.Events, Event{ID: "x", Type: "expired", JobID: "a", Run: 1})
		}, "but the events say [a.run1.s2.completed x]"},
		"a completed event published twice": {func(_ *Run, s *Seen) {
			s.Events = append(s.Events, Event{ID: "y", Type: "completed", JobID: "a", Run: 1})
		}, "but the events say"},
		"an event of the wrong outcome": {func(_ *Run, s *Seen) { s.Events[0].Type = "expired" }, "outcome completed, but the events say"},
		"a dead letter of a job that completed": {func(_ *Run, s *Seen) {
			s.Letters = []Letter{{ID: "a.run1.dead", JobID: "a", Run: 1}}
		}, "outcome completed with 1 dead letters"},
		"a dead-lettered job without its letter": {func(_ *Run, s *Seen) {
			s.History["a"][2] = revision(11, lifecycle.StateDeadLettered, 2, "w2")
			s.Events[0].Type = "dead_lettered"
		}, "outcome dead_lettered with 0 dead letters"},
		"a job left in the queue":       {func(_ *Run, s *Seen) { s.Waiting = 3 }, "3 messages are left"},
		"a session left open":           {func(_ *Run, s *Seen) { s.Sessions[0].Closed = time.Time{} }, "session c1 of avatar  is still open"},
		"an attempt too many":           {func(_ *Run, s *Seen) { s.History["a"][2].Record.Attempt = 6 }, "6 attempts, the limit is 5"},
		"a crash too many":              {func(_ *Run, s *Seen) { s.History["a"][2].Record.Crashes = 6 }, "6 crashes, the limit is 5"},
		"a session run again untouched": {func(r *Run, _ *Seen) { r.Faults = nil }, "session 1 (worker w1, from 12:00:00.000) was lost at 12:00:10.000 although no fault took it"},
		"a fault of another worker":     {func(r *Run, _ *Seen) { r.Faults[0].WorkerID = "w3" }, "no fault took it"},
		"a fault of other jobs":         {func(r *Run, _ *Seen) { r.Faults[0].Jobs = "b" }, "no fault took it"},
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
	run.Faults = []Fault{{Kind: "drain", WorkerID: "w1", Start: at(3), End: at(3)}}
	seen.Sessions = nil
	seen.Events = append(seen.Events, Event{ID: "e", Type: event.TypeError, JobID: "a", Run: 1, Session: 1})
	retrying := revision(1, lifecycle.StateRetrying, 1, "w1")
	seen.History["a"] = []Revision{
		revision(0, lifecycle.StateRunning, 1, "w1"), retrying, revision(2, lifecycle.StateRunning, 2, "w1"),
		released(3, 2, "w1", "drain"), revision(4, lifecycle.StateRunning, 3, "w2"), revision(5, lifecycle.StateCompleted, 3, "w2"),
	}
	r := Check(run, seen)
	if len(r.Violations) > 0 || r.Again != 0 || r.Released != 1 || r.Sessions != 3 {
		t.Fatal(r, r.Violations)
	}
}

// looping is a job whose sessions end without a result again and again, each
// connected for four seconds, before one completes it.
func looping(times int, reason string) (Run, Seen) {
	run := Run{Accepted: []string{"a"}, MaxAttempts: 5, Lease: 6 * time.Second}
	seen := Seen{History: map[string][]Revision{}, Events: []Event{{ID: "done", Type: "completed", JobID: "a", Run: 1}}}
	worker := func(n int) string { return []string{"w1-x", "w1-x-2", "w1-x-3"}[min(n, 2)] } // with each lease it loses
	for n := range times {
		seen.History["a"] = append(seen.History["a"], revision(5*n, lifecycle.StateRunning, n+1, worker(n)), released(5*n+4, n+1, worker(n), reason))
		seen.Sessions = append(seen.Sessions, connected("c", "a", 5*n, 5*n+4))
	}
	seen.History["a"] = append(seen.History["a"], revision(5*times, lifecycle.StateRunning, times+1, "w2"), revision(5*times+1, lifecycle.StateCompleted, times+1, "w2"))
	return run, seen
}

func TestALoopThatSpendsMoneyIsFound(t *testing.T) {
	for name, c := range map[string]struct {
		reason string
		faults []Fault
		want   int
	}{
		"without any fault":                   {"lease_lost", nil, 4},
		"a worker's own panics":               {"fault", nil, 4},
		"records that can't be written":       {"unrecorded", nil, 4},
		"after a fault that took one of them": {"lease_lost", []Fault{{WorkerID: "w1-x", Start: at(1), End: at(2)}}, 3},
		"under a fault that lasts all the time": {
			"lease_lost", []Fault{{Kind: "bucket full", Start: at(0), End: at(60), Lasting: true}}, 3,
		},
		"a worker that drains for no reason": {"drain", nil, 4},
		"one fault for each": {"lease_lost", []Fault{
			{WorkerID: "w1-x", Start: at(1), End: at(2)}, {WorkerID: "w1-x", Start: at(7), End: at(8)},
			{WorkerID: "w1-x", Start: at(12), End: at(13)}, {WorkerID: "w1-x", Start: at(17), End: at(18)},
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			run, seen := looping(4, c.reason)
			run.Faults = c.faults
			r := Check(run, seen)
			if len(r.Violations) != c.want {
				t.Errorf("%d violations, want %d: %q", len(r.Violations), c.want, r.Violations)
			}
		})
	}
}

func TestACrashIsFoundHoweverItIsWritten(t *testing.T) {
	for name, state := range map[string]lifecycle.State{
		"put off as a suspect": lifecycle.StateReleased, "held for its sessions": lifecycle.StateHeld, "given up": lifecycle.StateDeadLettered,
	} {
		t.Run(name, func(t *testing.T) {
			run, seen := good()
			run.Faults = nil
			written := revision(9, state, 1, "w1")
			written.Record.Crashes = 1
			seen.History["a"] = []Revision{seen.History["a"][0], written}
			if !state.Final() {
				_, good := good()
				seen.History["a"] = append(seen.History["a"], good.History["a"][1:]...)
			}
			if got := strings.Join(Check(run, seen).Violations, "\n"); !strings.Contains(got, "session 1 (worker w1, from 12:00:00.000) was lost at 12:00:09.000 although no fault took it") {
				t.Errorf("%q", got)
			}
		})
	}
}

func TestConnectedSecondsThatNothingExplainsAreFound(t *testing.T) {
	for name, c := range map[string]struct {
		broken func(*Run, *Seen)
		want   string
	}{
		"a session of no job": {func(_ *Run, s *Seen) { s.Sessions = append(s.Sessions, connected("x", "", 3, 4)) },
			`backend session x: connected for 1s at 12:00:03.000, while no worker had job ""`},
		"a session before any worker had the job": {func(_ *Run, s *Seen) { s.Sessions = append(s.Sessions, connected("x", "a", -5, -4)) },
			`backend session x: connected for 1s at 11:59:55.000, while no worker had job "a"`},
		"a session after the outcome": {func(_ *Run, s *Seen) { s.Sessions = append(s.Sessions, connected("x", "a", 30, 40)) },
			"backend session x: connected for 10s until 12:00:40.000, but session 2 of job a was over at 12:00:11.000"},
		"a session that outlives its take-over": {func(_ *Run, s *Seen) { s.Sessions[1].Closed = at(20) },
			"backend session c2: connected for 10s until 12:00:20.000, but session 2 of job a was over at 12:00:11.000"},
		"two sessions in one take-over": {func(_ *Run, s *Seen) { s.Sessions = append(s.Sessions, connected("x", "a", 10, 11)) },
			"backend session x: connected for 1s at 12:00:10.000, a second one in session 2 of job a"},
		"a retry without a failed attempt": {func(_ *Run, s *Seen) {
			s.History["a"] = append([]Revision{s.History["a"][0], revision(1, lifecycle.StateRetrying, 1, "w1")}, s.History["a"][1:]...)
		}, "session 1 ended retrying, but there is no error event of a failed attempt"},
		"a hold for storage in a paid session": {func(r *Run, s *Seen) {
			held := revision(1, lifecycle.StateHeld, 1, "w1")
			held.Record.HeldReason = lifecycle.HeldStorage
			s.History["a"] = append([]Revision{s.History["a"][0], held}, s.History["a"][1:]...)
			r.Faults = nil
		}, "session 1 (worker w1, from 12:00:00.000) was lost at 12:00:01.000 although no fault took it"},
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

func TestAWorkerFrozenWhileItOpensItsSessionMayStillOpenIt(t *testing.T) {
	run, seen := good()
	run.Faults = []Fault{{Kind: "frozen", WorkerID: "w1", Start: at(0), End: at(11), Lasting: true}}
	seen.Sessions[0] = connected("c1", "a", 10, 10)
	if r := Check(run, seen); len(r.Violations) > 0 {
		t.Error(r.Violations)
	}
	run.Faults[0].WorkerID = "w3"
	if r := Check(run, seen); !strings.Contains(strings.Join(r.Violations, "\n"), "a second one in session 2 of job a") {
		t.Errorf("%q", r.Violations)
	}
}

func TestAWorkerThatWakesAfterSeveralSessionsOfTheJobMayStillOpenItsOwn(t *testing.T) {
	run, seen := good()
	run.Faults = []Fault{{Kind: "frozen", WorkerID: "w1", Start: at(0), End: at(15), Lasting: true}}
	history := []Revision{
		revision(0, lifecycle.StateRunning, 1, "w1"), revision(10, lifecycle.StateRunning, 2, "w2"), revision(12, lifecycle.StateRetrying, 2, "w2"),
		revision(13, lifecycle.StateRunning, 3, "w2"), revision(15, lifecycle.StateCompleted, 3, "w2"),
	}
	for i := range history[1:] {
		history[i+1].Record.Crashes = 1
	}
	seen.History["a"] = history
	seen.Events = append(seen.Events, Event{ID: "a.run1.s2.error", Type: event.TypeError, JobID: "a", Run: 1, Session: 2})
	seen.Sessions = []simulator.Session{connected("c2", "a", 10, 12), connected("c3", "a", 13, 15), connected("c1", "a", 14, 14)}
	if r := Check(run, seen); len(r.Violations) > 0 {
		t.Error(r.Violations)
	}
	run.Faults[0].WorkerID = "w3"
	if r := Check(run, seen); !strings.Contains(strings.Join(r.Violations, "\n"), "a second one in session 3 of job a") {
		t.Errorf("%q", r.Violations)
	}
}

func TestAFrozenWorkersSessionMayOutliveItsTakeOver(t *testing.T) {
	run, seen := good()
	run.Faults = []Fault{{Kind: "frozen", WorkerID: "w1", Start: at(1), End: at(18), Lasting: true}}
	seen.Sessions[0].Closed = at(19)
	if r := Check(run, seen); len(r.Violations) > 0 {
		t.Fatal(r.Violations)
	}
}
