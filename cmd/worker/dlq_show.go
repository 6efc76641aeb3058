package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

func newDLQShowCommand(c *cli) *cobra.Command {
	var (
		lf       letterFlags
		raw      bool
		original string
		run      int
	)
	cmd := &cobra.Command{
		Use: "show [SEQ]", Short: "Show a dead letter, and explain its error", Args: argCount(0, 1),
		Long: `Shows a dead letter: what its error means, who can correct it and how; then its
headers, the error and the job. Without SEQ it shows the first letter that matches
the filters. Egress tokens and the queries of URLs are hidden; --raw writes the job's
own bytes to stdout as they are.

--original JOB shows the letter that the job was corrected from when it was replayed.
The letter itself is gone; its bytes are kept as long as the job's record
(nats.state_ttl). --run chooses among several corrections.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case original != "" && (len(args) > 0 || lf.chooses()):
				return usagef("give --original JOB, or a SEQ or filters: not both")
			case cmd.Flags().Changed("run") && (original == "" || run < 2):
				return usagef("--run %d: want a run from 2, with --original JOB", run)
			case original != "":
				return c.showOriginal(cmd.Context(), original, run, raw, lf.asJSON)
			}
			return c.showLetter(cmd, args, &lf, raw)
		},
	}
	lf.register(cmd, 0)
	cmd.Flags().BoolVar(&raw, "raw", false, "write the job's own bytes, tokens included, and nothing else")
	filterVar(cmd.Flags(), &original, "original", "what the `JOB` was corrected from when it was replayed")
	cmd.Flags().IntVar(&run, "run", 0, "with --original: as the job's run `N` was (default: the last one that was corrected)")
	return cmd
}

// showOriginal shows the letter that a job was corrected from.
func (c *cli) showOriginal(ctx context.Context, job string, run int, raw, asJSON bool) error {
	if err := checkJobID(job); err != nil {
		return err
	}
	l, err := c.connect(ctx, "dlq show")
	if err != nil {
		return err
	}
	defer l.close()
	letter, of, err := dlq.NewStore(l.js, l.names, nil).Original(ctx, job, run)
	switch {
	case err != nil:
		return err
	case raw:
		_, err = c.raw().Write(letter.Data)
		return err
	case asJSON:
		return c.printJSON(letter.Masked())
	}
	t := terminal.NewTable(c.stdout)
	t.Row("original of", fmt.Sprintf("job %s, run %d, corrected %s", job, of.Run, terminal.When(c.now(), of.At)))
	t.Row("digest", of.Corrected)
	return errors.Join(t.Flush(), c.printLetter(letter))
}

func (c *cli) showLetter(cmd *cobra.Command, args []string, lf *letterFlags, raw bool) error {
	seqs, filter, err := c.which(args, lf)
	if err != nil {
		return err
	}
	if len(seqs) == 0 && !lf.chooses() {
		return usagef("which one? Give a SEQ of 'avatarworker dlq ls', or a filter")
	}
	l, err := c.connect(cmd.Context(), "dlq show")
	if err != nil {
		return err
	}
	defer l.close()
	store := dlq.NewStore(l.js, l.names, nil)
	if len(seqs) == 0 {
		if seqs, err = firstLetter(cmd.Context(), store, filter); err != nil {
			return err
		}
	}
	letter, err := store.Show(cmd.Context(), seqs[0])
	if err != nil {
		return err
	}
	switch {
	case raw:
		_, err = c.raw().Write(letter.Data)
		return err
	case lf.asJSON:
		return c.printJSON(letter.Masked())
	}
	return errors.Join(c.printLetter(letter), c.printNext(letter.Masked()))
}

func firstLetter(ctx context.Context, store *dlq.Store, filter dlq.Filter) ([]uint64, error) {
	for e, err := range store.List(ctx, filter, 1) {
		return []uint64{e.Seq}, err
	}
	return nil, fmt.Errorf("no dead letter matches the filters")
}

func (c *cli) printLetter(l dlq.Letter) error {
	v := l.Masked()
	t := terminal.NewTable(c.stdout)
	t.Row("dead letter", v.Seq)
	t.Row("job", fmt.Sprintf("%s, run %d, of queue %s", terminal.OrDash(v.JobID), v.Run, terminal.OrDash(v.Queue)))
	t.Row("failed", terminal.When(c.now(), v.FailedAt)+" on "+terminal.OrDash(v.Worker))
	t.Row("error", fmt.Sprintf("%s (%s) in %s: %s", v.Code, v.Class, terminal.OrDash(string(v.Phase)), status.Cause(v.Message, v.ServerTitle, v.ServerDetail)))
	t.Row("reason", fmt.Sprintf("%s, after %s and %s", terminal.OrDash(v.Reason), terminal.Count(v.Attempts, "attempt"), crashes(v.Crashes)))
	if v.Explanation.Meaning != "" {
		t.Row("meaning", v.Explanation.Meaning)
		t.Row("owner", v.Explanation.Owner)
		t.Row("what to do", v.Explanation.Remedy)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return errors.Join(c.printHeaders(v.Headers), c.printBlock("Error", v.Error), c.printBlock("Job", v.Body))
}

func crashes(n int) string {
	if n == 1 {
		return "1 crash"
	}
	return fmt.Sprintf("%d crashes", n)
}

func (c *cli) printHeaders(headers map[string][]string) error {
	if err := c.heading("\nHeaders"); err != nil {
		return err
	}
	t := terminal.NewTable(c.stdout)
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		t.Row(name, strings.Join(headers[name], ", "))
	}
	return t.Flush()
}

func (c *cli) printBlock(title string, body json.RawMessage) error {
	var pretty bytes.Buffer
	if len(body) == 0 || json.Indent(&pretty, body, "", "  ") != nil {
		return nil
	}
	if err := c.heading("\n" + title); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.stdout, pretty.String())
	return err
}

func (c *cli) printNext(v dlq.Masked) error {
	_, err := fmt.Fprintf(c.stdout, "\nTo run it again: avatarworker dlq replay %d\nAll with this code: avatarworker dlq replay --code %s\n", v.Seq, terminal.Plain(string(v.Code)))
	return err
}

// letterTimeout bounds what is done with one letter.
const letterTimeout = 20 * time.Second
