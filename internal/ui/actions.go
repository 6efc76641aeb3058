package ui

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
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

// rowOf is the row of what became of one thing.
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
