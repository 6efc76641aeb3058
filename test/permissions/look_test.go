package permissions_test

import (
	"context"

	"github.com/nats-io/nats.go/jetstream"
)

// look reads what `worker status` reads.
func look(ctx context.Context, c client) error {
	return firstOf(ctx,
		func(ctx context.Context) error { return must(lookAtQueues(ctx, c.js), "look at the queues") },
		func(ctx context.Context) error { return must(lookAtFleet(ctx, c.js), "look at the fleet") },
		func(ctx context.Context) error {
			kv, err := c.js.KeyValue(ctx, names.StateBucket())
			if err == nil {
				_, err = kv.Get(ctx, "R")
			}
			return must(err, "read a record")
		},
		func(ctx context.Context) error {
			return must(scan(ctx, c.js, "KV_"+names.StateBucket()), "count the records")
		},
		func(ctx context.Context) error {
			return must(scan(ctx, c.js, names.EventsStream()), "read the events")
		},
		func(ctx context.Context) error {
			stream, err := c.js.Stream(ctx, names.EventsStream())
			if err == nil {
				_, err = stream.GetMsg(ctx, 1)
			}
			return must(err, "read one event")
		},
	)
}

func lookAtQueues(ctx context.Context, js jetstream.JetStream) error {
	stream, err := js.Stream(ctx, names.JobsStream())
	if err != nil {
		return err
	}
	list := stream.ListConsumers(ctx)
	for range list.Info() {
	}
	if err := list.Err(); err != nil {
		return err
	}
	_, err = stream.GetMsg(ctx, 1, jetstream.WithGetMsgSubject(names.Jobs("default")))
	return err
}

func lookAtFleet(ctx context.Context, js jetstream.JetStream) error {
	kv, err := js.KeyValue(ctx, names.FleetBucket())
	if err != nil {
		return err
	}
	watcher, err := kv.WatchFiltered(ctx, []string{"circuit.>", "worker.>"}, jetstream.IgnoreDeletes())
	if err != nil {
		return err
	}
	select {
	case <-watcher.Updates():
	case <-ctx.Done():
	}
	return watcher.Stop()
}

// scan reads a stream's first message through a short-lived consumer.
func scan(ctx context.Context, js jetstream.JetStream, name string) error {
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return err
	}
	c, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true})
	if err != nil {
		return err
	}
	batch, err := c.FetchNoWait(1)
	if err != nil {
		return err
	}
	for range batch.Messages() {
	}
	if err := batch.Error(); err != nil {
		return err
	}
	return stream.DeleteConsumer(ctx, c.CachedInfo().Name)
}
