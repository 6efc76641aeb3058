package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

// filterFlags choose jobs.
type filterFlags struct {
	states, queues, apps, avatars, labels, codes []string
	older, newer                                 string
	limit                                        int
	countFor                                     time.Duration
}

func (ff *filterFlags) register(c *cli, cmd *cobra.Command, limit int) {
	f := cmd.Flags()
	filtersVar(f, &ff.states, "state", "in this `STATE` ("+strings.Join(stateNames(), ", ")+"); may be repeated, as may --queue, --app, --avatar, --label and --code")
	filtersVar(f, &ff.queues, "queue", "of the queue with this `NAME`")
	filtersVar(f, &ff.apps, "app", "of the app with this `ID`")
	filtersVar(f, &ff.avatars, "avatar", "of the avatar with this `ID`")
	f.StringArrayVar(&ff.labels, "label", nil, "with the label `KEY=VALUE`; if repeated, with all of them")
	filtersVar(f, &ff.codes, "code", "whose last failure, or the failure that holds them, has this error `CODE`; expired jobs have deadlineExceeded")
	filterVar(f, &ff.older, "older", "published before this `TIME` (2026-03-01 (UTC), RFC 3339, or a duration ago such as 2h)")
	filterVar(f, &ff.newer, "newer", "published at this `TIME` or later")
	f.IntVar(&ff.limit, "limit", limit, "at most `N` (0: no limit)")
	f.DurationVar(&ff.countFor, "count-for", status.DefaultCountFor, "longest `TIME` for reading jobs that wait")
	complete := func(flag string, values func(context.Context) []string) {
		// The flag is there: it was just made.
		_ = cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return values(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
		})
	}
	complete("state", func(context.Context) []string { return stateNames() })
	complete("code", func(context.Context) []string { return codeNames() })
	complete("queue", c.queueNames)
	complete("app", func(context.Context) []string { return nil })
}

func stateNames() []string {
	var names []string
	for _, s := range status.States() {
		names = append(names, string(s))
	}
	return names
}

func codeNames() []string {
	var names []string
	for _, code := range errors.Codes() {
		names = append(names, string(code))
	}
	return names
}

// narrows reports whether any flag narrows the choice.
func (ff *filterFlags) narrows() bool {
	return len(ff.states)+len(ff.queues)+len(ff.apps)+len(ff.avatars)+len(ff.labels)+len(ff.codes) > 0 || ff.older != "" || ff.newer != "" || ff.limit > 0
}

func (ff *filterFlags) query(c *cli) (status.Query, error) {
	q := status.Query{Filter: status.Filter{Queues: ff.queues, Apps: ff.apps, Avatars: ff.avatars}, Limit: ff.limit}
	for _, name := range ff.states {
		if err := oneOf("state", name, status.States()); err != nil {
			return q, err
		}
		q.States = append(q.States, lifecycle.State(name))
	}
	for _, name := range ff.codes {
		q.Codes = append(q.Codes, errors.Code(name))
	}
	c.warnUnknown(q.Codes...)
	for _, pair := range ff.labels {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return q, usagef("--label %q: want KEY=VALUE", pair)
		}
		if q.Labels == nil {
			q.Labels = make(map[string]string)
		}
		if before, twice := q.Labels[key]; twice && before != value {
			return q, usagef("--label %s: no job has two values of one label", pair)
		}
		q.Labels[key] = value
	}
	if ff.limit < 0 {
		return q, usagef("--limit %d: want 0 (no limit) or more", ff.limit)
	}
	var err error
	if q.Before, err = pastTime("--older", ff.older, c.now()); err != nil {
		return q, err
	}
	q.After, err = pastTime("--newer", ff.newer, c.now())
	return q, err
}

func newJobsCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "jobs", Short: "List and show jobs", Args: noArgs, RunE: showHelp}
	cmd.AddCommand(newJobsListCommand(c), newJobsShowCommand(c))
	return cmd
}

func newJobsListCommand(c *cli) *cobra.Command {
	var (
		ff     filterFlags
		order  string
		by     string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List jobs, also those that only wait in their queue", Args: noArgs,
		Long: `Lists jobs, newest first: those with a record, and those that only wait in their
queue (state waiting). Records are kept for nats.state_ttl after their last change.

With --json one object a line: id, run, state, queue, app_id, avatar_id, labels,
attempt, crashes, code, age_ms (since it was published), running_ms (since its
worker took it), next_attempt_at, worker_id, session_ms (connected time).

With --by the jobs are counted instead, most jobs first: key, jobs, states.`,
		Example: `  avatarworker jobs ls --state running --sort running
  avatarworker jobs ls --label customer=acme --state dead_lettered --newer 24h
  avatarworker jobs ls --by label:customer --state dead_lettered  # whose jobs fail`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := ff.query(c)
			if err != nil {
				return err
			}
			if err := oneOf("sort", order, status.Orders()); err != nil {
				return err
			}
			q.Order = status.Order(order)
			if q.By, err = status.ParseBy(by); err != nil {
				return usagef("--by %s: %s", by, err)
			}
			return c.listJobs(cmd.Context(), q, ff.countFor, cmd.Flags().Changed("limit"), asJSON)
		},
	}
	ff.register(c, cmd, defaultList)
	cmd.Flags().StringVar(&order, "sort", string(status.ByAge), "`ORDER`: age (newest first), running (longest first) or cost (most connected time first)")
	cmd.Flags().StringVar(&by, "by", "", "count the jobs by `WHAT`: queue, app, avatar, code or label:NAME")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) listJobs(ctx context.Context, q status.Query, countFor time.Duration, limited, asJSON bool) error {
	l, err := c.connect(ctx, "jobs ls")
	if err != nil {
		return err
	}
	defer l.close()
	q.DefaultApp = l.cfg.App.ID
	list, err := status.NewStore(l.js, l.names, c.now, countFor).Jobs(ctx, q)
	if err != nil {
		return l.names.Unavailable(fleetStreams, err)
	}
	if q.By != "" {
		err = c.printGroups(q.By, list.Groups, asJSON)
	} else {
		err = c.printJobs(list.Rows, asJSON)
	}
	if err != nil {
		return err
	}
	switch {
	case len(list.Rows)+len(list.Groups) == 0 && !asJSON:
		c.note("no jobs")
	case list.More && !limited:
		c.note("there are more: --limit N shows them, --state, --queue, --app and others narrow them down")
	}
	if !list.Waiting.All {
		c.note("looking at jobs that wait took longer than --count-for: %d of %d were looked at", list.Waiting.Looked, list.Waiting.Of)
	}
	return nil
}

// printGroups prints how many jobs there are of each key, with a column for each state
// that any of them is in.
func (c *cli) printGroups(by status.By, list []status.Group, asJSON bool) error {
	if asJSON {
		for _, g := range list {
			if err := c.printLine(g); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list) == 0 {
		return nil
	}
	states := status.States()
	states = slices.DeleteFunc(states, func(s lifecycle.State) bool {
		return !slices.ContainsFunc(list, func(g status.Group) bool { return g.States[s] > 0 })
	})
	heads := []string{strings.ToUpper(cmp.Or(by.Label(), string(by))), "JOBS"}
	for _, s := range states {
		heads = append(heads, strings.ToUpper(strings.ReplaceAll(string(s), "_", " ")))
	}
	t := terminal.NewTable(c.stdout, heads...)
	for _, g := range list {
		row := []any{terminal.OrDash(g.Key), g.Jobs}
		for _, s := range states {
			row = append(row, g.States[s])
		}
		t.Row(row...)
	}
	return t.Flush()
}

func (c *cli) printJobs(rows []status.Row, asJSON bool) error {
	if asJSON {
		for _, row := range rows {
			if err := c.printLine(row); err != nil {
				return err
			}
		}
		return nil
	}
	if len(rows) == 0 {
		return nil
	}
	t := terminal.NewTable(c.stdout, "JOB", "RUN", "STATE", "QUEUE", "APP", "AVATAR", "AGE", "ATTEMPT", "CODE", "RUNNING", "CONNECTED", "NEXT", "WORKER ID", "LABELS")
	for i, r := range rows {
		t.Row(r.ID, r.Run, r.State, r.Queue, terminal.OrDash(r.AppID), terminal.OrDash(r.AvatarID), millis(r.AgeMS), r.Attempt, terminal.OrDash(string(r.Code)),
			millisOrDash(r.RunningMS), millisOrDash(r.SessionMS), next(c.now(), r.NextAttemptAt), terminal.OrDash(r.WorkerID), terminal.OrDash(labelTexts(r.Labels)))
		if (i+1)%pageRows == 0 {
			if err := t.Flush(); err != nil {
				return err
			}
		}
	}
	return t.Flush()
}

func millis(ms int64) string { return terminal.Roughly(time.Duration(ms) * time.Millisecond) }

func millisOrDash(ms int64) string {
	if ms == 0 {
		return "-"
	}
	return millis(ms)
}

func next(now time.Time, at *time.Time) string {
	switch {
	case at == nil:
		return "-"
	case at.Before(now):
		return "due"
	}
	return "in " + terminal.Roughly(at.Sub(now))
}

func labelTexts(labels map[string]string) string {
	var texts []string
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		texts = append(texts, name+"="+labels[name])
	}
	return terminal.Short(strings.Join(texts, ","), 60)
}

func newJobsShowCommand(c *cli) *cobra.Command {
	var (
		asJSON   bool
		countFor time.Duration
	)
	cmd := &cobra.Command{
		Use: "show JOB", Short: "Show a job: its record, its history, what it costs, what to do", Args: argCount(1, 1),
		Long: `Shows a job's record, its events and errors in order, its connected time and
credits as far as records and events know them, and what to do. A job that only
waits in its queue is found too, in at most --count-for.`,
		ValidArgsFunction: c.completeJobs(nil),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.showJob(cmd.Context(), "jobs show", args[0], countFor, asJSON)
		},
	}
	jsonFlag(cmd, &asJSON)
	cmd.Flags().DurationVar(&countFor, "count-for", status.DefaultCountFor, "longest `TIME` for reading error events, or looking at jobs that wait")
	return cmd
}

func (c *cli) showJob(ctx context.Context, command, id string, countFor time.Duration, asJSON bool) error {
	if err := checkJobID(id); err != nil {
		return err
	}
	l, err := c.connect(ctx, command)
	if err != nil {
		return err
	}
	defer l.close()
	return c.jobStatus(ctx, l, status.NewStore(l.js, l.names, c.now, countFor).WithTariff(app.Tariff(l.cfg)), id, asJSON)
}

// chosenJobs are the jobs that are named, or that q chooses if none is.
func (c *cli) chosenJobs(ctx context.Context, l *link, args []string, q status.Query, countFor time.Duration) ([]status.Row, error) {
	if len(args) > 0 {
		var rows []status.Row
		for _, id := range args {
			rows = append(rows, status.Row{ID: id})
		}
		return rows, nil
	}
	q.DefaultApp = l.cfg.App.ID
	list, err := status.NewStore(l.js, l.names, c.now, countFor).Jobs(ctx, q)
	if err != nil {
		return nil, l.names.Unavailable(fleetStreams, err)
	}
	if !list.Waiting.All {
		c.note("looking at jobs that wait took longer than --count-for: %d of %d were looked at; repeat the command for the others", list.Waiting.Looked, list.Waiting.Of)
	}
	return list.Rows, nil
}

// choice checks that either jobs are named or flags choose them, and returns what
// the flags choose.
func (c *cli) choice(args []string, ff *filterFlags, all bool) (status.Query, error) {
	for _, id := range args {
		if !jobspec.ValidID(id) {
			return status.Query{}, checkJobID(id)
		}
	}
	switch chosen := ff.narrows() || all; {
	case len(args) == 0 && !chosen:
		return status.Query{}, usagef("which ones? Give job ids, filters, or --all")
	case len(args) > 0 && chosen:
		return status.Query{}, usagef("give job ids, or filters: not both")
	}
	return ff.query(c)
}

// completionTime bounds the search for names while a user types.
const completionTime = 2 * time.Second

// completeJobs completes the ids of the newest jobs in one of the states.
func (c *cli) completeJobs(states []lifecycle.State) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		var ids []string
		c.lookUp(cmd.Context(), func(ctx context.Context, l *link) {
			list, err := status.NewStore(l.js, l.names, c.now, completionTime/2).Jobs(ctx, status.Query{Filter: status.Filter{States: states}, Limit: 500})
			if err != nil {
				return
			}
			for _, r := range list.Rows {
				if strings.HasPrefix(r.ID, typed) && !slices.Contains(args, r.ID) {
					ids = append(ids, fmt.Sprintf("%s\t%s", r.ID, r.State))
				}
			}
		})
		return ids, cobra.ShellCompDirectiveNoFileComp
	}
}

// queueNames are those of the queues that have a consumer.
func (c *cli) queueNames(ctx context.Context) (names []string) {
	c.lookUp(ctx, func(ctx context.Context, l *link) {
		if stream, err := l.js.Stream(ctx, l.names.JobsStream()); err == nil {
			for name := range stream.ConsumerNames(ctx).Name() {
				names = append(names, name)
			}
		}
	})
	return names
}

// lookUp runs find on a connection; without one there is nothing to complete.
func (c *cli) lookUp(ctx context.Context, find func(context.Context, *link)) {
	ctx, cancel := context.WithTimeout(ctx, completionTime)
	defer cancel()
	if l, err := c.connect(ctx, "completion"); err == nil {
		defer l.close()
		find(ctx, l)
	}
}
