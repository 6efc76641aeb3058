package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/operate"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

// bulkFlags are those of a command that may change many jobs.
type bulkFlags struct {
	filterFlags
	all, dryRun, yes, asJSON bool
}

func (bf *bulkFlags) register(c *cli, cmd *cobra.Command, what string) {
	bf.filterFlags.register(c, cmd, 0)
	f := cmd.Flags()
	f.BoolVar(&bf.all, "all", false, "every job "+what)
	f.BoolVar(&bf.dryRun, "dry-run", false, "list the jobs, change nothing")
	f.BoolVarP(&bf.yes, "yes", "y", false, "do not ask before more than one is changed")
	jsonFlag(cmd, &bf.asJSON)
}

// outcome is what became of one job, as it is shown.
type outcome struct {
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Outcome string `json:"outcome,omitempty"`
	State   string `json:"state,omitempty"`
	Message string `json:"message,omitempty"`
	failed  bool
}

// statusWould is what --dry-run says of each job.
const statusWould = "would_change"

// bulk changes the jobs that are named or chosen, one by one, and reports each.
type bulk struct {
	verb   string            // "Cancel"
	states []lifecycle.State // meant if no state is asked for
	change func(ctx context.Context, l *link, row status.Row) (outcome, error)
}

// jobTime bounds the change of one job, which is not interrupted midway.
const jobTime = 30 * time.Second

func (c *cli) runBulk(ctx context.Context, command string, args []string, bf *bulkFlags, b bulk) error {
	q, err := c.choice(args, &bf.filterFlags, bf.all)
	if err != nil {
		return err
	}
	if len(q.States) == 0 {
		q.States = b.states
	}
	l, err := c.connect(ctx, command)
	if err != nil {
		return err
	}
	defer l.close()
	rows, err := c.chosenJobs(ctx, l, args, q, bf.countFor)
	if err != nil {
		return err
	}
	if len(rows) > 1 && !bf.yes && !bf.dryRun && c.interactive() {
		if err := c.sure(ctx, fmt.Sprintf("%s %s?", b.verb, terminal.Count(len(rows), "job"))); err != nil {
			return err
		}
	}
	return c.changeJobs(ctx, l, rows, bf, b, len(args) == 1)
}

// sure asks, and returns an error unless the answer is yes.
func (c *cli) sure(ctx context.Context, question string) error {
	yes, err := c.ask(ctx, question)
	if err == nil && !yes {
		err = errors.New("nothing was changed")
	}
	return err
}

// changeJobs changes one job after the other. An interrupt lets the one in hand
// finish. single: one job was named, so the output is one answer, not a list.
func (c *cli) changeJobs(ctx context.Context, l *link, rows []status.Row, bf *bulkFlags, b bulk, single bool) error {
	failed, done := 0, 0
	var stopped error
	for _, row := range rows {
		if stopped = ctx.Err(); stopped != nil {
			break
		}
		o := outcome{JobID: row.ID, Status: statusWould, State: string(row.State)}
		if !bf.dryRun {
			one, cancel := context.WithTimeout(context.WithoutCancel(ctx), jobTime)
			var err error
			o, err = b.change(one, l, row)
			cancel()
			if err != nil {
				o = outcome{JobID: row.ID, Status: statusFailed, Message: errors.RedactText(err.Error()), failed: true}
			}
		}
		done++
		if o.failed {
			failed++
		}
		if err := c.printOutcome(o, bf.asJSON, single); err != nil {
			return err
		}
		if o.failed && !l.nc.IsConnected() {
			stopped = fmt.Errorf("the connection to NATS was lost")
			break
		}
	}
	switch {
	case single:
	case failed == 0:
		c.note("%s", terminal.Count(done, "job"))
	default:
		c.note("%s, %d of which not as asked", terminal.Count(done, "job"), failed)
	}
	switch {
	case stopped != nil:
		return fmt.Errorf("stopped after %d of %d: %w: repeat the command to go on", done, len(rows), stopped)
	case failed > 0:
		return errShown
	}
	return nil
}

func (c *cli) printOutcome(o outcome, asJSON, single bool) error {
	switch {
	case asJSON && single:
		return c.printJSON(o)
	case asJSON:
		return c.printLine(o)
	}
	text := o.Status
	if o.Outcome != "" {
		text += fmt.Sprintf(" (%s)", o.Outcome)
	}
	if !single {
		text = o.JobID + "  " + text
	}
	if o.Message != "" {
		text += ": " + o.Message
	}
	_, err := fmt.Fprintln(c.stdout, terminal.Plain(text))
	return err
}

// onTheWay are the states of jobs without an outcome.
func onTheWay() []lifecycle.State {
	return []lifecycle.State{status.StateWaiting, lifecycle.StateRunning, lifecycle.StateRetrying, lifecycle.StateHeld, lifecycle.StateReleased}
}

func newRetryCommand(c *cli) *cobra.Command {
	var (
		bf    bulkFlags
		probe bool
	)
	states := []lifecycle.State{lifecycle.StateRetrying, lifecycle.StateHeld}
	cmd := &cobra.Command{
		Use: "retry [JOB…]", Short: "Deliver jobs at once that are in backoff or held",
		Long: `Delivers jobs at once that wait for a retry or are held. Give job ids,
filters, or --all; filters choose among those that are retrying or held. A job
whose budget is spent stays held. One whose circuit is open does, too, unless --probe
lets the next one of it through.
A job that is held because its sessions settled nothing gets as many sessions again.
The command may be repeated.

Answers "delivered", "running", "held", "finished" (too late), "lost" (its message
is gone) or "unknown". With the last four the exit code is 1.`,
		ValidArgsFunction: c.completeJobs(states),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.runBulk(cmd.Context(), "retry", args, &bf, bulk{verb: "Retry", states: states, change: c.retrier(probe)})
		},
	}
	bf.register(c, cmd, "that is retrying or held")
	cmd.Flags().BoolVar(&probe, "probe", false, "let one job of an open circuit through")
	return cmd
}

// fleetStreams is what errors call the streams and buckets that a command reads or
// changes together.
const fleetStreams = "streams of the fleet"

// operator opens the link's operator once.
func (l *link) operator(ctx context.Context) (*operate.Operator, error) {
	if l.ops == nil {
		o, err := operate.Open(ctx, l.nc, l.js, l.names)
		if err != nil {
			return nil, l.names.Unavailable(fleetStreams, err)
		}
		l.ops = o.WithBudgets(fleetBudgets(l.cfg, l.js, l.names, time.Now), app.Tariff(l.cfg))
	}
	return l.ops, nil
}

func (c *cli) retrier(probe bool) func(context.Context, *link, status.Row) (outcome, error) {
	return func(ctx context.Context, l *link, row status.Row) (outcome, error) {
		o, err := l.operator(ctx)
		if err != nil {
			return outcome{}, err
		}
		r, err := o.Retry(ctx, row.ID, probe)
		return outcome{JobID: r.JobID, Status: r.Status, State: string(r.State), Message: r.Message, failed: !r.Done()}, err
	}
}

// canceller ends a job. One that is unknown is said to be so, unless that is to be
// noted.
func (c *cli) canceller(ifUnknown bool) func(context.Context, *link, status.Row) (outcome, error) {
	return func(ctx context.Context, l *link, row status.Row) (outcome, error) {
		op, err := l.operator(ctx)
		if err != nil {
			return outcome{}, err
		}
		found := row.State != "" // by a filter
		reply, err := op.Cancel(ctx, row.ID, ifUnknown || found)
		o := outcome{JobID: row.ID, Status: reply.Status, Message: reply.Message}
		switch reply.Status {
		case control.StatusFinished:
			o.Outcome = reply.Outcome
		case operate.StatusUnknown:
			o.Message += "; --if-unknown cancels it when it comes"
		}
		o.failed = reply.Status != control.StatusCancelled && reply.Status != control.StatusRequested
		return o, err
	}
}
