package audio

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/natsserver/natstest"
)

// The client never fails a request that was lost: it waits until its context ends.
func TestARequestThatWasLostHoldsUpNoLiveSpeech(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	js := natstest.Losing(t, natstest.Start(t).ClientURL(), "CONSUMER.CREATE")
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "LIVE", Subjects: []string{"live.*"}, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.PublishMsg(ctx, &nats.Msg{Subject: "live.job", Header: nats.Header{HeaderEnd: {"true"}}, Data: []byte{1, 0}}); err != nil {
		t.Fatal(err)
	}
	l, err := OpenLive(ctx, js, LiveSpec{Stream: "LIVE", Subject: "live.job", SampleRate: 16000, MaxSilence: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if begun, err := l.Begin(ctx); err != nil || !begun {
		t.Fatalf("begun: %t %v", begun, err)
	}
	if data, _, err := l.Next(ctx); err != io.EOF || len(data) != 2 {
		t.Errorf("%d bytes: %v", len(data), err)
	}
}
