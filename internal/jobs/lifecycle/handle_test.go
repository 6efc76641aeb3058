package lifecycle_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
)

// A write finds the request in its way, and is not answered then.
func TestARequestToCancelIsKeptThoughTheWriteThatFoundItFailed(t *testing.T) {
	t.Parallel()
	direct := natstest.JetStream(t)
	bucket, err := direct.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "STATE", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	var left atomic.Int32 // writes that still reach the server
	left.Store(1000)
	js := natstest.Way(t, direct.Conn(), func(m *nats.Msg, publish func(*nats.Msg)) {
		if !strings.HasPrefix(m.Subject, "$KV.") || left.Add(-1) >= 0 {
			publish(m)
		}
	})
	through, err := js.KeyValue(t.Context(), "STATE")
	if err != nil {
		t.Fatal(err)
	}
	cancels := 0
	h := lifecycle.NewHandle(lifecycle.HandleOptions{
		Store: kv.NewStore(js, through, time.Second), JobID: "j", Now: time.Now, CancelSeen: func() { cancels++ },
	})
	if err := h.Put(t.Context(), &lifecycle.Record{JobID: "j", Run: 1, State: lifecycle.StateRunning, Session: 1, WorkerID: "w"}); err != nil {
		t.Fatal(err)
	}
	if _, err := lifecycle.NoteCancel(t.Context(), kv.NewStore(direct, bucket, time.Second), "j", time.Now()); err != nil {
		t.Fatal(err)
	}
	left.Store(1) // the one that conflicts
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := h.Change(ctx, func(r *lifecycle.Record) { r.Unsettled = 1 }); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v, want no answer", err)
	}
	left.Store(1000)
	for range 2 {
		if err := h.Change(t.Context(), func(r *lifecycle.Record) { r.Unsettled = 2 }); err != nil {
			t.Fatal(err)
		}
	}
	r, err := h.Load(t.Context())
	if err != nil || !r.CancelRequested || r.Unsettled != 2 || cancels != 1 {
		t.Errorf("%+v: CancelSeen was called %d times: %v", r, cancels, err)
	}
}
