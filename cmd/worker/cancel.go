package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/jobs"
)

// storeTry bounds one round trip to a bucket, cancelTime a whole request.
const (
	storeTry   = 5 * time.Second
	cancelTime = 20 * time.Second
)

func newCancelCommand(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "cancel JOB", Short: "End a job, running or not",
		Long: `Ends a job. Answers "cancelled", "requested" (it will be, when it is next
delivered) or "finished" with the outcome: then it is too late, and the exit
code is 1.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.cancel(cmd.Context(), args[0], asJSON) },
	}
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) cancel(ctx context.Context, jobID string, asJSON bool) error {
	if err := checkJobID(jobID); err != nil {
		return err
	}
	l, err := c.connect(ctx, "cancel")
	if err != nil {
		return err
	}
	defer l.close()
	kv, err := l.js.KeyValue(ctx, l.names.StateBucket())
	if err != nil {
		return l.missing("bucket "+l.names.StateBucket(), err)
	}
	ctx, done := context.WithTimeout(ctx, cancelTime)
	defer done()
	store, err := jobs.NewStore(l.js, kv, storeTry)
	if err != nil {
		return err
	}
	reply, err := jobs.RequestCancel(ctx, l.nc, store, l.names.Control(jobID), jobID)
	if err != nil {
		return fmt.Errorf("cancelling job %s: %w", jobID, err)
	}
	if err := c.printCancel(reply, asJSON); err != nil {
		return err
	}
	if reply.Status != jobs.StatusCancelled && reply.Status != jobs.StatusRequested {
		return errShown
	}
	return nil
}

func (c *cli) printCancel(reply jobs.ControlReply, asJSON bool) error {
	if asJSON {
		return c.printJSON(reply)
	}
	text := reply.Status
	if reply.Outcome != "" && reply.Status == jobs.StatusFinished {
		text += fmt.Sprintf(" (%s)", reply.Outcome)
	}
	if reply.Message != "" {
		text += ": " + plain(reply.Message)
	}
	_, err := fmt.Fprintln(c.stdout, text)
	return err
}

func checkJobID(id string) error {
	if !jobs.ValidJobID(id) {
		return usagef("%q is no job id: want 1 to 64 of A-Z a-z 0-9 _ -", id)
	}
	return nil
}
