package main

import (
	"github.com/spf13/cobra"

	"avatarworker/internal/jobs/jobspec"
)

func newCancelCommand(c *cli) *cobra.Command {
	var (
		bf        bulkFlags
		ifUnknown bool
	)
	cmd := &cobra.Command{
		Use: "cancel [JOB…]", Short: "End jobs, running or not",
		Long: `Ends jobs. Give job ids, filters, or --all; filters choose among the jobs that
have no outcome yet, including those that only wait in their queue. Answers
"cancelled", "requested" (it will be, when it is next delivered), "finished" with
the outcome (it is too late) or "unknown": no record and no waiting job has this
id. With the last two the exit code is 1. The command may be repeated.`,
		ValidArgsFunction: c.completeJobs(onTheWay()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.runBulk(cmd.Context(), "cancel", args, &bf, bulk{verb: "Cancel", states: onTheWay(), change: c.canceller(ifUnknown)})
		},
	}
	bf.register(c, cmd, "without an outcome")
	cmd.Flags().BoolVar(&ifUnknown, "if-unknown", false, "also cancel a job that has not been published yet")
	return cmd
}

func checkJobID(id string) error {
	if !jobspec.ValidID(id) {
		return usagef("%q is not a job id: want 1 to 64 of A-Z a-z 0-9 _ -", id)
	}
	return nil
}
