package streams_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/streams"
)

func TestMain(m *testing.M) { natstest.Main(m) }

func TestScanReadsWhatWasThereAndNoMore(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
	if err != nil {
		t.Fatal(err)
	}
	const all = 1200
	for range all {
		if _, err := js.Publish(t.Context(), "s", nil); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	err = streams.Scan(t.Context(), stream, jetstream.ConsumerConfig{}, func(_ jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		seen++
		if meta.Sequence.Stream != uint64(seen) {
			t.Fatalf("message %d came as number %d", meta.Sequence.Stream, seen)
		}
		return true
	})
	if err != nil || seen != all {
		t.Errorf("%d of %d, %v", seen, all, err)
	}
	if list := stream.ConsumerNames(t.Context()); len(list.Name()) != 0 {
		t.Error("a consumer stays")
	}
	first := 0
	if err := streams.Scan(t.Context(), stream, jetstream.ConsumerConfig{}, func(jetstream.Msg, *jetstream.MsgMetadata) bool {
		first++
		return false
	}); err != nil || first != 1 {
		t.Errorf("read %d after it had enough, %v", first, err)
	}
}

// The server removes a consumer that nothing asks for a minute.
func TestScanGoesOnAfterTheServerForgotItsConsumer(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
	if err != nil {
		t.Fatal(err)
	}
	const all = 2200
	for range all {
		if _, err := js.PublishAsync("s", nil); err != nil {
			t.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	seen := 0
	err = streams.Scan(t.Context(), stream, jetstream.ConsumerConfig{}, func(_ jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		seen++
		if meta.Sequence.Stream != uint64(seen) {
			t.Fatalf("message %d came as number %d", meta.Sequence.Stream, seen)
		}
		if seen%1024 == 0 { // a batch is over
			for name := range stream.ConsumerNames(t.Context()).Name() {
				if err := stream.DeleteConsumer(t.Context(), name); err != nil {
					t.Fatal(err)
				}
			}
		}
		return true
	})
	if err != nil || seen != all {
		t.Errorf("%d of %d, %v", seen, all, err)
	}
}
