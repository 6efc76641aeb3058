package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

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

func (c *cli) printQueues(f *status.Fleet) error {
	if err := c.heading("Queues"); err != nil {
		return err
	}
	if len(f.Queues) == 0 {
		_, err := fmt.Fprintln(c.stdout, "none")
		return err
	}
	atLeast, atMost := "", ""
	if !f.CountedAll {
		atLeast, atMost = "≥", "≤"
	}
	t := terminal.NewTable(c.stdout, "QUEUE", "WORKERS", "WAITING", "OLDEST WAITS", "RUNNING", "RETRYING", "HELD", "RELEASED", "PAUSED")
	for _, q := range f.Queues {
		paused := "-"
		if !q.PausedUntil.IsZero() {
			paused = pausedText(f.At, q.PausedUntil)
		}
		n := func(count int) string { return fmt.Sprintf("%s%d", atLeast, count) }
		t.Row(q.Name, q.Served, fmt.Sprintf("%s%d", atMost, q.Waiting), terminal.Ago(f.At, q.OldestWaiting), n(q.Running), n(q.Retrying), n(q.Held), n(q.Released), paused)
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
