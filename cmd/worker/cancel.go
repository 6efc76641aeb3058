package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/status"
)

// storeTimeout bounds one round trip to a bucket, cancelTimeout a whole request.
const (
	storeTimeout  = 5 * time.Second
	cancelTimeout = 20 * time.Second
)

func newCancelCommand(c *cli) *cobra.Command {
	var asJSON, ifUnknown bool
	cmd := &cobra.Command{
		Use: "cancel JOB", Short: "End a job, running or not",
		Long: `Ends a job. Answers "cancelled", "requested" (it will be, when it is next
delivered), "finished" with the outcome (it is too late) or "unknown": no record
and no waiting job has this id. With the last two the exit code is 1.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.cancel(cmd.Context(), args[0], ifUnknown, asJSON)
		},
	}
	cmd.Flags().BoolVar(&ifUnknown, "if-unknown", false, "also cancel a job that has not been published yet")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) cancel(ctx context.Context, jobID string, ifUnknown, asJSON bool) error {
	if err := checkJobID(jobID); err != nil {
		return err
	}
	l, err := c.connect(ctx, "cancel")
	if err != nil {
		return err
	}
	defer l.close()
	bucket, err := l.js.KeyValue(ctx, l.names.StateBucket())
	if err != nil {
		return l.names.Unavailable("bucket "+l.names.StateBucket(), err)
	}
	ctx, done := context.WithTimeout(ctx, cancelTimeout)
	defer done()
	store := kv.NewStore(l.js, bucket, storeTimeout)
	if !ifUnknown {
		if unknown, err := c.unknownJob(ctx, l, store, jobID); err != nil {
			return err
		} else if unknown {
			reply := control.Reply{JobID: jobID, Status: statusUnknown, Message: "no record and no waiting job has this id; --if-unknown cancels it when it comes"}
			return errors.Join(c.printCancel(reply, asJSON), errShown)
		}
	}
	reply, err := jobs.RequestCancel(ctx, l.nc, store, l.names.Control(jobID), jobID)
	if err != nil {
		return fmt.Errorf("cancelling job %s: %w", jobID, err)
	}
	if err := c.printCancel(reply, asJSON); err != nil {
		return err
	}
	if reply.Status != control.StatusCancelled && reply.Status != control.StatusRequested {
		return errShown
	}
	return nil
}

// statusUnknown is the answer for a job that was never published, or long ago.
const statusUnknown = "unknown"

// unknownJob reports whether a job has no record and waits in no queue. It is
// false where that could not be found out: then the cancel is noted.
func (c *cli) unknownJob(ctx context.Context, l *link, store *kv.Store, id string) (bool, error) {
	noRecord := func() (bool, error) {
		revision, err := store.Get(ctx, id, &lifecycle.Record{})
		return revision == 0, err
	}
	if absent, err := noRecord(); err != nil || !absent {
		return false, err
	}
	found, all, err := status.NewStore(l.js, l.names, c.now, 0).Waiting(ctx, id)
	if err != nil {
		l.log.Debug().Err(err).Msg("looking for the job in its queue")
		return false, nil
	}
	if found != nil || !all {
		return false, nil
	}
	return noRecord() // it may have been taken meanwhile
}

func (c *cli) printCancel(reply control.Reply, asJSON bool) error {
	if asJSON {
		return c.printJSON(reply)
	}
	text := reply.Status
	if reply.Outcome != "" && reply.Status == control.StatusFinished {
		text += fmt.Sprintf(" (%s)", reply.Outcome)
	}
	if reply.Message != "" {
		text += ": " + plain(reply.Message)
	}
	_, err := fmt.Fprintln(c.stdout, text)
	return err
}

func checkJobID(id string) error {
	if !jobspec.ValidID(id) {
		return usagef("%q is not a job id: want 1 to 64 of A-Z a-z 0-9 _ -", id)
	}
	return nil
}
