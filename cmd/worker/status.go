package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

func newStatusCommand(c *cli) *cobra.Command {
	var (
		asJSON, watch bool
		every         time.Duration
		countFor      time.Duration
	)
	cmd := &cobra.Command{
		Use: "status [JOB]", Short: "Show the state of a job, or of the whole fleet", Args: argCount(0, 1),
		Long: `With a JOB: its record, and its events and errors in order.

Without: the queues, workers, circuits, and dead letters by code.
  queues    WAITING: jobs never delivered. DELIVERED: jobs delivered and without an
            outcome; the next columns say in which state they are. A queue with
            jobs but no worker is listed too.
  workers   SESSIONS: open now. SLOTS: jobs at a time.
Job records are read newest first, for --count-for at most. Where that was too
short, the numbers begin with "≥". With --watch all records are read once, and after
that only what is new.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if err := checkJobID(args[0]); err != nil {
					return err
				}
			}
			if every < minEvery {
				return usagef("--every %s: want at least %s", every, minEvery)
			}
			l, err := c.connect(cmd.Context(), "status")
			if err != nil {
				return err
			}
			defer l.close()
			store := status.NewStore(l.js, l.names, c.now, countFor).WithTariff(app.Tariff(l.cfg)).WithBudgets(fleetBudgets(l.cfg, l.js, l.names, c.now))
			show := func(c *cli) error { return c.fleetStatus(cmd.Context(), l, store, asJSON) }
			if len(args) == 1 {
				show = func(c *cli) error { return c.jobStatus(cmd.Context(), l, store, args[0], asJSON) }
			}
			switch {
			case watch && len(args) == 0:
				return c.watchFleet(cmd.Context(), l, store, every, asJSON)
			case watch:
				return c.watch(cmd.Context(), every, asJSON, show)
			}
			return show(c)
		},
		ValidArgsFunction: c.completeJobs(nil),
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again and again until interrupted; on a terminal it is redrawn")
	cmd.Flags().DurationVar(&every, "every", 2*time.Second, "with --watch: the `TIME` between two looks")
	jsonFlag(cmd, &asJSON)
	cmd.Flags().DurationVar(&countFor, "count-for", status.DefaultCountFor, "longest `TIME` for reading records or error events")
	return cmd
}

// minEvery is the shortest time between two looks.
const minEvery = 200 * time.Millisecond

// watch shows something again and again until ctx ends. On a terminal each time
// replaces the last one, at once: it is drawn when it is whole. An error ends it,
// unless something was shown before: NATS may be away for a while.
func (c *cli) watch(ctx context.Context, every time.Duration, asJSON bool, show func(*cli) error) error {
	redraw := terminal.Is(c.stdout) && !asJSON
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for shown := false; ; {
		var picture bytes.Buffer
		drawer := *c
		drawer.stdout, drawer.colours = &picture, c.coloured(c.stdout)
		err := show(&drawer)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !shown:
			return err
		case err != nil:
			c.note("%s", terminal.PlainLines(err.Error()))
		default:
			shown = true
			before := ""
			if redraw {
				before = "\x1b[H\x1b[2J"
			}
			if _, err := fmt.Fprintf(c.stdout, "%s%s", before, picture.Bytes()); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// watchFleet shows the fleet from memory: with each look only what is new is read.
func (c *cli) watchFleet(ctx context.Context, l *link, store *status.Store, every time.Duration, asJSON bool) error {
	model := status.NewModel(store, every)
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { model.Run(ctx) })
	defer running.Wait()
	defer cancel()
	return c.watch(ctx, every, asJSON, func(c *cli) error {
		err := c.fleetStatus(ctx, l, model, asJSON)
		if f := model.Freshness(); err == nil && f.Error != "" && ctx.Err() == nil {
			return fmt.Errorf("the state is that of %s: %s", f.At.Format(time.RFC3339), f.Error)
		}
		return err
	})
}

// fleetReader is a status.Store or a status.Model.
type fleetReader interface {
	Fleet(ctx context.Context) (*status.Fleet, error)
}

func (c *cli) fleetStatus(ctx context.Context, l *link, store fleetReader, asJSON bool) error {
	f, err := store.Fleet(ctx)
	if err != nil {
		return l.names.Unavailable("stream "+l.names.JobsStream(), err)
	}
	if asJSON {
		return c.printJSON(f)
	}
	if err := errors.Join(c.printQueues(f), c.printWorkers(f), c.printCircuits(f), c.printBudgets(f), c.printCounts(f), c.printStorage(f)); err != nil {
		return err
	}
	for _, w := range f.Warnings {
		if _, err := fmt.Fprintf(c.stdout, "\n%s %s\n", c.colour(c.stdout, terminal.Yellow, "warning:"), terminal.Plain(w)); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) heading(text string) error {
	_, err := fmt.Fprintln(c.stdout, c.colour(c.stdout, terminal.Bold, text))
	return err
}

func (c *cli) printQueues(f *status.Fleet) error {
	if err := c.heading("Queues"); err != nil {
		return err
	}
	if len(f.Queues) == 0 {
		_, err := fmt.Fprintln(c.stdout, "none")
		return err
	}
	atLeast := ""
	if !f.CountedAll {
		atLeast = "≥"
	}
	t := terminal.NewTable(c.stdout, "QUEUE", "WORKERS", "WAITING", "OLDEST WAITS", "DELIVERED", "RUNNING", "RETRYING", "HELD", "RELEASED", "PAUSED")
	for _, q := range f.Queues {
		paused := "-"
		if !q.PausedUntil.IsZero() {
			paused = pausedText(f.At, q.PausedUntil)
		}
		n := func(count int) string { return fmt.Sprintf("%s%d", atLeast, count) }
		t.Row(q.Name, q.Served, q.Waiting, terminal.Ago(f.At, q.OldestWaiting), q.Taken, n(q.Running), n(q.Retrying), n(q.Held), n(q.Released), paused)
	}
	return t.Flush()
}

func (c *cli) printWorkers(f *status.Fleet) error {
	if err := c.heading("\nWorkers"); err != nil {
		return err
	}
	if len(f.Workers) == 0 {
		_, err := fmt.Fprintln(c.stdout, "none")
		return err
	}
	t := terminal.NewTable(c.stdout, "WORKER ID", "STATE", "SESSIONS", "SLOTS", "QUEUES", "UP FOR", "LAST SEEN", "VERSION")
	for _, w := range f.Workers {
		t.Row(w.WorkerID, workerState(w), w.Running, w.Slots, weights(w.Queues), terminal.Ago(f.At, w.StartedAt), terminal.Ago(f.At, w.At)+" ago", terminal.OrDash(w.Version))
	}
	return t.Flush()
}

func workerState(w status.Worker) string {
	switch {
	case w.Lost:
		return "lost"
	case w.Draining:
		return "draining"
	case w.NotReady != "":
		return "not ready"
	}
	return "up"
}

// weights lists queues as the configuration does.
func weights(queues map[string]int) string {
	var texts []string
	for _, name := range slices.Sorted(maps.Keys(queues)) {
		text := name
		if w := queues[name]; w != 1 {
			text = fmt.Sprintf("%s:%d", name, w)
		}
		texts = append(texts, text)
	}
	return terminal.OrDash(strings.Join(texts, ","))
}

func (c *cli) printCircuits(f *status.Fleet) error {
	if len(f.Circuits) == 0 {
		return nil
	}
	if err := c.heading("\nCircuits"); err != nil {
		return err
	}
	return c.printCircuitTable(f.At, f.Circuits)
}

func (c *cli) printCircuitTable(now time.Time, list []circuit.Circuit) error {
	t := terminal.NewTable(c.stdout, "APP", "REGION", "STATE", "OPENED BY", "OPEN FOR", "NEXT PROBE")
	for _, cc := range list {
		t.Row(cc.App, cc.Region, cc.State, cc.Code, terminal.Ago(now, cc.OpenedAt), cc.RetryAt.UTC().Format(time.RFC3339))
	}
	return t.Flush()
}

// printBudgets shows the budgets that are spent.
func (c *cli) printBudgets(f *status.Fleet) error {
	if len(f.Budgets) == 0 {
		return nil
	}
	if err := c.heading("\nBudgets that are spent"); err != nil {
		return err
	}
	atLeast := ""
	if !f.CountedAll {
		atLeast = "≥"
	}
	t := terminal.NewTable(c.stdout, "KEY", "VALUE", "PER", "CREDITS", "SPENT", "HELD JOBS", "UNTIL")
	for _, b := range f.Budgets {
		t.Row(b.Key, terminal.OrDash(b.Value), b.Per, b.Credits, b.Spent, fmt.Sprintf("%s%d", atLeast, b.Held), b.Until.Format(time.RFC3339))
	}
	return t.Flush()
}

// fleetBudgets reads the budgets of a configuration; nil: it has none.
func fleetBudgets(cfg *config.Config, js jetstream.JetStream, names topology.Names, now func() time.Time) status.Budgets {
	rules := app.Budgets(cfg)
	if len(rules) == 0 {
		return nil
	}
	store := cost.NewStore(js, names, cfg.TotalLabels())
	return func(ctx context.Context) ([]budget.Spending, error) {
		list, err := store.Budgets(ctx, rules, now().UTC())
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrBucketNotFound) {
			return nil, nil // no worker has run yet, so nothing is spent
		}
		return list, err
	}
}

func (c *cli) printCounts(f *status.Fleet) error {
	if err := c.heading("\nDead letters"); err != nil {
		return err
	}
	if len(f.DeadLetters) == 0 {
		_, err := fmt.Fprintln(c.stdout, "none")
		return err
	}
	t := terminal.NewTable(c.stdout, "COUNT", "CODE", "CLASS", "OWNER", "TO SEE ONE")
	for _, n := range f.DeadLetters {
		t.Row(n.Letters, n.Code, n.Class, terminal.OrDash(errors.Explain(n.Code).Owner), fmt.Sprintf("avatarworker dlq show --code %s", n.Code))
	}
	return t.Flush()
}

func (c *cli) printStorage(f *status.Fleet) error {
	if err := c.heading("\nStorage"); err != nil {
		return err
	}
	t := terminal.NewTable(c.stdout, "KEPT IN", "MESSAGES", "BYTES", "LIMIT", "FULL")
	for _, s := range f.Storage {
		limit, full := "none", "-"
		if s.MaxBytes > 0 {
			limit, full = terminal.Size(s.MaxBytes), fmt.Sprintf("%.0f %%", 100*s.Fill)
		}
		t.Row(s.Object, s.Messages, terminal.Size(s.Bytes), limit, full)
	}
	return t.Flush()
}

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
		if err := c.printRecord(j.Record); err != nil {
			return err
		}
	}
	if err := c.heading("\nHistory"); err != nil {
		return err
	}
	for _, e := range j.History {
		if err := c.printEvent(e); err != nil {
			return err
		}
	}
	if len(j.History) == 0 {
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
	for _, advice := range advise(j.Record) {
		if _, err := fmt.Fprintln(c.stdout, terminal.Plain(advice)); err != nil {
			return err
		}
	}
	return nil
}

// printCost shows what a job's sessions cost so far.
func (c *cli) printCost(cost status.Cost) error {
	if cost.Sessions == 0 && cost.SessionMS == 0 {
		return nil
	}
	_, err := fmt.Fprintf(c.stdout, "\nCost: %s, %s connected, at least %s\n",
		terminal.Count(cost.Sessions, "session"), (time.Duration(cost.SessionMS) * time.Millisecond).Round(100*time.Millisecond), terminal.Count(int(cost.Credits), "credit"))
	return err
}

// advise names the commands that help with a job in its present state.
func advise(r *lifecycle.Record) []string {
	id := r.JobID
	switch r.State {
	case lifecycle.StateDeadLettered:
		return []string{
			"\nIts dead letter: avatarworker dlq show --job " + id,
			"To run it again: avatarworker dlq replay --job " + id + " (--set PATH=VALUE corrects it)",
		}
	case lifecycle.StateHeld, lifecycle.StateRetrying:
		advice := []string{"\nTo run it now: avatarworker retry " + id}
		if r.State == lifecycle.StateHeld && r.HeldReason == lifecycle.HeldCircuit {
			advice[0] += " --probe (its circuit is open: avatarworker circuit ls)"
		}
		return append(advice, "To end it: avatarworker cancel "+id)
	case lifecycle.StateRunning:
		return []string{"\nTo end it: avatarworker cancel " + id}
	case lifecycle.StateCompleted:
		if r.Recording != "" {
			return []string{"\nIts recording: avatarworker recording get " + r.Recording}
		}
	}
	return nil
}

// printWaiting shows a job that no worker has taken yet, and what it waits for.
func (c *cli) printWaiting(ctx context.Context, store *status.Store, id string, w *status.Waiting) error {
	t := terminal.NewTable(c.stdout)
	t.Row("job", id)
	t.Row("state", "waiting: not delivered to a worker yet")
	t.Row("queue", w.Queue)
	t.Row("published", terminal.When(c.now(), w.Published))
	if f, err := store.Fleet(ctx); err != nil {
		c.note("how its queue stands could not be read: %s", terminal.Plain(err.Error()))
	} else {
		for _, q := range f.Queues {
			if q.Name != w.Queue {
				continue
			}
			t.Row("waiting in the queue", q.Waiting)
			t.Row("workers of the queue", q.Served)
			switch {
			case !q.PausedUntil.IsZero():
				t.Row("what to do", "the queue is paused "+pausedText(f.At, q.PausedUntil)+": avatarworker queue resume "+q.Name)
			case q.Served == 0:
				t.Row("what to do", "no worker serves the queue: start one with worker.queues "+q.Name)
			}
		}
	}
	return t.Flush()
}

func (c *cli) printRecord(r *lifecycle.Record) error {
	t := terminal.NewTable(c.stdout)
	row := func(name string, value any) {
		if text := fmt.Sprint(value); text != "" && text != "0" {
			t.Row(name, text)
		}
	}
	row("job", r.JobID)
	row("state", r.State)
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
	row("last change", terminal.When(c.now(), r.UpdatedAt))
	row("next attempt", nextAttempt(c.now(), r))
	if r.CancelRequested && !r.State.Final() {
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
