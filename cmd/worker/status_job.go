package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

func (c *cli) jobStatus(ctx context.Context, l *link, store *status.Store, id string, asJSON bool) error {
	j, err := store.Job(ctx, id)
	switch {
	case errors.Is(err, status.ErrNoJob):
		return err
	case err != nil:
		return l.names.Unavailable("job "+id, err)
	case asJSON:
		return c.printJSON(j)
	case j.Waiting != nil:
		return c.printWaiting(ctx, store, id, j.Waiting)
	}
	if j.Record != nil {
		if err := c.printRecord(j.Record, j.Deadline()); err != nil {
			return err
		}
	}
	if err := c.heading("\nHistory"); err != nil {
		return err
	}
	if err := c.printHistory(j, id); err != nil {
		return err
	}
	if len(j.History)+len(j.Replays) == 0 {
		if _, err := fmt.Fprintln(c.stdout, "none is kept"); err != nil {
			return err
		}
	}
	if !j.Whole {
		c.note("looking for error events took longer than --count-for: some may be missing")
	}
	if err := c.printCost(j.Cost); err != nil {
		return err
	}
	switch {
	case j.Record == nil:
		return nil
	case j.NextRun != nil:
		if err := c.heading(fmt.Sprintf("\nRun %d", j.NextRun.Run)); err != nil {
			return err
		}
		return c.printWaiting(ctx, store, id, j.NextRun)
	case j.LetterGone:
		_, err := fmt.Fprintln(c.stdout, "\nIts dead letter is gone: it was removed, or has aged out. To run it again, publish it under another id.")
		return err
	}
	list := advise(j.Record)
	if until := j.PausedUntil; !until.IsZero() {
		list = slices.Insert(list, 0, "Its queue is paused "+pausedText(c.now(), until)+", and it is not tried before: avatarworker queue resume "+j.Record.Queue)
	}
	for i, advice := range list {
		advice = terminal.Plain(advice)
		if i == 0 {
			advice = "\n" + advice
		}
		if _, err := fmt.Fprintln(c.stdout, advice); err != nil {
			return err
		}
	}
	return nil
}

// printHistory shows a job's events and its replays in the order of time. Where it had
// several runs, each line says which one it is about.
func (c *cli) printHistory(j *status.Job, id string) error {
	several := len(j.Replays) > 0
	runs := make([]int, len(j.History))
	for i, e := range j.History {
		var body struct {
			Run int `json:"run"`
		}
		_ = json.Unmarshal(e.Data, &body) // another's message has none
		runs[i] = body.Run
		several = several || body.Run > 1
	}
	replays := slices.Clone(j.Replays)
	for i, e := range j.History {
		for len(replays) > 0 && (runs[i] >= replays[0].Run || replays[0].At.Before(e.Time) && runs[i] == 0) {
			if err := c.printReplay(replays[0], id); err != nil {
				return err
			}
			replays = replays[1:]
		}
		run := ""
		if several && runs[i] > 0 {
			run = fmt.Sprintf("run %d: ", runs[i])
		}
		if _, err := fmt.Fprintln(c.stdout, c.eventLine(c.stdout, e, run)); err != nil {
			return err
		}
	}
	for _, r := range replays {
		if err := c.printReplay(r, id); err != nil {
			return err
		}
	}
	return nil
}

// printReplay shows a replay as a line of the history.
func (c *cli) printReplay(r dlq.ReplayedRun, id string) error {
	text := fmt.Sprintf("run %d: from dead letter %d", r.Run, r.DeadLetter)
	name := "replayed"
	if r.Corrected != "" {
		name = "corrected"
		text += fmt.Sprintf("; the original: avatarworker dlq show --original %s --run %d (%s)", id, r.Run, r.Corrected)
	}
	at := "-"
	if !r.At.IsZero() {
		at = r.At.UTC().Format(eventTime)
	}
	_, err := fmt.Fprintf(c.stdout, "%-*s  %-22s %s  %s\n", len(eventTime), at, name, id, text)
	return err
}

// printCost shows what a job's sessions cost so far.
func (c *cli) printCost(cost status.Cost) error {
	if cost.Sessions == 0 && cost.SessionMS == 0 && cost.Estimated == 0 {
		return nil
	}
	connected := func(ms int64) time.Duration {
		return (time.Duration(ms) * time.Millisecond).Round(100 * time.Millisecond)
	}
	text := fmt.Sprintf("\nCost: %s, %s connected, at least %s",
		terminal.Count(cost.Sessions, "session"), connected(cost.SessionMS), terminal.Count(int(cost.Credits), "credit"))
	if cost.Estimated > 0 {
		text += fmt.Sprintf("; and %s lost with its worker, at most %s and %s",
			terminal.Count(cost.Estimated, "session"), connected(cost.EstimatedMS), terminal.Count(int(cost.EstimatedCredits), "credit"))
	}
	_, err := fmt.Fprintln(c.stdout, text)
	return err
}

// advise names the commands that help with a job in its present state.
func advise(r *lifecycle.Record) []string {
	id := r.JobID
	switch r.State {
	case lifecycle.StateDeadLettered:
		return []string{
			"Its dead letter: avatarworker dlq show --job " + id,
			"To run it again: avatarworker dlq replay --job " + id + " (--set PATH=VALUE corrects it)",
		}
	case lifecycle.StateHeld, lifecycle.StateRetrying:
		advice := []string{"To run it now: avatarworker retry " + id}
		if r.State == lifecycle.StateHeld && r.HeldReason == lifecycle.HeldCircuit {
			advice[0] += " --probe (its circuit is open: avatarworker circuit ls)"
		}
		if r.State == lifecycle.StateHeld && r.HeldReason == lifecycle.HeldBudget {
			advice[0] = "To run it at once when the budget is raised: avatarworker retry " + id
		}
		return append(advice, "To end it: avatarworker cancel "+id)
	case lifecycle.StateRunning:
		return []string{"To end it: avatarworker cancel " + id}
	case lifecycle.StateCompleted:
		if r.Recording != "" {
			return []string{"Its recording: avatarworker recording get " + r.Recording}
		}
	}
	return nil
}

// printWaiting shows a job that has no record, and what it waits for.
func (c *cli) printWaiting(ctx context.Context, store *status.Store, id string, w *status.Waiting) error {
	t := terminal.NewTable(c.stdout)
	t.Row("job", id)
	if w.Delivered {
		t.Row("state", "waiting: delivered, and handed back without a session")
		t.Row("waits for", w.WaitsFor)
	} else {
		t.Row("state", "waiting: not delivered to a worker yet")
	}
	if w.CancelRequested {
		t.Row("cancel", "requested: it ends when a worker has it next")
	}
	t.Row("queue", w.Queue)
	if w.AppID != "" {
		t.Row("app", w.AppID)
	}
	if w.AvatarID != "" {
		t.Row("avatar", w.AvatarID)
	}
	t.Row("published", terminal.When(c.now(), w.Published))
	for _, name := range slices.Sorted(maps.Keys(w.Labels)) {
		t.Row("label "+name, w.Labels[name])
	}
	if q, err := store.Queue(ctx, w.Queue); err != nil {
		c.note("the state of its queue could not be read: %s", terminal.Plain(err.Error()))
	} else if q != nil {
		t.Row("open jobs of the queue", q.Open())
		t.Row("workers of the queue", q.Served)
		switch {
		case !q.PausedUntil.IsZero():
			t.Row("what to do", "the queue is paused "+pausedText(c.now(), q.PausedUntil)+": avatarworker queue resume "+q.Name)
		case q.Served == 0:
			t.Row("what to do", "no worker serves the queue: start one with worker.queues "+q.Name)
		}
	}
	return t.Flush()
}

func (c *cli) printRecord(r *lifecycle.Record, deadline *time.Time) error {
	t := terminal.NewTable(c.stdout)
	row := func(name string, value any) {
		if text := fmt.Sprint(value); text != "" && text != "0" {
			t.Row(name, text)
		}
	}
	row("job", r.JobID)
	if r.StreamSeq == 0 {
		row("state", "not published yet: its cancel is noted, and ends it when a worker has it")
	} else {
		row("state", r.State)
	}
	row("run", r.Run)
	row("queue", r.Queue)
	row("app", r.AppID)
	row("avatar", r.AvatarID)
	row("region", r.Region)
	row("attempt", tries(r.Attempt, r.MaxAttempts))
	row("session", r.Session)
	row("crashes", r.Crashes)
	row("utterances done", r.UtterancesDone)
	row("worker", r.WorkerID)
	if r.State == lifecycle.StateRunning {
		row("running since", terminal.When(c.now(), r.StartedAt))
	}
	row("connection", r.ConnectionID)
	row("recording", r.Recording)
	row("published", terminal.When(c.now(), r.PublishedAt))
	row("deadline", whole(deadline))
	row("last change", terminal.When(c.now(), r.UpdatedAt))
	row("next attempt", nextAttempt(c.now(), r))
	switch {
	case r.CancelThrough > r.Run:
		row("cancel", fmt.Sprintf("requested for run %d", r.CancelThrough))
	case r.CancelRequested && !r.State.Final():
		row("cancel", "requested")
	}
	why, remedy := status.HeldBecause(r)
	row("held because", why)
	row("  what to do", remedy)
	if r.Unsettled > 1 && !r.State.Final() {
		row("sessions without a result", fmt.Sprintf("%d in a row", r.Unsettled))
	}
	if r.Recorded != nil {
		row("recorded", terminal.Count(r.Recorded.Utterances, "utterance"))
	}
	row("reason", status.ReleasedBecause(r))
	for _, name := range slices.Sorted(maps.Keys(r.Labels)) {
		row("label "+name, r.Labels[name])
	}
	if e := r.LastError; e != nil {
		row("last error", fmt.Sprintf("%s (%s) in %s: %s", e.Code, e.Class, e.Phase, status.Cause(e.Message, e.ServerTitle, e.ServerDetail)))
		x := errors.Explain(e.Code)
		if r.State == lifecycle.StateDeadLettered {
			x = errors.ExplainGivenUp(e.Code)
		}
		row("  meaning", x.Meaning)
		row("  what to do", x.Remedy)
	}
	return t.Flush()
}

// nextAttempt is when a job that waits has its next attempt. A job that stays held
// is delivered again and again without a new record, so its time may have passed.
func nextAttempt(now time.Time, r *lifecycle.Record) string {
	switch {
	case r.NextAttemptAt == nil || r.State.Final():
		return ""
	case r.State == lifecycle.StateHeld && r.NextAttemptAt.Before(now):
		return "still held: checked again within a minute, or later where many wait"
	}
	return r.NextAttemptAt.UTC().Format(time.RFC3339)
}

func tries(n, most int) string {
	switch {
	case n == 0:
		return ""
	case most == 0:
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d of at most %d", n, most)
}
