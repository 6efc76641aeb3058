package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/operate"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

// Statuses of queues, circuits and workers that were changed.
const (
	statusPaused    = "paused"
	statusResumed   = "resumed"
	statusNotPaused = "not_paused"
	statusProbing   = "probing"
	statusClosed    = "closed"
	statusNotOpen   = "not_open"
	statusDraining  = "draining"
	statusEmpty     = "empty"
)

func newQueueCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "queue", Short: "List, pause and resume queues", Args: noArgs, RunE: showHelp}
	var asJSON bool
	ls := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List queues", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.listQueues(cmd.Context(), asJSON) },
	}
	jsonFlag(ls, &asJSON)
	cmd.AddCommand(ls, newQueuePauseCommand(c), newQueueResumeCommand(c))
	return cmd
}

func (c *cli) completeQueues(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return c.queueNames(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) listQueues(ctx context.Context, asJSON bool) error {
	l, err := c.connect(ctx, "queue ls")
	if err != nil {
		return err
	}
	defer l.close()
	f, err := status.NewStore(l.js, l.names, c.now, 0).Fleet(ctx)
	if err != nil {
		return l.names.Unavailable("stream "+l.names.JobsStream(), err)
	}
	if asJSON {
		for _, q := range f.Queues {
			if err := c.printLine(q); err != nil {
				return err
			}
		}
		return nil
	}
	return c.printQueues(f)
}

// changedQueue is what became of a queue.
type changedQueue struct {
	Queue  string    `json:"queue"`
	Status string    `json:"status"`
	Until  time.Time `json:"until,omitzero"` // zero: until it is resumed
	Error  string    `json:"error,omitempty"`
}

func newQueuePauseCommand(c *cli) *cobra.Command {
	var (
		length      time.Duration
		yes, asJSON bool
	)
	cmd := &cobra.Command{
		Use: "pause NAME…", Short: "Stop the deliveries of queues", Args: argCount(1, -1),
		Long: `Stops the deliveries of queues: none of their jobs is started or tried again until
the pause ends or 'queue resume' ends it. Running jobs go on. Workers stay ready.
If a queue is paused already, the new time replaces the old one. --json has "until"
only with --for.`,
		ValidArgsFunction: c.completeQueues,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("for") && length <= 0 {
				return usagef("--for %s: want a duration such as 30m", length)
			}
			if length == 0 {
				length = operate.Forever
			}
			return c.changeQueues(cmd.Context(), "Pause", args, yes, asJSON, func(ctx context.Context, o *operate.Operator, queue string) (changedQueue, error) {
				until, err := o.Pause(ctx, queue, length)
				q := changedQueue{Queue: queue, Status: statusPaused}
				if length != operate.Forever {
					q.Until = until.Truncate(time.Second)
				}
				return q, err
			})
		},
	}
	cmd.Flags().DurationVar(&length, "for", 0, "end the pause after this `TIME` (default: it ends with 'queue resume')")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before more than one is changed")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func newQueueResumeCommand(c *cli) *cobra.Command {
	var yes, asJSON bool
	cmd := &cobra.Command{
		Use: "resume NAME…", Short: "End the pause of queues", Args: argCount(1, -1),
		ValidArgsFunction: c.completeQueues,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.changeQueues(cmd.Context(), "Resume", args, yes, asJSON, func(ctx context.Context, o *operate.Operator, queue string) (changedQueue, error) {
				was, err := o.Resume(ctx, queue)
				if !was {
					return changedQueue{Queue: queue, Status: statusNotPaused}, err
				}
				return changedQueue{Queue: queue, Status: statusResumed}, err
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before more than one is changed")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) changeQueues(ctx context.Context, verb string, queues []string, yes, asJSON bool, change func(context.Context, *operate.Operator, string) (changedQueue, error)) error {
	for _, queue := range queues {
		if err := topology.ValidQueue(queue); err != nil {
			return usagef("%v", err)
		}
	}
	l, o, err := c.operator(ctx, "queue")
	if err != nil {
		return err
	}
	defer l.close()
	if len(queues) > 1 && !yes && c.interactive() {
		if err := c.sure(ctx, fmt.Sprintf("%s %s?", verb, terminal.Count(len(queues), "queue"))); err != nil {
			return err
		}
	}
	failed := false
	for _, queue := range queues {
		q, err := change(ctx, o, queue)
		if err != nil {
			failed, q = true, changedQueue{Queue: queue, Status: statusFailed, Error: err.Error()}
		}
		if err := c.printQueue(q, asJSON); err != nil {
			return err
		}
	}
	if failed {
		return errShown
	}
	return nil
}

func (c *cli) printQueue(q changedQueue, asJSON bool) error {
	if asJSON {
		return c.printLine(q)
	}
	text := q.Queue + "  " + q.Status
	if q.Status == statusPaused {
		text += " " + pausedText(c.now(), q.Until)
	}
	if q.Error != "" {
		text += ": " + q.Error
	}
	_, err := fmt.Fprintln(c.stdout, terminal.Plain(text))
	return err
}

// pausedText says until when a queue is paused.
func pausedText(now, until time.Time) string {
	if until.IsZero() || until.Sub(now) > operate.Forever/2 {
		return "until it is resumed"
	}
	return "until " + until.UTC().Format(time.RFC3339)
}

// operator connects, and opens what operators change.
func (c *cli) operator(ctx context.Context, command string) (*link, *operate.Operator, error) {
	l, err := c.connect(ctx, command)
	if err != nil {
		return nil, nil, err
	}
	o, err := l.operator(ctx)
	if err != nil {
		l.close()
		return nil, nil, err
	}
	return l, o, nil
}

func newDrainCommand(c *cli) *cobra.Command {
	var wait, yes, asJSON bool
	cmd := &cobra.Command{
		Use: "drain WORKER…", Short: "Drain workers, as SIGTERM does", Args: argCount(1, -1),
		Long: `Asks workers, by their ids as 'avatarworker status' lists them, to drain. The name
of a worker (worker.name) also works if only one of that name runs. They take
no new jobs, let sessions finish within worker.drain_timeout, hand back the rest, and
end with exit code 0. A supervisor may start them again.`,
		ValidArgsFunction: c.completeWorkers,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.drain(cmd.Context(), args, wait, yes, asJSON)
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until they have ended")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before more than one is changed")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) completeWorkers(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var ids []string
	c.lookUp(cmd.Context(), func(ctx context.Context, l *link) {
		workers, err := status.NewStore(l.js, l.names, c.now, 0).Workers(ctx)
		if err != nil {
			return
		}
		for _, w := range workers {
			ids = append(ids, w.WorkerID)
		}
	})
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// workerIDs are the ids of the workers that were named, by id or by a name that only one
// running worker has. What is neither is left as it is.
func (l *link) workerIDs(ctx context.Context, c *cli, named []string) ([]string, error) {
	workers, err := status.NewStore(l.js, l.names, c.now, 0).Workers(ctx)
	if err != nil {
		return named, nil //nolint:nilerr // ids need no list
	}
	ids := make([]string, len(named))
	for i, name := range named {
		var list []string
		for _, w := range workers {
			if w.WorkerID == name {
				list = []string{name}
				break
			}
			if w.Presence.Worker == name && !w.Lost {
				list = append(list, w.WorkerID)
			}
		}
		switch len(list) {
		case 0:
			ids[i] = name
		case 1:
			ids[i] = list[0]
		default:
			return nil, usagef("%d workers have the name %s: give an id, one of %s", len(list), name, strings.Join(list, ", "))
		}
	}
	return ids, nil
}

// drainedWorker is what became of a worker.
type drainedWorker struct {
	operate.Draining
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

func (c *cli) drain(ctx context.Context, ids []string, wait, yes, asJSON bool) error {
	l, o, err := c.operator(ctx, "drain")
	if err != nil {
		return err
	}
	defer l.close()
	if len(ids) > 1 && !yes && c.interactive() {
		if err := c.sure(ctx, fmt.Sprintf("Drain %s?", terminal.Count(len(ids), "worker"))); err != nil {
			return err
		}
	}
	if ids, err = l.workerIDs(ctx, c, ids); err != nil {
		return err
	}
	failed := false
	report := func(d drainedWorker) error {
		failed = failed || d.Error != ""
		if asJSON {
			return c.printLine(d)
		}
		text := d.WorkerID + "  " + d.Status
		switch {
		case d.Error != "":
			text += ": " + d.Error
		case d.Status == statusDraining:
			text += ", " + terminal.Count(d.Running, "slot") + " in use"
		}
		_, err := fmt.Fprintln(c.stdout, terminal.Plain(text))
		return err
	}
	var draining []string
	for _, id := range ids {
		d := drainedWorker{Status: statusDraining}
		if d.Draining, err = o.Drain(ctx, id); err != nil {
			d = drainedWorker{Draining: operate.Draining{WorkerID: id}, Status: statusFailed, Error: err.Error()}
		} else {
			draining = append(draining, id)
		}
		if err := report(d); err != nil {
			return err
		}
	}
	for _, id := range draining {
		if !wait {
			break
		}
		if err := o.Empty(ctx, id); err != nil {
			return fmt.Errorf("waiting for worker %s: %w", id, err)
		}
		if err := report(drainedWorker{Draining: operate.Draining{WorkerID: id}, Status: statusEmpty}); err != nil {
			return err
		}
	}
	if failed {
		return errShown
	}
	return nil
}
