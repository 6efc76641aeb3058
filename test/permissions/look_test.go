package permissions_test

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

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
		func(ctx context.Context) error {
			// Without it they are followed message by message.
			for _, bucket := range []string{names.StateBucket(), names.FleetBucket()} {
				stream, err := c.js.Stream(ctx, "KV_"+bucket)
				if err == nil {
					_, err = stream.GetMsg(ctx, 1, jetstream.WithGetMsgSubject("$KV."+bucket+".>"))
				}
				if err != nil {
					return must(err, "read bucket "+bucket+" directly")
				}
			}
			return nil
		},
		func(ctx context.Context) error {
			model := status.NewModel(store, time.Hour)
			ctx, cancel := context.WithCancel(ctx)
			var running sync.WaitGroup
			running.Go(func() { model.Run(ctx) })
			defer running.Wait()
			defer cancel()
			f, err := model.Fleet(ctx)
			if err == nil && len(f.Workers) != 1 {
				err = fmt.Errorf("workers: %+v", f.Workers)
			}
			return must(err, "follow the fleet")
		},
		func(ctx context.Context) error { _, err := store.Job(ctx, "R"); return must(err, "look at a job") },
		func(ctx context.Context) error {
			return must(readFirst(ctx, c.js, names.EventsStream()), "follow the events")
		},
	)
}
