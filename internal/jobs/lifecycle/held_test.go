package lifecycle

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

func TestAHoldIsNotWrittenAgainWhereOnlyNumbersInItsTextDiffer(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	bucket, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "STATE"})
	if err != nil {
		t.Fatal(err)
	}
	h := NewHandle(HandleOptions{Store: kv.NewStore(js, bucket, time.Minute), JobID: "j", Now: time.Now})
	due := time.Now()
	r := &Record{JobID: "j", State: StateHeld, HeldReason: HeldStorage, HeldWhy: "12 bytes left of 1000", HeldSince: &due, NextAttemptAt: &due}
	if err := h.Put(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ why, want string }{
		{"8 bytes left of 1000", "12 bytes left of 1000"},
		{"the stream is gone", "the stream is gone"},
	} {
		if err := h.UpdateHeldText(t.Context(), h.Current(), c.why); err != nil {
			t.Fatal(err)
		}
		if got, err := h.Load(t.Context()); err != nil || got.HeldWhy != c.want {
			t.Errorf("held because %q, %v; want %q", got.HeldWhy, err, c.want)
		}
	}
}
