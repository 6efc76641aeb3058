package ui

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

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
