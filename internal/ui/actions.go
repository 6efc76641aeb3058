package ui

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
	"avatarworker/internal/status"
)

const (
	// maxBulk is how many jobs or letters one request changes at most.
	maxBulk = 500
	// bulkTime is the time after which a request that changes many ends: the rest
	// is done when it is repeated.
	bulkTime = 45 * time.Second
	// oneTime bounds the change of one of them.
	oneTime = 20 * time.Second
)

// action serves what changes something: only with ui.write, from our own page, with
// the token of the session's forms.
func (s *Server) action(handle func(*request)) func(*request) {
	return func(q *request) {
		unreadable := q.r.ParseForm()
		q.form = q.r.PostForm //nolint:forbidigo // a form's fields, not the client's function
		switch {
		case !s.o.Write:
			q.fail(http.StatusForbidden, "Nothing can be changed here.", "This page was started to look only. Set ui.write, or use the command line.")
		case !s.guard.sameOrigin(q.r):
			q.fail(http.StatusForbidden, "This request comes from another site.", "Nothing was changed. Open the page itself and try again.")
		case unreadable != nil:
			q.fail(http.StatusRequestEntityTooLarge, "This form can't be read, or is too large.", "Nothing was changed. Choose fewer, or use the command line.")
		case !s.guard.ownToken(q.r, q.form.Get(tokenField)):
			q.view.Path = backPath(q.form.Get("back"))
			q.fail(http.StatusForbidden, "This form is too old.", "Nothing was changed. The page was started again since, or cookies are off. Go back, load the page again and repeat it.")
		default:
			q.view.Path = backPath(q.form.Get("back"))
			handle(q)
		}
	}
}

// finish shows what was done on the page that the action came from.
func (q *request) finish(r *result) {
	cookie, err := q.r.Cookie(cookieName)
	if err != nil {
		q.fail(http.StatusForbidden, "Cookies are off.", "It was done, but can't be shown.")
		return
	}
	log := q.s.o.Logger.Info().Str("action", q.r.URL.Path).Str("user", say(q.view.User)).Str("remote", q.r.RemoteAddr).Int("done", r.OK).Int("not_done", r.Not)
	var names []string
	for _, row := range r.Rows[:min(len(r.Rows), 20)] {
		names = append(names, row.Name+": "+row.Status)
	}
	log.Strs("what", names).Msg("changed on the page")
	u, err := url.Parse(q.view.Path)
	if err != nil {
		u = &url.URL{Path: "/"}
	}
	query := u.Query()
	query.Set("done", q.s.results.keep(r, cookie.Value))
	u.RawQuery, u.Fragment = query.Encode(), ""
	http.Redirect(q.w, q.r, u.String(), http.StatusSeeOther)
}

// sure reports whether the form was confirmed.
func (q *request) sure() bool { return q.form.Get("sure") == "yes" }

// confirmData asks before something is changed.
type confirmData struct {
	Question string
	Warning  string
	Button   string
	Danger   bool
	Action   string // where the form goes
	Fields   []hiddenField
	Jobs     []status.Row
	Letters  []dlq.Entry
	Back     string
	Note     string
}

// hiddenField is a hidden field of a form.
type hiddenField struct{ Name, Value string }

func (q *request) confirm(d confirmData) {
	d.Back, d.Action = q.view.Path, q.r.URL.Path
	q.view.Title, q.view.Data = d.Question, d
	q.render(http.StatusOK, "confirm")
}

// chosenJobs are the jobs that a form names, or all that its filter chooses.
func (q *request) chosenJobs(states []lifecycle.State) (rows []status.Row, more, ok bool) {
	if q.form.Get("all") == "" {
		ids, valid := jobIDs(q.form["id"])
		if !valid || len(ids) == 0 {
			q.fail(http.StatusBadRequest, "No job was chosen.", fmt.Sprintf("Nothing was changed. Tick the jobs that are meant, at most %d.", maxBulk))
			return nil, false, false
		}
		for _, id := range ids {
			rows = append(rows, status.Row{ID: id})
		}
		return rows, false, true
	}
	v, err := url.ParseQuery(q.form.Get("filter"))
	filter, query := parseJobs(v, q.view.Now)
	if err != nil || len(filter.Problems) > 0 || len(q.form.Get("filter")) > maxQuery {
		q.fail(http.StatusBadRequest, "The filter is not valid.", "Nothing was changed. "+strings.Join(filter.Problems, " "))
		return nil, false, false
	}
	if len(query.States) == 0 {
		query.States = states
	} else {
		query.States = slices.DeleteFunc(query.States, func(s lifecycle.State) bool { return !slices.Contains(states, s) })
	}
	if len(query.States) == 0 {
		q.fail(http.StatusBadRequest, "None of these jobs can be changed so.", "Nothing was changed: those that the filter chooses have their outcome.")
		return nil, false, false
	}
	query.Limit = maxBulk
	list, err := q.s.o.Reader.Jobs(q.ctx, query)
	if err != nil {
		q.unreadable(err)
		return nil, false, false
	}
	if len(list.Rows) == 0 {
		q.fail(http.StatusNotFound, "No job matches any more.", "Nothing was changed.")
		return nil, false, false
	}
	return list.Rows, list.More || !list.Waiting.All, true
}

// changeJobs cancels or retries jobs.
func (s *Server) changeJobs(q *request) {
	cancel := strings.HasSuffix(q.r.URL.Path, "/cancel")
	verb, past, states := "Retry", "Retried", []lifecycle.State{lifecycle.StateRetrying, lifecycle.StateHeld}
	if cancel {
		verb, past, states = "Cancel", "Cancelled", onTheWay()
	}
	rows, more, ok := q.chosenJobs(states)
	if !ok {
		return
	}
	probe := q.form.Get("probe") != ""
	if (cancel || len(rows) > 1) && !q.sure() {
		d := confirmData{Question: verb + " " + count(len(rows), "job") + "?", Button: verb + " " + count(len(rows), "job"), Danger: cancel, Jobs: rows}
		if cancel {
			d.Warning = "A session that runs is closed. A job that was cancelled is not run again."
		}
		if more {
			d.Note = fmt.Sprintf("There are more: these are the first %d. Repeat it for the others.", len(rows))
		}
		for _, row := range rows {
			d.Fields = append(d.Fields, hiddenField{"id", row.ID})
		}
		if probe {
			d.Fields = append(d.Fields, hiddenField{"probe", "on"})
		}
		q.confirm(d)
		return
	}
	r := &result{}
	q.each(r, len(rows), func(ctx context.Context, i int) resultRow {
		id := rows[i].ID
		var done Done
		var err error
		if cancel {
			done, err = s.o.Actor.Cancel(ctx, id)
		} else {
			done, err = s.o.Actor.Retry(ctx, id, probe)
		}
		return rowOf("Job "+id, "/jobs/"+id, done, err)
	})
	r.Title = summary(past, "job", r)
	q.finish(r)
}

// rowOf tells what became of one thing.
func rowOf(name, href string, done Done, err error) resultRow {
	if err != nil {
		return resultRow{Name: name, Href: href, Status: "failed", Message: sentence(errors.RedactText(err.Error()))}
	}
	return resultRow{Name: name, Href: href, Status: strings.ReplaceAll(done.Status, "_", " "), Message: sentence(errors.RedactText(done.Message)), OK: done.OK}
}

// each changes one thing after the other, within bulkTime. Each of them is finished
// also if the browser has left.
func (q *request) each(r *result, n int, change func(ctx context.Context, i int) resultRow) {
	end := time.Now().Add(bulkTime)
	for i := range n {
		if time.Now().After(end) || q.s.isStopping() {
			r.add(resultRow{Name: count(n-i, "other"), Status: "not done", Message: "There was no time for them: repeat it."})
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx), oneTime)
		r.add(change(ctx, i))
		cancel()
	}
}

func (s *Server) isStopping() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// summary is what was done, in a line.
func summary(past, thing string, r *result) string {
	switch {
	case r.Not == 0:
		return past + " " + count(r.OK, thing) + "."
	case r.OK == 0:
		return "Nothing was changed."
	default:
		return fmt.Sprintf("%s %s, %d not as asked.", past, count(r.OK, thing), r.Not)
	}
}

// chosenLetters are the dead letters that a form names, or all that its filter
// chooses.
func (q *request) chosenLetters() (list []dlq.Entry, more, ok bool) {
	if q.form.Get("all") == "" {
		seqs, valid := sequences(q.form["seq"])
		if !valid || len(seqs) == 0 {
			q.fail(http.StatusBadRequest, "No dead letter was chosen.", fmt.Sprintf("Nothing was changed. Tick those that are meant, at most %d.", maxBulk))
			return nil, false, false
		}
		for _, seq := range seqs {
			list = append(list, dlq.Entry{Seq: seq})
		}
		return list, false, true
	}
	v, err := url.ParseQuery(q.form.Get("filter"))
	filter, query := parseLetters(v, q.view.Now)
	if err != nil || len(filter.Problems) > 0 || len(q.form.Get("filter")) > maxQuery {
		q.fail(http.StatusBadRequest, "The filter is not valid.", "Nothing was changed. "+strings.Join(filter.Problems, " "))
		return nil, false, false
	}
	query.Newest = false // those that failed first are run first
	list, more, err = q.s.o.Reader.Letters(q.ctx, query, maxBulk)
	if err != nil {
		q.unreadable(err)
		return nil, false, false
	}
	if len(list) == 0 {
		q.fail(http.StatusNotFound, "No dead letter matches any more.", "Nothing was changed.")
		return nil, false, false
	}
	return list, more, true
}

func letterRow(seq uint64, job string) (name, href string) {
	name = fmt.Sprintf("Dead letter %d", seq)
	if validJob(job) {
		return name + ", job " + job, "/jobs/" + job
	}
	return name, ""
}

// replay shows what a replay would do, and does it once that is confirmed.
func (s *Server) replay(q *request) {
	list, more, ok := q.chosenLetters()
	if !ok {
		return
	}
	c := readCorrection(q.form)
	o, err := c.options(!q.sure())
	if c.Body != "" && len(list) > 1 && err == nil {
		err = errors.New("the whole job can be edited for one dead letter at a time; fields can be set for several")
	}
	if err != nil {
		q.wrongCorrection(list, c, err)
		return
	}
	if !q.sure() {
		s.preview(q, list, more, c, o)
		return
	}
	r := &result{}
	q.each(r, len(list), func(ctx context.Context, i int) resultRow {
		done, err := s.o.Actor.Replay(ctx, list[i].Seq, o)
		name, href := letterRow(list[i].Seq, done.JobID)
		return rowOf(name, href, replayed(done), err)
	})
	r.Title = summary("Replayed", "dead letter", r)
	if len(list) == 1 && r.OK == 1 && r.Rows[0].Href != "" {
		q.view.Path = r.Rows[0].Href // its letter is gone; its next run is there
	}
	q.finish(r)
}

// replayed tells what became of one letter.
func replayed(r dlq.Result) Done {
	d := Done{Status: string(r.Status), OK: r.Status == dlq.StatusReplayed || r.Status == dlq.StatusAlready || r.Status == dlq.StatusWouldReplay}
	switch r.Status {
	case dlq.StatusReplayed, dlq.StatusWouldReplay:
		d.Message = fmt.Sprintf("run %d on %s", r.Run, r.Subject)
	case dlq.StatusAlready:
		d.Message = fmt.Sprintf("run %d is in the queue, or was", r.Run)
	case dlq.StatusDeadlinePassed:
		d.Message = "its deadline has passed: tick that this does not matter to replay it"
	}
	return d
}

// wrongCorrection shows the form again with what is wrong with it.
func (q *request) wrongCorrection(list []dlq.Entry, c correction, err error) {
	text := sentence(errors.RedactText(err.Error()))
	if len(list) != 1 {
		q.fail(http.StatusBadRequest, "The correction is not valid.", "Nothing was changed. "+text)
		return
	}
	l, showErr := q.s.o.Reader.Letter(q.ctx, list[0].Seq)
	if showErr != nil {
		q.fail(http.StatusBadRequest, "The correction is not valid.", "Nothing was changed. "+text)
		return
	}
	d := newLetterData(l)
	d.Problem, d.Ignore = text, c.Ignore
	copy(d.Sets, c.Sets)
	if c.Body != "" {
		d.Edit = c.Body
	}
	q.showLetter(http.StatusBadRequest, d)
}

// preview tries a replay without changing anything.
func (s *Server) preview(q *request, list []dlq.Entry, more bool, c correction, o dlq.ReplayOptions) {
	d := previewData{Correction: c, More: more}
	for _, e := range list {
		if q.ctx.Err() != nil {
			q.unreadable(q.ctx.Err())
			return
		}
		row := previewRow{Seq: e.Seq}
		l, err := s.o.Reader.Letter(q.ctx, e.Seq)
		if err == nil {
			row.JobID, row.Code = l.JobID, l.Code
			if o.Correct != nil && len(d.Rows) < 50 {
				if after, err := o.Correct(l); err == nil {
					before, err := dlq.BodyJSON(l)
					if err != nil {
						before = []byte("{}")
					}
					row.Changes = changesOf(before, after)
				}
			}
			var r dlq.Result
			r, err = s.o.Actor.Replay(q.ctx, e.Seq, o)
			row.Status, row.Run = r.Status, r.Run
		}
		if err != nil {
			row.Error = sentence(errors.RedactText(err.Error()))
			if len(list) == 1 && !errors.Is(err, dlq.ErrNoLetter) {
				q.wrongCorrection(list, c, err)
				return
			}
		} else if row.Status == dlq.StatusWouldReplay || row.Status == dlq.StatusAlready {
			d.Ready++
		}
		d.Rows = append(d.Rows, row)
	}
	d.Back = q.view.Path
	q.view.Title, q.view.Section, q.view.Data = "Replay "+count(d.Ready, "dead letter")+"?", "letters", d
	q.render(http.StatusOK, "preview")
}

// remove removes dead letters for good.
func (s *Server) remove(q *request) {
	list, more, ok := q.chosenLetters()
	if !ok {
		return
	}
	if !q.sure() {
		for i, e := range list {
			if e.JobID != "" || i >= 50 {
				continue
			}
			if l, err := s.o.Reader.Letter(q.ctx, e.Seq); err == nil {
				list[i] = l.Entry
			}
		}
		d := confirmData{
			Question: "Remove " + count(len(list), "dead letter") + " for good?", Button: "Remove " + count(len(list), "dead letter"), Danger: true, Letters: list,
			Warning: "The jobs in them are not run again, and their bytes are gone.",
		}
		if more {
			d.Note = fmt.Sprintf("There are more: these are the first %d. Repeat it for the others.", len(list))
		}
		for _, e := range list {
			d.Fields = append(d.Fields, hiddenField{"seq", strconv.FormatUint(e.Seq, 10)})
		}
		q.confirm(d)
		return
	}
	r := &result{}
	q.each(r, len(list), func(ctx context.Context, i int) resultRow {
		name, _ := letterRow(list[i].Seq, "")
		err := s.o.Actor.Remove(ctx, list[i].Seq)
		if errors.Is(err, dlq.ErrNoLetter) {
			return resultRow{Name: name, Status: "gone", Message: "Somebody was quicker.", OK: true}
		}
		return rowOf(name, "", Done{Status: "removed", OK: true}, err)
	})
	r.Title = summary("Removed", "dead letter", r)
	if strings.HasPrefix(q.view.Path, "/letters/") {
		q.view.Path = "/letters"
	}
	q.finish(r)
}

// maxPause is the longest pause that is asked for by its length.
const maxPause = 30 * 24 * time.Hour

// changeQueue pauses or resumes a queue.
func (s *Server) changeQueue(q *request) {
	name := q.form.Get("queue")
	if name == "" || len(name) > maxValue {
		q.fail(http.StatusBadRequest, "No queue was named.", "Nothing was changed.")
		return
	}
	r := &result{}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx), oneTime)
	defer cancel()
	if strings.HasSuffix(q.r.URL.Path, "/pause") {
		length := time.Duration(0)
		if text := q.form.Get("for"); text != "" {
			var err error
			if length, err = time.ParseDuration(text); err != nil || length <= 0 || length > maxPause {
				q.fail(http.StatusBadRequest, "This is not a length of time.", "Nothing was changed. Want something such as 30m or 2h, at most 720h.")
				return
			}
		}
		until, err := s.o.Actor.Pause(ctx, name, length)
		r.add(rowOf("Queue "+name, "", Done{Status: "paused", Message: paused(q.view.Now, until), OK: true}, err))
	} else {
		was, err := s.o.Actor.Resume(ctx, name)
		done := Done{Status: "resumed", OK: true}
		if !was {
			done = Done{Status: "not paused", OK: true}
		}
		r.add(rowOf("Queue "+name, "", done, err))
	}
	r.Title = single(r)
	q.finish(r)
}

// single is the title of a result of one row.
func single(r *result) string {
	if len(r.Rows) != 1 {
		return ""
	}
	row := r.Rows[0]
	return sentence(row.Name + ": " + row.Status)
}

// changeCircuit probes or closes a circuit.
func (s *Server) changeCircuit(q *request) {
	app, region := q.form.Get("app"), q.form.Get("region")
	if app == "" || len(app) > maxValue || len(region) > maxValue {
		q.fail(http.StatusBadRequest, "No app was named.", "Nothing was changed.")
		return
	}
	closing := strings.HasSuffix(q.r.URL.Path, "/close")
	name := "Circuit of app " + app
	if region != "" {
		name += " in " + region
	}
	if closing && !q.sure() {
		q.confirm(confirmData{
			Question: "Close the circuit of app " + app + "?", Button: "Close the circuit",
			Warning: "Its jobs are started again at once, the held ones within a minute. If what opened it is not solved, they fail again, and it opens again. To try one job first, probe it.",
			Fields:  []hiddenField{{"app", app}, {"region", region}},
		})
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx), oneTime)
	defer cancel()
	r := &result{}
	if closing {
		r.add(rowOf(name, "", Done{Status: "closed", OK: true}, s.o.Actor.CloseCircuit(ctx, app, region)))
	} else {
		job, err := s.o.Actor.Probe(ctx, app, region)
		done := Done{Status: "probing", Message: "its next job is let through", OK: true}
		href := ""
		if job != "" {
			done.Message, href = "job "+job+" is let through", "/jobs/"+job
		}
		r.add(rowOf(name, href, done, err))
	}
	r.Title = single(r)
	q.finish(r)
}

// drain has a worker end.
func (s *Server) drain(q *request) {
	id := q.form.Get("worker")
	if id == "" || len(id) > maxValue {
		q.fail(http.StatusBadRequest, "No worker was named.", "Nothing was changed.")
		return
	}
	if !q.sure() {
		q.confirm(confirmData{
			Question: "Drain worker " + id + "?", Button: "Drain the worker", Danger: true,
			Warning: "It takes nothing new, finishes what runs within its drain time, hands back the rest and ends. What supervises it may start it again.",
			Fields:  []hiddenField{{"worker", id}},
		})
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx), oneTime)
	defer cancel()
	r := &result{}
	running, err := s.o.Actor.Drain(ctx, id)
	if errors.Is(err, operate.ErrNoWorker) {
		err = fmt.Errorf("it does not answer: it has ended, or can't reach NATS")
	}
	r.add(rowOf("Worker "+id, "", Done{Status: "draining", Message: count(running, "job") + " in hand", OK: true}, err))
	r.Title = single(r)
	q.finish(r)
}
