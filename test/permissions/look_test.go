package permissions_test

import (
	"context"

	"avatarworker/internal/status"
)

// look reads what `avatarworker status` and `avatarworker status JOB` read, and what
// `avatarworker events` does.
func look(ctx context.Context, c client) error {
	store := status.NewStore(c.js, names, nil, 0)
	return firstOf(ctx,
		func(ctx context.Context) error { _, err := store.Fleet(ctx); return must(err, "look at the fleet") },
		func(ctx context.Context) error { _, err := store.Job(ctx, "R"); return must(err, "look at a job") },
		func(ctx context.Context) error {
			return must(readFirst(ctx, c.js, names.EventsStream()), "follow the events")
		},
	)
}
