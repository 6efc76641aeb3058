package main

import (
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/terminal"
)

// period bounds what a command looks at.
type period struct{ since, until string }

func (p *period) register(cmd *cobra.Command) {
	filterVar(cmd.Flags(), &p.since, "since", "sessions confirmed at this `TIME` or later: 2026-03-01 (UTC), RFC 3339, or a duration ago such as 24h")
	filterVar(cmd.Flags(), &p.until, "until", "sessions confirmed before this `TIME`")
}

func (p *period) times(now time.Time) (since, until time.Time, err error) {
	if since, err = pastTime("--since", p.since, now); err != nil {
		return since, until, err
	}
	until, err = pastTime("--until", p.until, now)
	if err == nil && !since.IsZero() && !until.IsZero() && !since.Before(until) {
		err = usagef("--since %s is not before --until %s", p.since, p.until)
	}
	return since, until, err
}

func newCostCommand(c *cli) *cobra.Command {
	var (
		by            string
		when          period
		asJSON, asCSV bool
		store         = func(l *link) *cost.Store { return cost.NewStore(l.js, l.names, l.cfg.TotalLabels()) }
		withLedger    = func(ctx context.Context, name string, f func(*link, *cost.Store) error) error {
			return c.withLedger(ctx, name, store, f)
		}
	)
	cmd := &cobra.Command{
		Use: "cost", Short: "Show what sessions cost, by app, queue, avatar, label or day", Args: noArgs,
		Long: `Sums the sessions that the backend confirmed, also those that failed, were cut off
or died with their worker. Whole days by app, queue, day or a label of cost.labels
come from counters and are read at once; all else is summed from the records.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON && asCSV {
				return usagef("give --json or --csv, not both")
			}
			since, until, err := when.times(c.now())
			if err != nil {
				return err
			}
			return withLedger(cmd.Context(), "cost", func(_ *link, s *cost.Store) error {
				rows, err := s.Sum(cmd.Context(), cost.Query{By: by, Since: since, Until: until})
				if errors.Is(err, cost.ErrBy) {
					return usagef("--by %q: %s", by, cost.ErrBy)
				}
				if err != nil {
					return err
				}
				return c.printSums(rows, asJSON, asCSV)
			})
		},
	}
	cmd.Flags().StringVar(&by, "by", cost.ByApp, "sum by `WHAT`: app, queue, avatar, day or label:NAME")
	when.register(cmd)
	jsonFlag(cmd, &asJSON)
	cmd.Flags().BoolVar(&asCSV, "csv", false, "print CSV")
	cmd.AddCommand(newCostCheckCommand(c, withLedger), newCostRebuildCommand(c, withLedger), newCostBudgetCommand(c, withLedger))
	return cmd
}

// ledgerFunc runs a function with the fleet's ledger.
type ledgerFunc func(ctx context.Context, name string, f func(*link, *cost.Store) error) error

func (c *cli) withLedger(ctx context.Context, name string, store func(*link) *cost.Store, f func(*link, *cost.Store) error) error {
	l, err := c.connect(ctx, name)
	if err != nil {
		return err
	}
	defer l.close()
	if _, err := l.js.Stream(ctx, l.names.UsageStream()); err != nil {
		return l.names.Unavailable("stream "+l.names.UsageStream(), err)
	}
	return f(l, store(l))
}

func (c *cli) printSums(rows []cost.Row, asJSON, asCSV bool) error {
	switch {
	case asJSON:
		return c.printJSON(rows)
	case asCSV:
		return writeCSV(c.stdout, rows)
	}
	var sum usage.Totals
	t := terminal.NewTable(c.stdout, "KEY", "SESSIONS", "CONNECTED", "CREDITS", "ESTIMATED", "LOST TO FAILURES")
	for _, r := range rows {
		sum = sum.Plus(r.Totals)
		t.Row(terminal.OrDash(r.Key), r.Sessions, connected(r.ConnectedMS), r.Credits, r.EstimatedCredits, r.FailedCredits)
	}
	if len(rows) != 1 {
		t.Row("total", sum.Sessions, connected(sum.ConnectedMS), sum.Credits, sum.EstimatedCredits, sum.FailedCredits)
	}
	return t.Flush()
}

func connected(ms int64) string {
	return (time.Duration(ms) * time.Millisecond).Round(time.Second).String()
}

func writeCSV(w io.Writer, rows []cost.Row) error {
	out := csv.NewWriter(w)
	if err := out.Write([]string{"key", "sessions", "connected_ms", "credits", "estimated_credits", "failed_credits"}); err != nil {
		return err
	}
	for _, r := range rows {
		line := []string{csvText(r.Key)}
		for _, n := range []int64{r.Sessions, r.ConnectedMS, r.Credits, r.EstimatedCredits, r.FailedCredits} {
			line = append(line, strconv.FormatInt(n, 10))
		}
		if err := out.Write(line); err != nil {
			return err
		}
	}
	out.Flush()
	return out.Error()
}

// csvText is text as a cell of CSV. What a spreadsheet would run as a formula begins
// with an apostrophe: labels are what publishers say.
func csvText(text string) string {
	if text == "" || !strings.ContainsAny(text[:1], "=+-@\t\r") {
		return text
	}
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		return text
	}
	return "'" + text
}

func newCostCheckCommand(c *cli, with ledgerFunc) *cobra.Command {
	var (
		when      period
		tolerance time.Duration
		asJSON    bool
	)
	cmd := &cobra.Command{
		Use: "check FILE", Short: "Compare the vendor's own list with the ledger, by connection id", Args: argCount(1, 1),
		Long: `Reads a list of sessions: CSV whose first line names the columns, or a JSON object
on each line, with connection_id and at least one of connected_ms,
connected_seconds and credits. "-" is stdin. Give --since and --until of the list:
sessions of that time that are not on it are reported too; without them, all sessions
of the ledger that are not on it. The exit code is 1 if list and ledger differ.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			since, until, err := when.times(c.now())
			if err != nil {
				return err
			}
			charges, err := c.readCharges(args[0])
			if err != nil {
				return err
			}
			return with(cmd.Context(), "cost check", func(_ *link, s *cost.Store) error {
				checked, err := s.Check(cmd.Context(), charges, since, until, tolerance)
				if err != nil {
					return err
				}
				return c.printChecked(checked, asJSON)
			})
		},
	}
	when.register(cmd)
	cmd.Flags().DurationVar(&tolerance, "tolerance", time.Second, "`TIME` by which list and ledger may differ")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) readCharges(name string) ([]cost.Charge, error) {
	in := c.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close() // it was only read
		in = f
	}
	charges, err := cost.ReadCharges(in)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", name, err)
	}
	return charges, nil
}

func (c *cli) printChecked(k cost.Checked, asJSON bool) error {
	if asJSON {
		if err := c.printJSON(k); err != nil {
			return err
		}
	} else if err := c.printFindings(k); err != nil {
		return err
	}
	if !k.OK {
		return fmt.Errorf("list and ledger differ in %s", terminal.Count(len(k.Findings), "session"))
	}
	return nil
}

func (c *cli) printFindings(k cost.Checked) error {
	t := terminal.NewTable(c.stdout)
	t.Row("on the list", terminal.Count(k.Listed, "session"))
	t.Row("the same", fmt.Sprintf("%d, of which %d are estimates here", k.Same, k.Estimated))
	theirs := "the list has none"
	if k.TheirCredits > 0 {
		theirs = fmt.Sprintf("%d on the list", k.TheirCredits)
	}
	t.Row("credits", fmt.Sprintf("%d here, %s", k.OurCredits, theirs))
	if k.WithoutID > 0 {
		t.Row("without a connection id here", terminal.Count(k.WithoutID, "session"))
	}
	if err := t.Flush(); err != nil || len(k.Findings) == 0 {
		return err
	}
	n := func(v int64) string {
		if v < 0 {
			return "-"
		}
		return strconv.FormatInt(v, 10)
	}
	t = terminal.NewTable(c.stdout, "CONNECTION", "WHAT", "JOB", "SESSION", "OUR MS", "THEIR MS", "OUR CREDITS", "THEIR CREDITS")
	for _, f := range k.Findings {
		t.Row(f.ConnectionID, f.What, terminal.OrDash(f.JobID), f.Session, n(f.OurMS), n(f.TheirMS), n(f.OurCredits), n(f.TheirCredits))
	}
	return t.Flush()
}

func newCostRebuildCommand(c *cli, with ledgerFunc) *cobra.Command {
	var dryRun, asJSON bool
	cmd := &cobra.Command{
		Use: "rebuild", Short: "Correct the counters of each day by the records, and compare them again", Args: noArgs,
		Long: `Adds the records that are not in the counters yet, sums all records by day, app,
queue and the labels of cost.labels, and corrects the counters that differ. Use it
if the counters are in doubt. Workers may go on meanwhile. Exit code 1 if counters
still differ.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd.Context(), "cost rebuild", func(_ *link, s *cost.Store) error {
				view := struct {
					Corrected []cost.Difference `json:"corrected"`
					cost.Compared
				}{Corrected: []cost.Difference{}}
				var err error
				if dryRun {
					view.Compared, err = s.Compare(cmd.Context())
				} else {
					view.Corrected, view.Compared, err = s.Rebuild(cmd.Context())
				}
				if errors.Is(err, usage.ErrNoCounters) {
					return fmt.Errorf("%w: 'avatarworker setup' makes them, on NATS 2.12 or later; then repeat the command. Without them sums are read from the records", err)
				}
				if err != nil {
					return err
				}
				return c.printRebuilt(view.Corrected, view.Compared, view, asJSON)
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only compare")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) printRebuilt(corrected []cost.Difference, after cost.Compared, view any, asJSON bool) error {
	if asJSON {
		if err := c.printJSON(view); err != nil {
			return err
		}
	} else {
		t := terminal.NewTable(c.stdout)
		t.Row("records", terminal.Count(int(after.Records), "session"))
		t.Row("pending", fmt.Sprintf("%s not in the counters yet", terminal.Count(int(after.Pending), "session")))
		if after.Unreadable > 0 {
			t.Row("unreadable", fmt.Sprintf("%s that are not usage records", terminal.Count(int(after.Unreadable), "message")))
		}
		t.Row("counters", after.Counters)
		t.Row("corrected", len(corrected))
		t.Row("different", len(after.Differences))
		if after.Before != "" {
			t.Row("left alone", "days before "+after.Before+": their records are no longer complete")
		}
		for _, d := range after.Differences {
			t.Row(d.Counter, fmt.Sprintf("has %d credits of %d", d.Have.Credits, d.Want.Credits))
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if n := len(after.Differences); n > 0 {
		return fmt.Errorf("%s still different from the sums of the records", terminal.Count(n, "counter"))
	}
	return nil
}
