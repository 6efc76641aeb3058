package jobspec

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/natsserver/natstest"
)

// deliver publishes messages into a work queue and takes them out of it again,
// in order.
func deliver(t testing.TB, messages ...*nats.Msg) []jetstream.Msg {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	js := natstest.JetStream(t)
	stream, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "AVATAR_JOBS", Subjects: []string{"avatar.jobs.*"}, Retention: jetstream.WorkQueuePolicy,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if m.Subject == "" {
			m.Subject = "avatar.jobs.default"
		}
		if _, err := js.PublishMsg(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	consumer, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
		Durable: "test", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []jetstream.Msg
	for len(got) < len(messages) {
		batch, err := consumer.Fetch(len(messages)-len(got), jetstream.FetchMaxWait(5*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		before := len(got)
		for m := range batch.Messages() {
			got = append(got, m)
		}
		if len(got) == before {
			t.Fatalf("got %d of %d messages: %v", len(got), len(messages), batch.Error())
		}
	}
	return got
}
