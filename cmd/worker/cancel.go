package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/status"
)

// storeTimeout bounds one round trip to a bucket.
const storeTimeout = 5 * time.Second

func newCancelCommand(c *cli) *cobra.Command {
	var (
		bf        bulkFlags
		ifUnknown bool
	)
	cmd := &cobra.Command{
		Use: "cancel [JOB…]", Short: "End jobs, running or not",
		Long: `Ends jobs. Give job ids, filters, or --all; filters choose among the jobs that
have no outcome yet, those that only wait in their queue among them. Answers
"cancelled", "requested" (it will be, when it is next delivered), "finished" with
the outcome (it is too late) or "unknown": no record and no waiting job has this
id. With the last two the exit code is 1. It may be repeated.`,
		ValidArgsFunction: c.completeJobs(onTheWay()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.runBulk(cmd.Context(), "cancel", args, &bf, bulk{verb: "Cancel", states: onTheWay(), change: c.canceller(ifUnknown)})
		},
	}
	bf.register(c, cmd, "without an outcome")
	cmd.Flags().BoolVar(&ifUnknown, "if-unknown", false, "also cancel a job that has not been published yet")
	return cmd
}

// records opens the bucket of records.
func (l *link) records(ctx context.Context) (*kv.Store, error) {
	if l.store == nil {
		bucket, err := l.js.KeyValue(ctx, l.names.StateBucket())
		if err != nil {
			return nil, l.names.Unavailable("bucket "+l.names.StateBucket(), err)
		}
		l.store = kv.NewStore(l.js, bucket, storeTimeout)
	}
	return l.store, nil
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
	found, looked, err := status.NewStore(l.js, l.names, c.now, 0).Waiting(ctx, id)
	if err != nil {
		l.log.Debug().Err(err).Msg("looking for the job in its queue")
		return false, nil
	}
	if found != nil || !looked.All {
		return false, nil
	}
	return noRecord() // it may have been taken meanwhile
}

func checkJobID(id string) error {
	if !jobspec.ValidID(id) {
		return usagef("%q is not a job id: want 1 to 64 of A-Z a-z 0-9 _ -", id)
	}
	return nil
}
