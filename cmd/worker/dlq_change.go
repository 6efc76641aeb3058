package main

import (
	"context"
	"fmt"
	"iter"

	"github.com/spf13/cobra"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/terminal"
)

// Statuses in addition to those of dlq.Replay.
const (
	statusFailed      = "failed"
	statusRemoved     = "removed"
	statusWouldRemove = "would_remove"
)

// changed is what became of one letter, as it is shown.
type changed struct {
	dlq.Result
	Error string `json:"error,omitempty"`
}

func newDLQReplayCommand(c *cli) *cobra.Command {
	var (
		lf             letterFlags
		fix            correction
		ignoreDeadline bool
	)
	cmd := &cobra.Command{
		Use: "replay [SEQ…]", Short: "Publish dead letters' jobs again",
		Long: `Publishes the jobs of dead letters again, each with its id, its next run and all its
attempts. A letter is removed once its job is back in the queue. Give SEQs, filters,
or --all. On a terminal it asks before it replays more than one. It may be
interrupted and repeated: that runs no job twice.
A job whose deadline has passed is skipped and reported.

A job may be corrected before it is published: --set changes a field of it, --body
replaces it, --edit opens it in $VISUAL or $EDITOR. The corrected job is validated
before anything is published, keeps its id, and has the header Avatar-Corrected with
the digest of its original bytes. 'dlq show --original JOB' shows those. Here --set
does not change the program's settings: those come from the configuration file and
AVATAR_ variables.`,
		Example: `  avatarworker dlq replay 17 --set avatar_id=ok-42 --set audio.format=wav
  avatarworker dlq replay --code avatarNotFound --app a1 --set avatar_id=ok-42 --dry-run
  avatarworker dlq replay 17 --set deadline=null      # without a deadline`,
		RunE: func(cmd *cobra.Command, args []string) error {
			correct, err := fix.prepare(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			return c.changeLetters(cmd, args, &lf, func(ctx context.Context, store *dlq.Store, e dlq.Entry) (changed, error) {
				r, err := store.Replay(ctx, e.Seq, dlq.ReplayOptions{IgnoreDeadline: ignoreDeadline, DryRun: lf.dryRun, Correct: correct})
				if r.Seq == 0 {
					r.Seq, r.JobID = e.Seq, e.JobID
				}
				return changed{Result: r}, err
			})
		},
	}
	lf.registerChange(cmd)
	fix.register(cmd)
	cmd.Flags().BoolVar(&ignoreDeadline, "ignore-deadline", false, "replay also what is past its deadline, and let it run")
	return cmd
}

func newDLQRemoveCommand(c *cli) *cobra.Command {
	var lf letterFlags
	cmd := &cobra.Command{
		Use: removeName + " [SEQ…]", Aliases: []string{"remove"}, Short: "Remove dead letters for good",
		Long: `Removes dead letters for good: their jobs are not run again. Give SEQs, filters,
or --all. On a terminal it asks before more than one is removed; elsewhere --all
without a filter needs -y.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.changeLetters(cmd, args, &lf, func(ctx context.Context, store *dlq.Store, e dlq.Entry) (changed, error) {
				var unseen error
				if e.JobID == "" || lf.dryRun { // named by its SEQ, or maybe gone
					var letter dlq.Letter
					if letter, unseen = store.Show(ctx, e.Seq); unseen == nil {
						e = letter.Entry
					}
				}
				r := changed{Result: dlq.Result{Seq: e.Seq, JobID: e.JobID, Run: e.Run, Subject: e.Subject, Status: statusWouldRemove}}
				if lf.dryRun {
					return r, unseen
				}
				// One that can't be shown can be removed all the same.
				r.Status = statusRemoved
				return r, store.Remove(ctx, e.Seq)
			})
		},
	}
	lf.registerChange(cmd)
	return cmd
}

func (lf *letterFlags) registerChange(cmd *cobra.Command) {
	lf.register(cmd, 0)
	cmd.Flags().BoolVar(&lf.all, "all", false, "every dead letter")
	cmd.Flags().BoolVar(&lf.dryRun, "dry-run", false, "say what would be done, change nothing")
	cmd.Flags().BoolVarP(&lf.yes, "yes", "y", false, "do not ask before more than one is changed")
}

type changeFunc func(ctx context.Context, store *dlq.Store, e dlq.Entry) (changed, error)

func (c *cli) changeLetters(cmd *cobra.Command, args []string, lf *letterFlags, change changeFunc) error {
	seqs, filter, err := c.which(args, lf)
	if err != nil {
		return err
	}
	switch chosen := lf.chooses() || lf.all; {
	case len(seqs) == 0 && !chosen:
		return usagef("which ones? Give SEQs of 'avatarworker dlq ls', filters, or --all")
	case len(seqs) > 0 && chosen:
		return usagef("give SEQs, or filters: not both")
	case cmd.Name() == removeName && lf.all && !lf.chooses() && !lf.yes && !lf.dryRun && !c.interactive():
		return usagef("--all removes every dead letter for good: add -y if that is meant, or filters")
	}
	l, err := c.connect(cmd.Context(), "dlq "+cmd.Name())
	if err != nil {
		return err
	}
	defer l.close()
	store := dlq.NewStore(l.js, l.names, nil)
	chosen := named(seqs)
	if len(seqs) == 0 {
		if chosen, err = l.lettersNow(cmd.Context(), store, filter, lf.limit); err != nil {
			return err
		}
	}
	if !lf.yes && !lf.dryRun && c.interactive() {
		if err := c.confirm(cmd, chosen); err != nil {
			return err
		}
	}
	return c.changeEach(cmd.Context(), l, store, chosen, change, lf.asJSON)
}

// removeName is the name of the command that can't be undone.
const removeName = "rm"

// confirm asks before more than one letter is changed.
func (c *cli) confirm(cmd *cobra.Command, letters iter.Seq2[dlq.Entry, error]) error {
	n := 0
	for _, err := range letters {
		if err != nil {
			return err
		}
		n++
	}
	if n < 2 {
		return nil
	}
	question := "Replay %s?"
	if cmd.Name() == removeName {
		question = "Remove %s for good?"
	}
	yes, err := c.ask(cmd.Context(), fmt.Sprintf(question, terminal.Count(n, "dead letter")))
	if err == nil && !yes {
		err = errors.New("nothing was changed")
	}
	return err
}

func named(seqs []uint64) iter.Seq2[dlq.Entry, error] {
	return func(yield func(dlq.Entry, error) bool) {
		for _, seq := range seqs {
			if !yield(dlq.Entry{Seq: seq}, nil) {
				return
			}
		}
	}
}

// lettersNow are the letters that are there now. A job that is replayed and
// fails at once comes back as a new letter, which is not meant.
func (l *link) lettersNow(ctx context.Context, store *dlq.Store, filter dlq.Filter, limit int) (iter.Seq2[dlq.Entry, error], error) {
	stream, err := l.js.Stream(ctx, l.names.DLQStream())
	if err != nil {
		return nil, l.names.Unavailable("stream "+l.names.DLQStream(), err)
	}
	last := stream.CachedInfo().State.LastSeq
	return func(yield func(dlq.Entry, error) bool) {
		for e, err := range store.List(ctx, filter, limit) {
			if err == nil && e.Seq > last {
				if filter.Newest {
					continue
				}
				return
			}
			if !yield(e, err) {
				return
			}
		}
	}, nil
}

// changeEach does it letter by letter. An interrupt lets the letter in hand
// finish; a letter that fails does not keep the next from being tried.
func (c *cli) changeEach(ctx context.Context, l *link, store *dlq.Store, letters iter.Seq2[dlq.Entry, error], change changeFunc, asJSON bool) error {
	report := c.newChangeReport(asJSON)
	var stopped error
	for e, err := range letters {
		if stopped = errors.Join(err, ctx.Err()); stopped != nil {
			break
		}
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), letterTimeout)
		r, err := change(one, store, e)
		cancel()
		if err != nil {
			r.Error = err.Error()
			if r.Status != dlq.StatusReplayed {
				r.Status = statusFailed
			}
		}
		if err := report.add(r); err != nil {
			return err
		}
		if r.Error != "" && !l.nc.IsConnected() {
			stopped = fmt.Errorf("the connection to NATS was lost")
			break
		}
	}
	return errors.Join(report.end(), report.verdict(ctx, stopped))
}

// changeReport shows what becomes of each letter, and counts.
type changeReport struct {
	c      *cli
	json   *array // nil: lines
	counts map[dlq.Status]int
	errors int
	total  int
}

func (c *cli) newChangeReport(asJSON bool) *changeReport {
	r := &changeReport{c: c, counts: make(map[dlq.Status]int)}
	if asJSON {
		r.json = &array{w: c.stdout}
	}
	return r
}

func (r *changeReport) add(ch changed) error {
	r.total++
	r.counts[ch.Status]++
	if ch.Error != "" {
		r.errors++
	}
	if r.json != nil {
		return r.json.add(ch)
	}
	line := fmt.Sprintf("%d  %s  %s", ch.Seq, terminal.OrDash(ch.JobID), ch.Status)
	switch ch.Status {
	case dlq.StatusReplayed, dlq.StatusWouldReplay:
		line += fmt.Sprintf("  run %d on %s", ch.Run, ch.Subject)
		if ch.Corrected != "" {
			line += ", corrected"
		}
	case dlq.StatusAlready:
		line += fmt.Sprintf("  run %d is in the queue, or was", ch.Run)
	case dlq.StatusDeadlinePassed:
		line += fmt.Sprintf("  its deadline was %s; --ignore-deadline replays it", ch.Deadline.UTC().Format("2006-01-02T15:04:05Z"))
	}
	if ch.Error != "" {
		line += "  " + errors.RedactText(ch.Error)
	}
	_, err := fmt.Fprintln(r.c.stdout, terminal.Plain(line))
	return err
}

func (r *changeReport) end() error {
	if r.json != nil {
		return r.json.end()
	}
	return nil
}

// verdict sums up on stderr, and gives the command's error.
func (r *changeReport) verdict(ctx context.Context, stopped error) error {
	text := terminal.Count(r.total, "dead letter")
	for _, s := range []dlq.Status{
		dlq.StatusReplayed, dlq.StatusWouldReplay, dlq.StatusAlready, dlq.StatusDeadlinePassed, statusRemoved, statusWouldRemove, statusFailed,
	} {
		if n := r.counts[s]; n > 0 {
			text += fmt.Sprintf(", %d %s", n, s)
		}
	}
	r.c.note("%s", text)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted: repeat the command to go on, nothing is done twice")
	case stopped != nil:
		return fmt.Errorf("stopped: %w: repeat the command to go on, nothing is done twice", stopped)
	case r.errors > 0:
		return errShown
	}
	return nil
}
