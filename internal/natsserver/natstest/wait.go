package natstest

import (
	"context"
	"encoding/json"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Patience is how long a test waits for what must happen: far longer than it takes,
// also on a busy machine.
const Patience = 3 * time.Minute

// Unhurried makes a time of a test longer under the race detector, in which NATS, the
// backend and the test take several times as long.
func Unhurried(d time.Duration) time.Duration {
	if Raced {
		return 3 * d
	}
	return d
}

// Eventually waits until ok returns true, and fails the test if it never does. It is
// for what nothing signals.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	EventuallyWithin(t, Patience, what, ok)
}

// EventuallyWithin is Eventually with a limit of its own.
func EventuallyWithin(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	again, deadline := time.NewTicker(10*time.Millisecond), time.After(limit)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}

// Value waits until a key's value is as wanted, and returns it.
func Value[V any](t testing.TB, bucket jetstream.KeyValue, key string, wanted func(V) bool) V {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	watcher, err := bucket.Watch(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	last := "none"
	for {
		select {
		case entry, open := <-watcher.Updates():
			if !open {
				t.Fatalf("the watch of %s ended", key)
			}
			if entry == nil || entry.Operation() != jetstream.KeyValuePut {
				continue
			}
			var v V
			last = string(entry.Value())
			if err := json.Unmarshal(entry.Value(), &v); err != nil {
				t.Fatal(err)
			}
			if wanted(v) {
				return v
			}
		case <-ctx.Done():
			t.Fatalf("%s does not become what it should; its value: %s", key, last)
		}
	}
}

// Lateness measures how late the machine wakes this process, until the test ends. The
// function that it returns gives the longest delay so far.
func Lateness(t testing.TB) func() time.Duration {
	const every = 20 * time.Millisecond
	var longest atomic.Int64
	ended, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(ended); <-stopped })
	go func() {
		defer close(stopped)
		for due := time.Now().Add(every); ; due = time.Now().Add(every) {
			select {
			case <-ended:
				return
			case <-time.After(every):
				longest.Store(max(longest.Load(), int64(time.Since(due))))
			}
		}
	}()
	return func() time.Duration { return time.Duration(longest.Load()) }
}

// ForgetIDs waits until a stream has forgotten the message ids that it knows now: that is
// some time after its duplicate window, in the order in which they came. It publishes to
// subject, which no other message of the stream has, and removes what it published.
func ForgetIDs(t testing.TB, js jetstream.JetStream, stream, subject string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	stored := 0
	Eventually(t, "stream "+stream+" forgets an id", func() bool {
		ack, err := js.Publish(ctx, subject, nil, jetstream.WithMsgID("probe"))
		if err != nil {
			t.Fatal(err)
		}
		if !ack.Duplicate {
			stored++
		}
		return stored == 2
	})
	s, err := js.Stream(ctx, stream)
	if err == nil {
		err = s.Purge(ctx, jetstream.WithPurgeSubject(subject))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// UnwatchedBucket can't be watched while it is away.
type UnwatchedBucket struct {
	jetstream.KeyValue
	Away *atomic.Bool
}

// Watch opens a watcher.
func (b *UnwatchedBucket) Watch(ctx context.Context, keys string, opts ...jetstream.WatchOpt) (jetstream.KeyWatcher, error) {
	if b.Away.Load() {
		return nil, nats.ErrTimeout
	}
	return b.KeyValue.Watch(ctx, keys, opts...)
}

// EndingBucket sends the watchers it opens to Watchers, for the test to end.
type EndingBucket struct {
	jetstream.KeyValue
	Watchers chan jetstream.KeyWatcher
}

// Watch opens a watcher.
func (b *EndingBucket) Watch(ctx context.Context, keys string, opts ...jetstream.WatchOpt) (jetstream.KeyWatcher, error) {
	w, err := b.KeyValue.Watch(ctx, keys, opts...)
	if err == nil {
		b.Watchers <- w
	}
	return w, err
}
