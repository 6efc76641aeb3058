package kv_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/retry"
)

func newBucket(t *testing.T, js jetstream.JetStream) jetstream.KeyValue {
	t.Helper()
	bucket, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "B", LimitMarkerTTL: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return bucket
}

func newStore(t *testing.T) *kv.Store {
	t.Helper()
	js := natstest.JetStream(t)
	return kv.NewStore(js, newBucket(t, js), 2*time.Second)
}

func put(t *testing.T, s *kv.Store, v string, revision uint64) uint64 {
	t.Helper()
	next, err := s.Put(t.Context(), "k", v, revision)
	if err != nil {
		t.Fatalf("put %s at %d: %v", v, revision, err)
	}
	return next
}

// holds checks what the key holds; "" is nothing.
func holds(t *testing.T, s *kv.Store, want string) {
	t.Helper()
	var got string
	if _, err := s.Get(t.Context(), "k", &got); err != nil || got != want {
		t.Errorf("the key holds %q, want %q; %v", got, want, err)
	}
}

func TestOnlyTheRevisionThatWasReadIsReplaced(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	first := put(t, s, "a", 0)
	second := put(t, s, "b", first)
	for _, revision := range []uint64{0, first, second + 5} {
		if _, err := s.Put(t.Context(), "k", "c", revision); !errors.Is(err, kv.ErrConflict) {
			t.Errorf("put at %d, where %d is stored: %v", revision, second, err)
		}
	}
	if err := s.Remove(t.Context(), "k", first); !errors.Is(err, kv.ErrConflict) {
		t.Errorf("removed at an old revision: %v", err)
	}
	holds(t, s, "b")
}

func TestARemovedKeyCanBeCreatedAgain(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	if err := s.Remove(t.Context(), "k", put(t, s, "a", 0)); err != nil {
		t.Fatal(err)
	}
	holds(t, s, "")
	if stored, err := s.Stored(t.Context(), "k"); err != nil || !stored.IsZero() {
		t.Errorf("stored at %v; %v", stored, err)
	}
	put(t, s, "b", 0)
	holds(t, s, "b")
}

func TestAValueWithATTLExpires(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	if _, err := s.PutTTL(t.Context(), "k", "a", 0, 500*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	holds(t, s, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		stored, err := s.Stored(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		if stored.IsZero() {
			break
		}
		if err := retry.Pause(ctx, 50*time.Millisecond, errors.New("the value does not expire")); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, "b", 0)
}

// behind is a bucket behind a way on which pass publishes what is written, or does not.
func behind(t *testing.T, timeout time.Duration, pass func(write bool, m *nats.Msg, publish func(*nats.Msg))) *kv.Store {
	t.Helper()
	js := natstest.Way(t, natstest.Connect(t, natstest.Start(t)), func(m *nats.Msg, publish func(*nats.Msg)) {
		pass(strings.HasPrefix(m.Subject, "$KV."), m, publish)
	})
	return kv.NewStore(js, newBucket(t, js), timeout)
}

// A write whose acknowledgement got lost has landed: repeating it conflicts with
// itself, which is not a conflict.
func TestAWriteThatLandedWithoutAnAnswerIsRecognised(t *testing.T) {
	t.Parallel()
	var writes atomic.Int32
	s := behind(t, 300*time.Millisecond, func(write bool, m *nats.Msg, publish func(*nats.Msg)) {
		if write && writes.Add(1) == 1 {
			m.Reply = ""
		}
		publish(m)
	})
	revision := put(t, s, "a", 0)
	if n := writes.Load(); n < 2 {
		t.Errorf("%d writes: none was lost", n)
	}
	put(t, s, "b", revision)
	holds(t, s, "b")
}

// On a slow way every answer comes after the timeout of its own request.
func TestAWriteIsRecognisedThoughEachAnswerIsLate(t *testing.T) {
	t.Parallel()
	s := behind(t, 100*time.Millisecond, func(write bool, m *nats.Msg, publish func(*nats.Msg)) {
		if write {
			time.AfterFunc(250*time.Millisecond, func() { publish(m) })
		} else {
			publish(m)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	var revision uint64
	for _, v := range []string{"a", "b", "c"} {
		next, err := s.Put(ctx, "k", v, revision)
		if err != nil {
			t.Fatalf("put %s at %d: %v", v, revision, err)
		}
		revision = next
	}
	holds(t, s, "c")
	if _, err := s.Put(ctx, "k", "d", revision-1); !errors.Is(err, kv.ErrConflict) {
		t.Errorf("put at an old revision: %v", err)
	}
	holds(t, s, "c")
}

// Nothing answers, then the bucket is there.
func TestAWriteWaitsForABucketThatNothingAnswersFor(t *testing.T) {
	t.Parallel()
	var refused atomic.Int32
	s := behind(t, 100*time.Millisecond, func(write bool, m *nats.Msg, publish func(*nats.Msg)) {
		if write && refused.Add(1) <= 3 {
			m.Subject = "nobody.listens"
		}
		publish(m)
	})
	put(t, s, "a", 0)
	holds(t, s, "a")
}

func TestWhatIsNotOursIsAnErrorThatNamesKeyAndBucket(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	bucket := newBucket(t, js)
	if _, err := bucket.Put(t.Context(), "k", []byte("not JSON")); err != nil {
		t.Fatal(err)
	}
	var v string
	_, err := kv.NewStore(js, bucket, time.Second).Get(t.Context(), "k", &v)
	if err == nil || !strings.Contains(err.Error(), "k in bucket B") {
		t.Errorf("got %v", err)
	}
}

func TestEntriesAreThoseOfTheFilters(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	bucket := newBucket(t, js)
	for _, key := range []string{"a.1", "a.2", "b.1"} {
		if _, err := bucket.Put(t.Context(), key, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := bucket.Delete(t.Context(), "a.2"); err != nil {
		t.Fatal(err)
	}
	entries, err := kv.Entries(t.Context(), bucket, "a.*")
	if err != nil || len(entries) != 1 || entries[0].Key() != "a.1" {
		t.Errorf("got %v; %v", entries, err)
	}
}

func TestAWatchEndsWhenItsBucketIsMadeAgain(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	s := kv.NewStore(js, newBucket(t, js), 50*time.Millisecond)
	put(t, s, "b", put(t, s, "a", 0)) // the new bucket has not as many revisions
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	old, err := s.Watch(ctx, "*")
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteKeyValue(ctx, "B"); err != nil {
		t.Fatal(err)
	}
	newBucket(t, js)
	for range old.Updates() {
	}
	if ctx.Err() != nil {
		t.Fatal("the watch goes on")
	}
	old.Stop()
	put(t, s, "c", 0)
	w, err := s.Watch(ctx, "*")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if e := <-w.Updates(); e == nil || string(e.Value()) != `"c"` || w.Created.Equal(old.Created) {
		t.Errorf("%v in a bucket of %s; the other was of %s", e, w.Created, old.Created)
	}
}
