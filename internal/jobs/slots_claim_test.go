package jobs

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/natsserver/natstest"
)

func TestOneTokenDeliveredTwiceIsHeldOnce(t *testing.T) {
	ctx := testContext(t, 30*time.Second)
	js := natstest.JetStream(t)
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "FLEET"})
	if err != nil {
		t.Fatal(err)
	}
	store, err := NewStore(js, kv, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	asks := &asker{
		nc: js.Conn(), subject: func(id string) string { return "workers." + id },
		heard: func(context.Context, string) bool { return false },
	}
	s, err := newSlots(ctx, SlotsConfig{JS: js, Worker: "w", Window: time.Second}, store, asks, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	for round := range 50 {
		key := fmt.Sprintf("slot.app.%d", round)
		if _, err := store.Put(ctx, key, claim{WorkerID: "gone"}, 0); err != nil { // each delivery asks for it
			t.Fatal(err)
		}
		var owned atomic.Int32
		var deliveries sync.WaitGroup
		for range 4 {
			deliveries.Go(func() {
				if s.claim(ctx, key, "job") {
					owned.Add(1)
				}
			})
		}
		deliveries.Wait()
		if n := owned.Load(); n != 1 || !s.holds(key) {
			t.Fatalf("round %d: %d jobs have the slot; asked, the worker says %t", round, n, s.holds(key))
		}
	}
}

func TestJobsComeBackLaterTheMoreThereAre(t *testing.T) {
	for _, c := range []struct {
		limit, peers, away int
		want               time.Duration
		steady             bool
	}{
		{1, 1, 0, 2 * time.Second, true},
		{1, 1, 100, 2 * time.Second, true},
		{1, 1, 1000, 17500 * time.Millisecond, true},
		{1, 4, 500, 35 * time.Second, true},
		{40, 1, 1600, 8750 * time.Millisecond, true},
		{1, 1, 1 << 20, 52500 * time.Millisecond, false},
	} {
		slots := &appSlots{limit: c.limit}
		s := &Slots{apps: map[string]*appSlots{"app": slots}, random: func() float64 { return 0.5 }, peers: func() int { return c.peers }}
		now := time.Now()
		slots.away.count(now)
		for range c.away {
			slots.away.add(now.Add(maxReturn))
		}
		if got, steady := s.comeBack("app"); got != c.want || steady != c.steady {
			t.Errorf("%+v: got %s, %t", c, got, steady)
		}
	}
}

func TestBacklogForgetsJobsThatAreDueAgain(t *testing.T) {
	var b backlog
	now := time.Unix(1_700_000_000, 0)
	if n := b.count(now); n != 0 {
		t.Errorf("%d at first", n)
	}
	for i := range 61 {
		b.add(now.Add(time.Duration(i) * time.Second))
	}
	for _, c := range []struct {
		after time.Duration
		want  int
	}{{0, 61}, {time.Second, 60}, {30*time.Second + 900*time.Millisecond, 31}, {60 * time.Second, 1}, {61 * time.Second, 0}, {time.Hour, 0}} {
		if got := b.count(now.Add(c.after)); got != c.want {
			t.Errorf("after %s: %d, want %d", c.after, got, c.want)
		}
	}
}
