package ui

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

// jobsData is a list of jobs.
type jobsData struct {
	Filter jobFilter
	Rows   []status.Row
	Groups []status.Group    // instead of Rows where the jobs are counted
	States []lifecycle.State // those that any of the groups has
	Labels []string          // names of labels by which sessions are added up
	More   bool
	Capped bool // there are more, but the list ends here
	First  int  // number of the first row, from 1
	Looked status.Search
}

func (s *Server) jobs(q *request) {
	filter, query := parseJobs(q.r.URL.Query(), q.view.Now)
	q.view.Title, q.view.Section, q.view.Live = "Jobs", "jobs", true
	if len(filter.Problems) > 0 {
		q.view.Data = jobsData{Filter: filter, Looked: status.Search{All: true}}
		q.render(http.StatusBadRequest, "jobs")
		return
	}
	from := (filter.Page - 1) * pageSize
	query.Limit, query.By = from+pageSize, status.By(filter.By)
	list, err := s.o.Reader.Jobs(q.ctx, query)
	if err != nil {
		q.unreadable(err)
		return
	}
	d := jobsData{Filter: filter, More: list.More, Looked: list.Waiting, First: from + 1}
	if from < len(list.Rows) {
		d.Rows = list.Rows[from:]
	}
	if from < len(list.Groups) {
		d.Groups = list.Groups[from:]
		d.States = slices.DeleteFunc(status.States(), func(state lifecycle.State) bool {
			return !slices.ContainsFunc(d.Groups, func(g status.Group) bool { return g.States[state] > 0 })
		})
	}
	d.Labels = s.labelNames(q.ctx)
	if d.More && from+pageSize >= maxRows {
		d.More, d.Capped = false, true
	}
	q.view.Data = d
	q.render(http.StatusOK, "jobs")
}

// labelNames are the labels by which sessions are added up, such as customer; none if
// that is not known at once.
func (s *Server) labelNames(ctx context.Context) []string {
	soon, cancel := context.WithTimeout(ctx, panelTime)
	defer cancel()
	spend, err := s.o.Reader.Spend(soon)
	if err != nil || spend == nil || spend.Ledger == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(spend.Ledger.ByLabel))
}

// find leads to the job whose id was typed.
func (s *Server) find(q *request) {
	id := strings.TrimSpace(q.r.URL.Query().Get("id"))
	if !jobspec.ValidID(id) {
		q.fail(http.StatusBadRequest, "This is not a job id.", "An id has 1 to 64 of A-Z a-z 0-9 _ and -. To find jobs by queue, app, label or code, use the filters of the jobs page.")
		return
	}
	http.Redirect(q.w, q.r, "/jobs/"+url.PathEscape(id), http.StatusSeeOther)
}

// step is an event of a job as its page shows it.
type step struct {
	Time    time.Time
	Kind    string // the event's type without its prefix; "error"
	Run     int
	Attempt int
	Text    string
	Code    errors.Code
	Class   errors.Class
	Phase   errors.Phase
	Worker  string
	Explain errors.Explanation
	JSON    string
}

// jobData is one job.
type jobData struct {
	ID        string
	Job       *status.Job
	State     lifecycle.State
	Verdict   string // its state, in a sentence
	Remedy    string
	Steps     []step
	Line      *timeline
	Letters   []dlq.Entry
	Queue     *status.Queue // of a job that waits
	Held      bool          // by a circuit
	CanCancel bool
	CanRetry  bool
	Explain   errors.Explanation // of its last error
	Cause     string
}

func (s *Server) job(q *request) {
	id := q.r.PathValue("id")
	if !jobspec.ValidID(id) {
		q.fail(http.StatusNotFound, "This is not a job id.", "An id has 1 to 64 of A-Z a-z 0-9 _ and -.")
		return
	}
	j, err := s.o.Reader.Job(q.ctx, id)
	q.view.Section = "jobs"
	if errors.Is(err, status.ErrNoJob) {
		q.fail(http.StatusNotFound, "Job "+id+" is not known.", sentence(err.Error()))
		return
	}
	if err != nil {
		q.unreadable(err)
		return
	}
	d := jobData{ID: id, Job: j}
	for _, e := range j.History {
		d.Steps = append(d.Steps, newStep(e))
	}
	s.describe(q, &d)
	d.Steps = withReplays(d.Steps, j.Replays, id)
	q.view.Title, q.view.Live, q.view.Data = "Job "+id, !d.State.Final() || d.State == "", d
	q.render(http.StatusOK, "job")
}

func newStep(e status.Event) step {
	var body struct {
		Run         int          `json:"run"`
		Attempt     int          `json:"attempt"`
		Attempts    int          `json:"attempts"`
		MaxAttempts int          `json:"max_attempts"`
		Code        errors.Code  `json:"code"`
		Class       errors.Class `json:"class"`
		Phase       errors.Phase `json:"phase"`
		Message     string       `json:"message"`
		Title       string       `json:"server_title"`
		Detail      string       `json:"server_detail"`
		Worker      string       `json:"worker_id"`
		Reason      string       `json:"reason"`
		RetryAt     *time.Time   `json:"retry_at"`
	}
	_ = json.Unmarshal(e.Data, &body) // another's message has none of them
	kind := e.Type[strings.LastIndexByte(e.Type, '.')+1:]
	text := status.Cause(body.Message, body.Title, body.Detail)
	if text == "" {
		text = errors.RedactText(body.Reason)
	}
	return step{
		Time: e.Time, Kind: kind, Run: body.Run, Attempt: max(body.Attempt, body.Attempts), Text: text, Code: body.Code, Class: body.Class,
		Phase: body.Phase, Worker: body.Worker, Explain: errors.Explain(body.Code), JSON: pretty(dlq.MaskJSON(e.Data)),
	}
}

// withReplays adds the job's replays to its events, each before the first event of its
// run.
func withReplays(steps []step, replays []dlq.ReplayedRun, id string) []step {
	for _, r := range replays {
		t := step{Time: r.At, Kind: "replayed", Run: r.Run, Text: fmt.Sprintf("From dead letter %d.", r.DeadLetter)}
		if r.Corrected != "" {
			t.Kind = "corrected"
			t.Text = fmt.Sprintf("From dead letter %d. The original (%s): avatarworker dlq show --original %s --run %d", r.DeadLetter, r.Corrected, id, r.Run)
		}
		at := slices.IndexFunc(steps, func(s step) bool { return s.Run >= r.Run })
		if at < 0 {
			at = len(steps)
		}
		if t.Time.IsZero() && at > 0 { // replayed by a version that did not note when
			t.Time = steps[at-1].Time
		}
		steps = slices.Insert(steps, at, t)
	}
	return steps
}

// pretty is JSON with a line for each value.
func pretty(data json.RawMessage) string {
	out, err := json.MarshalIndent(data, "", "  ")
	if err != nil {
		return string(data)
	}
	return string(out)
}

// describe says what state the job is in, and what can be done.
func (s *Server) describe(q *request, d *jobData) {
	j, now := d.Job, q.view.Now
	var published time.Time
	switch r := j.Record; {
	case j.Waiting != nil:
		published = j.Waiting.Published
		s.describeWaiting(q, d)
	case r == nil:
		d.Verdict = "Its record is gone: what is left are its events."
		if n := len(d.Steps); n > 0 {
			d.State = lifecycle.State(d.Steps[n-1].Kind)
		}
	default:
		d.State, published = r.State, r.PublishedAt
		if published.IsZero() {
			published = r.CreatedAt
		}
		s.describeRecord(q, d, r)
	}
	if d.State == lifecycle.StateDeadLettered {
		f := dlq.Filter{Jobs: []string{d.ID}, Newest: true}
		if r := j.Record; r != nil && r.LastError != nil && r.LastError.Code != "" {
			f.Codes = []errors.Code{r.LastError.Code}
		}
		list, _, err := s.o.Reader.Letters(q.ctx, f, 3)
		if err != nil {
			s.o.Logger.Warn().Err(err).Str("job_id", d.ID).Msg("its dead letter can't be found")
		}
		d.Letters = list
	}
	d.Line = newTimeline(d.Steps, published, now)
}

func (s *Server) describeWaiting(q *request, d *jobData) {
	w := d.Job.Waiting
	d.State, d.CanCancel = status.StateWaiting, true
	d.Verdict = "It has waited in queue " + w.Queue + " for " + ago(q.view.Now, w.Published) + ": no worker has received it yet."
	if w.Delivered {
		d.Verdict = "It has waited in queue " + w.Queue + " for " + ago(q.view.Now, w.Published) + ": it was delivered, and handed back without a session. " + sentence("It waits for "+w.WaitsFor)
	}
	if w.CancelRequested {
		d.Verdict += " Its cancel is noted: it ends when a worker has it next."
	}
	f, err := s.o.Reader.Fleet(q.ctx)
	if err != nil {
		return
	}
	for i := range f.Queues {
		if queue := &f.Queues[i]; queue.Name == w.Queue {
			d.Queue = queue
			switch {
			case !queue.PausedUntil.IsZero():
				d.Remedy = "The queue is paused " + paused(f.At, queue.PausedUntil) + ". Resume it on the overview."
			case queue.Served == 0:
				d.Remedy = "No worker serves the queue: start one with worker.queues " + queue.Name + "."
			case w.Delivered:
				d.Remedy = "It is delivered again by itself, and starts once it gets what it waits for."
			default:
				d.Remedy = sentence(waits(queue.Waiting)) + " " + sentence(count(queue.Served, "worker")+" of the queue") + " It starts by itself when a slot is free."
			}
		}
	}
}

func (s *Server) describeRecord(q *request, d *jobData, r *lifecycle.Record) {
	now := q.view.Now
	d.CanCancel = !r.State.Final() || d.Job.NextRun != nil
	d.CanRetry = r.State == lifecycle.StateRetrying || r.State == lifecycle.StateHeld
	if e := r.LastError; e != nil {
		d.Explain, d.Cause = errors.Explain(e.Code), status.Cause(e.Message, e.ServerTitle, e.ServerDetail)
	}
	switch r.State {
	case lifecycle.StateRunning:
		d.Verdict = "It has run on " + r.WorkerID + " for " + ago(now, r.StartedAt) + "."
	case lifecycle.StateRetrying:
		d.Verdict = "An attempt failed. The next one"
		if r.NextAttemptAt != nil && r.NextAttemptAt.After(now) {
			d.Verdict += " comes in " + until(now, *r.NextAttemptAt) + "."
		} else {
			d.Verdict += " is due."
		}
		d.Remedy = "Nothing: it is tried again by itself. Retry now if what was wrong is solved."
	case lifecycle.StateHeld:
		why, remedy := status.HeldBecause(r)
		d.Verdict, d.Remedy = "It is held: "+sentence(why), remedy
		d.Held = r.HeldReason == lifecycle.HeldCircuit || r.HeldReason == ""
	case lifecycle.StateReleased:
		if r.StreamSeq == 0 {
			d.Verdict = "No job with this id is in a queue yet. Its cancel is noted, and ends it when a worker has it."
			return
		}
		d.Verdict = "It was handed back, and is taken over by itself: " + sentence(status.ReleasedBecause(r))
	case lifecycle.StateCompleted:
		d.Verdict = "It completed after " + count(max(r.Attempt, 1), "attempt") + "."
	case lifecycle.StateDeadLettered:
		if r.LastError != nil {
			d.Explain = errors.ExplainGivenUp(r.LastError.Code)
		}
		d.Verdict, d.Remedy = "It was given up.", d.Explain.Remedy
		if r.LastError != nil {
			d.Verdict = "It was given up because of " + string(r.LastError.Code) + ": " + sentence(d.Explain.Meaning)
		}
	case lifecycle.StateExpired:
		d.Verdict = "Its deadline passed before it was done. Its publisher wished it so."
		if at := d.Job.Deadline(); at != nil {
			d.Verdict = "Its deadline, " + at.UTC().Format(time.RFC3339) + ", passed before it was done, or would have before its next attempt. Its publisher wished it so."
		}
	case lifecycle.StateCancelled:
		d.Verdict = "It was cancelled."
	}
	if until := d.Job.PausedUntil; !until.IsZero() && !r.State.Final() {
		d.Verdict += " Its queue is paused " + paused(now, until) + ", and it is not tried before."
		d.Remedy = "Resume queue " + r.Queue + " on the overview once the reason is gone. " + d.Remedy
	}
	if r.CancelRequested && !r.State.Final() {
		d.Verdict += " Its end was asked for."
	}
}

// codes is the table of codes.
func (s *Server) codes(q *request) {
	q.view.Title, q.view.Section, q.view.Data = "Codes", "codes", s.o.Codes
	q.render(http.StatusOK, "codes")
}

// codeData is one code with what it hits now.
type codeData struct {
	Row     errors.Row
	Letters uint64
	Jobs    []status.Row
	More    bool
}

func (s *Server) code(q *request) {
	name := q.r.PathValue("code")
	i := slices.IndexFunc(s.o.Codes, func(r errors.Row) bool { return strings.EqualFold(string(r.Code), name) })
	q.view.Section = "codes"
	if i < 0 {
		q.fail(http.StatusNotFound, "There is no such code.", "The page of codes lists them all.")
		return
	}
	d := codeData{Row: s.o.Codes[i]}
	if f, err := s.o.Reader.Fleet(q.ctx); err == nil {
		for _, c := range f.DeadLetters {
			if c.Code == d.Row.Code {
				d.Letters += c.Letters
			}
		}
	}
	q.view.Title, q.view.Live, q.view.Data = string(d.Row.Code), false, d
	q.render(http.StatusOK, "code")
}

// alertData is one alert.
type alertData struct {
	Time    time.Time
	Kind    string
	Code    string
	Text    string
	Remedy  string
	Apps    []string
	Jobs    []string
	Known   bool // the code is one of ours
	Closing bool // it says that something is over
}

func newAlert(e status.Event) alertData {
	var body struct {
		Code    string   `json:"code"`
		What    string   `json:"what"`
		Message string   `json:"message"`
		Count   int      `json:"count"`
		Window  string   `json:"window"`
		AppID   string   `json:"app_id"`
		Region  string   `json:"region"`
		JobID   string   `json:"job_id"`
		AppIDs  []string `json:"app_ids"`
		JobIDs  []string `json:"job_ids"`
		Worker  string   `json:"worker_id"`
	}
	_ = json.Unmarshal(e.Data, &body) // another's message has none of them
	a := alertData{Time: e.Time, Kind: strings.TrimPrefix(e.Type, "avatar.alert."), Code: body.Code, Text: errors.RedactText(body.Message), Apps: body.AppIDs, Jobs: body.JobIDs}
	if a.Code == "" {
		a.Code = body.What
	}
	if body.AppID != "" {
		a.Apps = append(a.Apps, body.AppID)
	}
	if body.JobID != "" {
		a.Jobs = append(a.Jobs, body.JobID)
	}
	a.Jobs = slices.DeleteFunc(a.Jobs, func(id string) bool { return !jobspec.ValidID(id) })
	code := errors.Code(a.Code)
	a.Known = code.Known()
	a.Closing = a.Kind == "circuit_closed"
	switch {
	case body.Count > 0:
		a.Text = count(body.Count, "failure") + " within " + body.Window
		a.Remedy = errors.Explain(code).Remedy
	case a.Text == "" && !a.Closing:
		a.Remedy = errors.Explain(code).Remedy
	}
	return a
}

type alertsData struct {
	Alerts []alertData
	More   bool
}

// alertsShown is how many alerts a page has.
const alertsShown = 100

func (s *Server) alerts(q *request) {
	list, more, err := s.o.Reader.Alerts(q.ctx, alertsShown)
	if err != nil {
		q.unreadable(err)
		return
	}
	d := alertsData{More: more}
	for _, e := range list {
		d.Alerts = append(d.Alerts, newAlert(e))
	}
	q.view.Title, q.view.Section, q.view.Live, q.view.Data = "Alerts", "alerts", true, d
	q.render(http.StatusOK, "alerts")
}

type recordingsData struct {
	Recordings []Recording
	More       bool
}

func (s *Server) recordings(q *request) {
	list, more, err := s.o.Reader.Recordings(q.ctx, 2*pageSize)
	if err != nil {
		q.unreadable(err)
		return
	}
	q.view.Title, q.view.Section, q.view.Data = "Recordings", "recordings", recordingsData{list, more}
	q.render(http.StatusOK, "recordings")
}
