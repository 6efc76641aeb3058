package ui

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
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
	Ledger   *cost.Overview  // nil: it is not known now
	Unread   []string        // panels that can't be read now
	Workers  []status.Worker // those that need a look first
	Others   []status.Worker // where there are many: more that are up
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
	soon, cancel := context.WithTimeout(q.ctx, panelTime)
	defer cancel()
	unread := func(what string, err error) {
		switch {
		case err == nil:
		case soon.Err() != nil && q.ctx.Err() == nil:
			d.Unread = append(d.Unread, what+" is still being read. It will be here in a moment.")
		default:
			d.Unread = append(d.Unread, what+" can't be read: "+errors.RedactText(err.Error()))
		}
	}
	d.Limits, err = s.o.Reader.Limits(soon)
	unread("How many sessions are in use by limit", err)
	d.Spend, err = s.o.Reader.Spend(soon)
	unread("What sessions cost", err)
	if d.Spend != nil {
		d.Ledger = d.Spend.Ledger
	}
	if f.BudgetsUnread != "" {
		d.Unread = append(d.Unread, "The budgets can't be read: "+f.BudgetsUnread)
	}
	d.Workers, d.Others = sortWorkers(f.Workers)
	for _, limit := range d.Limits {
		if limit.Max > 0 && limit.Used >= limit.Max {
			text := fmt.Sprintf("All %d sessions of %s are in use.", limit.Max, limit.Name)
			if limit.Used > limit.Max { // it was lowered, or here it is another than the workers'
				text = fmt.Sprintf("%d sessions of %s are in use, and %d are allowed.", limit.Used, limit.Name, limit.Max)
			}
			d.Troubles = append(d.Troubles, trouble{Level: note, Text: text, Remedy: "Further jobs of it wait. If the plan allows more, raise the limit."})
		}
	}
	d.Level, d.Verdict = verdict(d.Troubles, d.Totals)
	if q.view.Stale != nil {
		d.Level, d.Verdict = bad, "How it stands now is not known"
	}
	q.view.Title, q.view.Section, q.view.Live, q.view.Data = "Overview", "overview", true, d
	q.render(http.StatusOK, "overview")
}

// mostWorkers is how many workers that are up are shown at once.
const mostWorkers = 8

// sortWorkers puts the workers that need a look first. others are those that are up
// and too many to be shown at once.
func sortWorkers(list []status.Worker) (first, others []status.Worker) {
	var up []status.Worker
	for _, w := range list {
		if w.Lost || w.Draining || w.NotReady != "" {
			first = append(first, w)
		} else {
			up = append(up, w)
		}
	}
	n := min(len(up), mostWorkers)
	if len(up) <= mostWorkers+2 { // too few to hide
		n = len(up)
	}
	return append(first, up[:n]...), up[n:]
}

// panelTime is how long the overview waits for what takes long to read: what is wrong
// must not wait for what it costs.
const panelTime = 100 * time.Millisecond

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
	stopped := circuitsByCode(f.Circuits)
	for _, code := range slices.Sorted(maps.Keys(stopped)) {
		circuits := stopped[code]
		var names []string
		for _, c := range circuits {
			names = append(names, circuitName(c))
		}
		add(bad, fmt.Sprintf("No sessions are started for %s: %s.", strings.Join(names, ", "), cmp.Or(string(code), "its circuit is open")),
			errors.Explain(code).Remedy,
			pageLink{"Circuits", "#circuits"}, pageLink{"Its held jobs", link("/jobs", "state", "held", "app", circuits[0].App)})
	}
	list = append(list, spentBudgets(f)...)
	for _, q := range f.Queues {
		left := q.Open()
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
				"Its jobs are taken over by others. Check whether its process still runs.", pageLink{"Workers", "#workers"})
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
	if len(f.Workers) == 0 && !slices.ContainsFunc(list, func(t trouble) bool { return t.Level == bad }) {
		add(note, "Nothing runs until a worker does.", "Start one with avatarworker run, then publish a job with avatarworker submit.")
	}
	letters := uint64(0)
	for _, c := range f.DeadLetters {
		letters += c.Letters
	}
	if letters > 0 {
		text := count(letters, "dead letter") + " to decide on"
		if first := f.DeadLetters[0].Code; !slices.ContainsFunc(f.DeadLetters, func(c dlq.Count) bool { return c.Code != first }) {
			text += ", all because of " + string(f.DeadLetters[0].Code)
		} else {
			text += fmt.Sprintf(", most of them because of %s", f.DeadLetters[0].Code)
		}
		add(warn, text+".", "Read why, correct what is wrong, then replay or remove them.", pageLink{"Dead letters", "/letters"})
	}
	return list
}

// mostBudgets is how many spent budgets are named one by one.
const mostBudgets = 3

// spentBudgets are the troubles of budgets that have nothing left.
func spentBudgets(f *status.Fleet) (list []trouble) {
	atLeast := ""
	if !f.CountedAll {
		atLeast = "at least "
	}
	holding := 0
	for holding < len(f.Budgets) && f.Budgets[holding].Held > 0 {
		holding++
	}
	named := min(max(holding, 1), mostBudgets, len(f.Budgets))
	for _, b := range f.Budgets[:named] {
		held := "its jobs are held"
		if b.Held > 0 {
			held = fmt.Sprintf("%s%s of it are held", atLeast, count(b.Held, "job"))
		}
		if b.Held == 1 {
			held = atLeast + "1 job of it is held"
		}
		filter := []any{"state", "held", "app", b.Value}
		if label, ok := strings.CutPrefix(b.Key, "label."); ok {
			filter = []any{"state", "held", "label", label + "=" + b.Value}
		}
		level := bad
		if b.Held == 0 {
			level = warn
		}
		list = append(list, trouble{
			Level:  level,
			Text:   fmt.Sprintf("The budget of %s per %s for %s %s is spent: %s of %s, %s until %s UTC.", count(b.Credits, "credit"), b.Per, b.Key, b.Value, count(b.Spent, ""), count(b.Credits, ""), held, b.Until.UTC().Format("2 Jan 15:04")),
			Remedy: fmt.Sprintf("Wait until then, or raise it: avatarworker cost budget %s --per %s --credits N. Held jobs go on by themselves.", b.Key, b.Per),
			Links:  []pageLink{{"Its held jobs", link("/jobs", filter...)}, {"Cost", "#cost"}},
		})
	}
	if more := len(f.Budgets) - named; more > 0 {
		list = append(list, trouble{Level: warn, Text: "Spent as well: " + count(more, "more budget") + ".", Remedy: "avatarworker cost budget lists all of them.", Links: []pageLink{{"Held jobs", link("/jobs", "state", "held")}}})
	}
	if len(f.Budgets) == 0 && f.HeldBudget > 0 && f.BudgetsUnread == "" {
		list = append(list, trouble{
			Level: warn, Text: atLeast + count(f.HeldBudget, "job") + " held because a budget is spent.",
			Remedy: "This page's configuration does not say which: give it the workers' budgets. Each job's page says it, too.", Links: []pageLink{{"Held jobs", link("/jobs", "state", "held")}},
		})
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
