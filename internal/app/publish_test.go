package app

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

func TestPublishWhoseAcknowledgementIsLostIsNotWaitedForForGood(t *testing.T) {
	t.Parallel()
	nc := natstest.Connect(t, natstest.Start(t))
	js, err := jetstream.New(nc, publishLimits(50*time.Millisecond)...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe("avatar.events.>", func(*nats.Msg) {}); err != nil { // takes it, and says nothing
		t.Fatal(err)
	}
	future, err := js.PublishAsync("avatar.events.started.j1", nil)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-future.Err():
		if !errors.Is(err, jetstream.ErrAsyncPublishTimeout) || js.PublishAsyncPending() != 0 {
			t.Errorf("%v, %d still on their way", err, js.PublishAsyncPending())
		}
	case <-time.After(10 * time.Second):
		t.Error("still on its way")
	}
}
