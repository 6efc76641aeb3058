package ui

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
)

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

// replayed is what became of one letter.
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
			return resultRow{Name: name, Status: "gone", Message: "It was removed or replayed meanwhile.", OK: true}
		}
		return rowOf(name, "", Done{Status: "removed", OK: true}, err)
	})
	r.Title = summary("Removed", "dead letter", r)
	if strings.HasPrefix(q.view.Path, "/letters/") {
		q.view.Path = "/letters"
	}
	q.finish(r)
}
