package main

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

// defaultList is how many dead letters a list shows by default.
const defaultList = 50

// letterFlags choose dead letters.
type letterFlags struct {
	codes, classes, apps, jobs []string
	before, after              string
	limit                      int
	newest                     bool
	all                        bool
	dryRun                     bool
	yes                        bool
	asJSON                     bool
}

func newDLQCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "dlq", Short: "List, show, replay and remove dead letters", Args: noArgs, RunE: showHelp,
	}
	cmd.AddCommand(newDLQListCommand(c), newDLQShowCommand(c), newDLQReplayCommand(c), newDLQRemoveCommand(c))
	return cmd
}

func (lf *letterFlags) register(cmd *cobra.Command, limit int) {
	f := cmd.Flags()
	filtersVar(f, &lf.codes, "code", "only with this error `CODE`; may be repeated, as --class, --app and --job")
	filtersVar(f, &lf.classes, "class", "only with this error `CLASS`")
	filtersVar(f, &lf.apps, "app", "only of the app with this `ID`")
	filtersVar(f, &lf.jobs, "job", "only of the job with this `ID`")
	filterVar(f, &lf.before, "before", "only those that failed before this `TIME` (2026-03-01 (UTC), RFC 3339, or a duration ago such as 2h)")
	filterVar(f, &lf.after, "after", "only those that failed at this `TIME` or later")
	f.BoolVar(&lf.newest, "newest", false, "newest first")
	f.IntVar(&lf.limit, "limit", limit, "at most `N` (0: no limit)")
	jsonFlag(cmd, &lf.asJSON)
}

// chooses reports whether any flag narrows the choice.
func (lf *letterFlags) chooses() bool {
	return len(lf.codes)+len(lf.classes)+len(lf.apps)+len(lf.jobs) > 0 || lf.before != "" || lf.after != "" || lf.limit > 0
}

func (lf *letterFlags) filter(now time.Time) (dlq.Filter, error) {
	f := dlq.Filter{Apps: lf.apps, Jobs: lf.jobs, Newest: lf.newest}
	for _, text := range lf.codes {
		f.Codes = append(f.Codes, errors.Code(text))
	}
	for _, class := range lf.classes {
		if err := oneOf("class", class, errors.Classes()); err != nil {
			return f, err
		}
		f.Classes = append(f.Classes, errors.Class(class))
	}
	if lf.limit < 0 {
		return f, usagef("--limit %d: want 0 (no limit) or more", lf.limit)
	}
	var err error
	if f.Before, err = pastTime("--before", lf.before, now); err != nil {
		return f, err
	}
	f.After, err = pastTime("--after", lf.after, now)
	return f, err
}

// pastTime reads a day (UTC), a time, or how long ago it was.
func pastTime(flag, text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usagef("%s %q: want a day such as 2026-03-01 (UTC), a time such as 2026-03-01T12:00:00Z, or how long ago such as 90m", flag, text)
}

// sequences reads the SEQ arguments.
func sequences(args []string) ([]uint64, error) {
	var seqs []uint64
	for _, arg := range args {
		seq, err := strconv.ParseUint(arg, 10, 64)
		if err != nil || seq == 0 {
			return nil, usagef("%q is not a SEQ: 'avatarworker dlq ls' lists them", arg)
		}
		seqs = append(seqs, seq)
	}
	return seqs, nil
}

// which returns the letters that SEQ arguments or flags choose.
func (c *cli) which(args []string, lf *letterFlags) ([]uint64, dlq.Filter, error) {
	seqs, err := sequences(args)
	if err != nil {
		return nil, dlq.Filter{}, err
	}
	filter, err := lf.filter(c.now())
	if err != nil {
		return nil, dlq.Filter{}, err
	}
	c.warnUnknown(filter.Codes...)
	return seqs, filter, nil
}

func newDLQListCommand(c *cli) *cobra.Command {
	var lf letterFlags
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List dead letters", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.listLetters(cmd, &lf) },
	}
	lf.register(cmd, defaultList)
	cmd.Flags().BoolVar(&lf.all, "all", false, "all of them, as --limit 0")
	return cmd
}

func (c *cli) listLetters(cmd *cobra.Command, lf *letterFlags) error {
	filter, err := lf.filter(c.now())
	if err != nil {
		return err
	}
	c.warnUnknown(filter.Codes...)
	l, err := c.connect(cmd.Context(), "dlq ls")
	if err != nil {
		return err
	}
	defer l.close()
	limit, chosen := lf.limit, cmd.Flags().Changed("limit")
	if lf.all && !chosen {
		limit = 0
	}
	want := limit
	if limit > 0 {
		want++ // with one more it is known whether there are more
	}
	show, end := c.letterList(lf.asJSON)
	given, more := 0, false
	for e, listErr := range dlq.NewStore(l.js, l.names, nil).List(cmd.Context(), filter, want) {
		if err = listErr; err != nil {
			break
		}
		if more = limit > 0 && given == limit; more {
			break
		}
		if err = show(e); err != nil {
			break
		}
		given++
	}
	if err := errors.Join(err, end()); err != nil {
		return err
	}
	if more && !chosen {
		c.note("there are more: --limit N or --all shows them, --code, --class, --app, --job narrow them down")
	}
	if given == 0 && !lf.asJSON {
		c.note("no dead letters")
	}
	return nil
}

// pageRows is how many rows of a table are aligned together: a long list is
// shown while it is read.
const pageRows = 200

// letterList returns what shows one dead letter, and what ends the list.
func (c *cli) letterList(asJSON bool) (show func(dlq.Entry) error, end func() error) {
	if asJSON {
		a := &array{w: c.stdout}
		return func(e dlq.Entry) error { return a.add(e) }, a.end
	}
	var t *terminal.Table
	rows := 0
	show = func(e dlq.Entry) error {
		if t == nil {
			t = terminal.NewTable(c.stdout, "SEQ", "FAILED", "JOB", "RUN", "QUEUE", "APP", "AVATAR", "CODE", "REASON", "ATTEMPTS", "ERROR")
		}
		t.Row(e.Seq, terminal.Ago(c.now(), e.FailedAt)+" ago", terminal.OrDash(e.JobID), e.Run, terminal.OrDash(e.Queue), terminal.OrDash(e.AppID), terminal.OrDash(e.AvatarID),
			e.Code, terminal.OrDash(e.Reason), e.Attempts, terminal.Short(status.Cause(e.Message, e.ServerTitle, e.ServerDetail), 60))
		if rows++; rows%pageRows == 0 {
			return t.Flush()
		}
		return nil
	}
	return show, func() error {
		if t == nil {
			return nil
		}
		return t.Flush()
	}
}
