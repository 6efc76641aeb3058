package streams_test

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/streams"
)

func TestAReaderThatStoppedLeavesItsConsumerForHalfAMinuteAtMost(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s", nil); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	err = streams.Follow(t.Context(), stream, jetstream.OrderedConsumerConfig{}, func(jetstream.Msg, *jetstream.MsgMetadata) error { return enough })
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
	left := stream.ListConsumers(t.Context())
	for c := range left.Info() {
		if c.Config.InactiveThreshold > 30*time.Second {
			t.Errorf("kept for %v", c.Config.InactiveThreshold)
		}
	}
	if err := left.Err(); err != nil {
		t.Fatal(err)
	}
}
