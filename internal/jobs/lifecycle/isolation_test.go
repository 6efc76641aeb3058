package lifecycle

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/suspect"
)

// isolation is a fleet in which some jobs kill their worker every time. One step is
// a lease. The rules are those of the core: ContinueFrom counts crashes, a suspect runs
// with no other suspect and stays away for a while after each crash, and a job is
// given up after CrashLimit crashes.
type isolation struct {
	t       *rapid.T
	slots   int
	workers []isolated
	jobs    []*rehearsed
	queue   []*rehearsed // in the order in which they are delivered
}

// isolated is one worker.
type isolated struct {
	down int // steps until it is back
	hand []*rehearsed
}

// rehearsed is one job.
type rehearsed struct {
	name   string
	poison bool
	takes  int // steps that it runs, or until it kills its worker
	runs   int // steps that it has run in this session
	away   int // steps until it comes again
	record *Record
	lost   bool
	done   bool
}

func (f *isolation) step() {
	for i := range f.workers {
		w := &f.workers[i]
		if w.down > 0 {
			w.down--
			continue
		}
		f.fetch(w)
		f.run(w)
	}
	for _, j := range f.queue {
		j.away = max(j.away-1, 0)
	}
}

// fetch fills the worker's slots.
func (f *isolation) fetch(w *isolated) {
	var left []*rehearsed
	for _, j := range f.queue {
		if len(w.hand) == f.slots || j.away > 0 || !apart(w, j) {
			left = append(left, j)
			continue
		}
		j.runs = 0
		j.record.State = StateRunning
		w.hand = append(w.hand, j)
	}
	f.queue = left
}

// apart reports whether the job may run alongside those that the worker has in hand.
func apart(w *isolated, j *rehearsed) bool {
	for _, other := range w.hand {
		if !suspect.MayRunTogether(j.record.Crashes, other.record.Crashes) {
			return false
		}
	}
	return true
}

// run lets the sessions go on for a step; a poison that has run for long enough
// kills the worker.
func (f *isolation) run(w *isolated) {
	var left []*rehearsed
	for _, j := range w.hand {
		j.runs++
		switch {
		case j.runs < j.takes:
			left = append(left, j)
		case j.poison:
			f.kill(w)
			return
		default:
			j.done = true
		}
	}
	w.hand = left
}

// kill takes the worker down; its jobs are taken over when its lease is gone.
func (f *isolation) kill(w *isolated) {
	id := jobspec.Identity{ID: "j", Run: 1, StreamSeq: 1}
	for _, j := range w.hand {
		if j.done {
			continue
		}
		j.record = ContinueFrom(j.record, id, true, time.Time{})
		j.away = 1
		if j.record.Crashes >= CrashLimit(j.record.MaxAttempts) {
			j.lost = true
			continue
		}
		f.queue = append(f.queue, j)
	}
	w.hand = nil
	w.down = rapid.IntRange(1, 4).Draw(f.t, "down")
}

func TestAJobThatKillsItsWorkersIsDistinguishedFromTheInnocentOnesBesideIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := &isolation{t: t, slots: rapid.IntRange(1, 16).Draw(t, "slots")}
		f.workers = make([]isolated, rapid.IntRange(1, 4).Draw(t, "workers"))
		poisons := rapid.IntRange(1, 2).Draw(t, "poisons")
		for i := range rapid.IntRange(1, 40).Draw(t, "innocents") + poisons {
			j := &rehearsed{
				name: fmt.Sprint("j", i), poison: i < poisons, takes: rapid.IntRange(1, 6).Draw(t, "takes"),
				record: &Record{Run: 1, StreamSeq: 1, MaxAttempts: rapid.IntRange(1, 5).Draw(t, "attempts"), State: StateRunning},
			}
			f.jobs = append(f.jobs, j)
		}
		for _, i := range rapid.Permutation(f.jobs).Draw(t, "order") {
			i.away = rapid.IntRange(0, 20).Draw(t, "published")
			f.queue = append(f.queue, i)
		}
		for range 2000 {
			f.step()
		}
		for _, j := range f.jobs {
			switch {
			case j.poison && !j.lost:
				t.Fatalf("%s kills its workers and was never given up: %d crashes", j.name, j.record.Crashes)
			case !j.poison && !j.done:
				t.Fatalf("%s is innocent and did not complete: lost %v after %d crashes", j.name, j.lost, j.record.Crashes)
			}
		}
	})
}
