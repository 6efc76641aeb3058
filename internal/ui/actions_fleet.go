package ui

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/operate"
)

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
			Warning: "Its jobs are started again: new ones at once, the held ones as their waits end, which takes up to half an hour if very many wait. If what opened it is not solved, they fail again, and it opens again. To try one job first, probe it.",
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
	r.add(rowOf("Worker "+id, "", Done{Status: "draining", Message: count(running, "slot") + " in use", OK: true}, err))
	r.Title = single(r)
	q.finish(r)
}
