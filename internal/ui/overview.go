package ui

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

// How bad something is.
const (
	bad  = "bad"  // jobs do not run, or will not
	warn = "warn" // a person should look soon
	note = "note" // set by a person
)

// trouble is one thing that a person should know first.
type trouble struct {
	Level  string
	Text   string
	Remedy string
	Links  []pageLink
}

type pageLink struct{ Text, Href string }

// overviewData is what the overview shows.
type overviewData struct {
	Fleet    *status.Fleet
	Troubles []trouble
	Verdict  string
	Level    string // of the worst trouble; "": all is well
	Totals   totals
	Chart    chart
	Limits   []Limit
	Spend    *Spend
	Unread   []string // panels that can't be read now
}

// totals are of all queues.
type totals struct {
	Waiting                           uint64
	Running, Retrying, Held, Released int
	Letters                           uint64
	Slots, Workers                    int
	AtLeast                           string // "≥ " where counting took too long
}

func sum(f *status.Fleet) totals {
	var t totals
	for _, q := range f.Queues {
		t.Waiting += q.Waiting
		t.Running += q.Running
		t.Retrying += q.Retrying
		t.Held += q.Held
		t.Released += q.Released
	}
	for _, c := range f.DeadLetters {
		t.Letters += c.Letters
	}
	for _, w := range f.Workers {
		if !w.Lost {
			t.Slots += w.Slots
			t.Workers++
		}
	}
	if !f.CountedAll {
		t.AtLeast = "≥ "
	}
	return t
}

func (s *Server) overview(q *request) {
	f, err := s.o.Reader.Fleet(q.ctx)
	if err != nil {
		q.unreadable(err)
		return
	}
	d := overviewData{Fleet: f, Totals: sum(f), Troubles: troubles(f), Chart: newChart(s.o.Reader, q.r.URL.Query().Get("span"), q.view.Now)}
	if d.Limits, err = s.o.Reader.Limits(q.ctx); err != nil {
		d.Unread = append(d.Unread, errors.RedactText(err.Error()))
	}
	if d.Spend, err = s.o.Reader.Spend(q.ctx); err != nil {
		d.Unread = append(d.Unread, errors.RedactText(err.Error()))
	}
	for _, limit := range d.Limits {
		if limit.Max > 0 && limit.Used >= limit.Max {
			d.Troubles = append(d.Troubles, trouble{Level: note, Text: fmt.Sprintf("All %d sessions of %s are in use.", limit.Max, limit.Name),
				Remedy: "Further jobs of it wait. If the plan allows more, raise the limit."})
		}
	}
	d.Level, d.Verdict = verdict(d.Troubles, d.Totals)
	q.view.Title, q.view.Section, q.view.Live, q.view.Data = "Overview", "overview", true, d
	q.render(http.StatusOK, "overview")
}

// verdict sums up in one line.
func verdict(list []trouble, t totals) (level, text string) {
	slices.SortStableFunc(list, func(a, b trouble) int { return cmp.Compare(rank(a.Level), rank(b.Level)) })
	counts := make(map[string]int)
	for _, x := range list {
		counts[x.Level]++
	}
	switch {
	case counts[bad] > 0:
		return bad, count(counts[bad], "problem") + " to solve now"
	case counts[warn] > 0:
		return warn, count(counts[warn], "thing") + " to look at"
	case t.Workers == 0:
		return note, "No worker is running"
	case t.Running > 0:
		return "", "All is well: " + count(t.Running, "job") + " running"
	default:
		return "", "All is well: nothing is running"
	}
}

func rank(level string) int { return slices.Index([]string{bad, warn, note}, level) }

// troubles are what a person should know first of the fleet.
func troubles(f *status.Fleet) []trouble {
	var list []trouble
	add := func(level, text, remedy string, links ...pageLink) {
		list = append(list, trouble{level, text, remedy, links})
	}
	for code, circuits := range circuitsByCode(f.Circuits) {
		var names []string
		for _, c := range circuits {
			names = append(names, circuitName(c))
		}
		add(bad, fmt.Sprintf("No sessions are started for %s: %s.", strings.Join(names, ", "), cmp.Or(string(code), "its circuit is open")),
			errors.Explain(code).Remedy,
			pageLink{"Circuits", "#circuits"}, pageLink{"Its held jobs", link("/jobs", "state", "held", "app", circuits[0].App)})
	}
	for _, q := range f.Queues {
		left := q.Waiting + uint64(max(q.Taken, 0))
		switch {
		case q.Served == 0 && left > 0:
			add(bad, fmt.Sprintf("No worker serves queue %s, and %s for one.", q.Name, waits(left)),
				"Start a worker with worker.queues "+q.Name+", or publish to another queue.",
				pageLink{"Jobs that wait", link("/jobs", "state", "waiting", "queue", q.Name)})
		case !q.PausedUntil.IsZero():
			add(note, fmt.Sprintf("Queue %s is paused %s: %s.", q.Name, paused(f.At, q.PausedUntil), waits(q.Waiting)),
				"What runs goes on. Resume it when the reason is gone.", pageLink{"Queues", "#queues"})
		}
	}
	for _, w := range f.Workers {
		switch {
		case w.Lost:
			add(warn, fmt.Sprintf("Worker %s was lost, or can't reach NATS: nothing from it for %s.", w.WorkerID, ago(f.At, w.At)),
				"Its jobs are taken over by others. Look whether its process lives.", pageLink{"Workers", "#workers"})
		case w.NotReady != "" && !w.Draining:
			add(warn, fmt.Sprintf("Worker %s takes no jobs, or not all.", w.WorkerID), sentence(errors.RedactText(w.NotReady)), pageLink{"Workers", "#workers"})
		}
	}
	for _, s := range f.Storage {
		if s.Fill >= status.FullAt {
			level := warn
			if s.Fill >= 0.95 {
				level = bad
			}
			add(level, fmt.Sprintf("The %s is %.0f %% full.", s.Object, 100*s.Fill), sentence(s.Remedy), pageLink{"Storage", "#storage"})
		}
	}
	letters := uint64(0)
	for _, c := range f.DeadLetters {
		letters += c.Letters
	}
	if letters > 0 {
		text := count(letters, "dead letter") + " to decide on"
		if len(f.DeadLetters) == 1 {
			text += ", all because of " + string(f.DeadLetters[0].Code)
		} else {
			text += fmt.Sprintf(", most of them because of %s", f.DeadLetters[0].Code)
		}
		add(warn, text+".", "Read why, correct what is wrong, then replay or remove them.", pageLink{"Dead letters", "/letters"})
	}
	return list
}

func waits(n uint64) string {
	switch n {
	case 0:
		return "no job waits"
	case 1:
		return "1 job waits"
	default:
		return count(n, "job") + " wait"
	}
}

func circuitName(c circuit.Circuit) string {
	if c.Region == "" {
		return "app " + c.App
	}
	return "app " + c.App + " in " + c.Region
}

// circuitsByCode groups circuits: a fault of the account opens all of its.
func circuitsByCode(list []circuit.Circuit) map[errors.Code][]circuit.Circuit {
	groups := make(map[errors.Code][]circuit.Circuit)
	for _, c := range list {
		groups[c.Code] = append(groups[c.Code], c)
	}
	return groups
}

// onTheWay are the states of jobs without an outcome.
func onTheWay() []lifecycle.State {
	return []lifecycle.State{status.StateWaiting, lifecycle.StateRunning, lifecycle.StateRetrying, lifecycle.StateHeld, lifecycle.StateReleased}
}
