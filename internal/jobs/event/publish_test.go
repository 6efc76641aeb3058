package event

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

func eventsStream(ctx context.Context, t *testing.T, js jetstream.JetStream) jetstream.Stream {
	t.Helper()
	stream, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "AVATAR_EVENTS", Subjects: []string{"avatar.events.>", "avatar.errors.>", "avatar.alerts.>"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func testContext(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestPublishedEventIsStoredOnceHoweverOftenItIsPublished(t *testing.T) {
	t.Parallel()
	ctx := testContext(t, 30*time.Second)
	js := natstest.JetStream(t)
	stream := eventsStream(ctx, t, js)
	publisher := NewPublisher(js.Conn(), testSubjects{}, "host a", zerolog.Nop())
	event := goldenEvents()["started"]
	for range 2 {
		if err := publisher.Publish(ctx, event); err != nil {
			t.Fatal(err)
		}
	}
	if err := publisher.Send(event); err != nil {
		t.Fatal(err)
	}
	// The server has handled it once it has answered what came after it.
	if fresh, err := publisher.PublishNew(ctx, event); err != nil || fresh {
		t.Fatalf("fresh %t; %v", fresh, err)
	}
	info, err := stream.Info(ctx)
	if err != nil || info.State.Msgs != 1 {
		t.Fatalf("%d stored, %v", info.State.Msgs, err)
	}
	stored, err := stream.GetMsg(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	// As a subscriber sees it: the names of the headers as they were written.
	if got := stored.Header["traceparent"]; stored.Subject != "avatar.events.started.J" || len(got) != 1 || got[0] != event.TraceParent {
		t.Errorf("subject %s, headers %v", stored.Subject, stored.Header)
	}
}

// firstTry is closed by the log line of a try that was not acknowledged.
type firstTry struct {
	seen chan struct{}
	text bytes.Buffer
}

func (f *firstTry) Write(p []byte) (int, error) {
	if f.text.Len() == 0 {
		close(f.seen)
	}
	return f.text.Write(p)
}

func TestPublishOutlastsAStreamThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	ctx := testContext(t, 30*time.Second)
	js := natstest.JetStream(t)
	logged := &firstTry{seen: make(chan struct{})}
	publisher := NewPublisher(js.Conn(), testSubjects{}, "w", zerolog.New(logged))
	done := make(chan error, 1)
	go func() { done <- publisher.Publish(ctx, goldenEvents()["completed"]) }()
	<-logged.seen
	stream := eventsStream(ctx, t, js)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if info, err := stream.Info(ctx); err != nil || info.State.Msgs != 1 {
		t.Fatalf("%d stored, %v", info.State.Msgs, err)
	}
}

func TestPublishOutlastsARestartOfTheServer(t *testing.T) {
	t.Parallel()
	ctx := testContext(t, 60*time.Second)
	options := natsserver.Options{StoreDir: t.TempDir(), Port: natstest.Port(t)}
	first := natstest.StartWith(t, options)
	js, err := jetstream.New(natstest.Connect(t, first, nats.ReconnectWait(20*time.Millisecond), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1)))
	if err != nil {
		t.Fatal(err)
	}
	eventsStream(ctx, t, js)
	if err := first.Shutdown(); err != nil {
		t.Fatal(err)
	}

	logged := &firstTry{seen: make(chan struct{})}
	publisher := NewPublisher(js.Conn(), testSubjects{}, "w", zerolog.New(logged))
	done := make(chan error, 1)
	go func() { done <- publisher.Publish(ctx, goldenEvents()["completed"]) }()
	<-logged.seen

	natstest.StartWith(t, options)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestPublishGivesUpWithItsContextAndSaysWhy(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	logged := &firstTry{seen: make(chan struct{})}
	publisher := NewPublisher(js.Conn(), testSubjects{}, "w", zerolog.New(logged))
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("drain time is up")
	go func() {
		<-logged.seen
		cancel(reason)
	}()
	err := publisher.Publish(ctx, goldenEvents()["held"])
	if !errors.Is(err, reason) || !strings.Contains(err.Error(), "J.run1.s3.held.h2") {
		t.Errorf("got %v", err)
	}
}

func TestPublishFailsAtOnceWhereNoTryCouldHelp(t *testing.T) {
	t.Parallel()
	ctx := testContext(t, 30*time.Second)
	js := natstest.JetStream(t)
	eventsStream(ctx, t, js)
	publisher := NewPublisher(js.Conn(), testSubjects{}, "w", zerolog.Nop())
	huge := goldenEvents()["held"]
	huge.Body = Held{Reason: strings.Repeat("x", 2<<20)}
	if err := publisher.Publish(ctx, huge); !errors.Is(err, nats.ErrMaxPayload) {
		t.Errorf("too large: got %v", err)
	}
	js.Conn().Close()
	if err := publisher.Publish(ctx, goldenEvents()["held"]); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("closed: got %v", err)
	}
	if ctx.Err() != nil {
		t.Error("only after the time was up")
	}
}
