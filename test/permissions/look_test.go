package permissions_test

import (
	"context"
	"fmt"

	"avatarworker/internal/status"
)

// look reads what `avatarworker status` and `avatarworker status JOB` read, and what
// `avatarworker events` does.
func look(ctx context.Context, c client) error {
	store := status.NewStore(c.js, names, nil, 0)
	return firstOf(ctx,
		func(ctx context.Context) error {
			f, err := store.Fleet(ctx)
			if err == nil && len(f.Storage) != len(names.Kept()) {
				err = fmt.Errorf("storage: only %+v", f.Storage)
			}
			return must(err, "look at the fleet")
		},
		func(ctx context.Context) error {
			_, err := store.Jobs(ctx, status.Query{})
			return must(err, "list jobs")
		},
		func(ctx context.Context) error {
			// Without it the list is read message by message.
			jobs, err := c.js.Stream(ctx, names.JobsStream())
			if err == nil {
				_, err = jobs.GetMsg(ctx, 1)
			}
			return must(err, "read jobs directly")
		},
		func(ctx context.Context) error { _, err := store.Job(ctx, "R"); return must(err, "look at a job") },
		func(ctx context.Context) error {
			return must(readFirst(ctx, c.js, names.EventsStream()), "follow the events")
		},
	)
}
