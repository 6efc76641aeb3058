package main

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"testing"
	"time"
)

// A child that a test spawns is the test's own program.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "child" {
		os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// An idle session is two goroutines: its job's and its reader's. One more call on
// the way to where they wait can double their stacks, which is 4 KiB and more for
// each session. A collection brings the job's back to 4 KiB. It can't do that with
// the reader's, of whose chain the libraries alone use 1.5 KiB: that stays at 4 KiB
// until the first frame, and with TLS it has 8.
func TestStacksOfIdleSessionsKeepTheirSize(t *testing.T) {
	const (
		runner = "jobs.(*execution).process"
		reader = "session.(*Session).readLoop"
	)
	for name, c := range map[string]struct {
		tls     bool
		keeps   map[string]int // bytes, at most, after collections
		without map[string]int // bytes in which it needs not grow
	}{
		"plain": {false, map[string]int{runner: 4 << 10, reader: 8 << 10}, map[string]int{runner: 4 << 10, reader: 4 << 10}},
		"TLS":   {true, map[string]int{runner: 4 << 10, reader: 8 << 10}, map[string]int{runner: 4 << 10, reader: 8 << 10}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			const sessions = 3
			list := idleStacks(ctx, t, c.tls, sessions, []string{runner, reader})
			if len(list) != 2*sessions {
				t.Fatalf("%d stacks of %d sessions", len(list), sessions)
			}
			for _, s := range list {
				most, room := c.keeps[s.Goroutine], c.without[s.Goroutine]
				if s.keeps() > most || s.spare() < minSpare || s.Used+guard+minSpare > room {
					t.Errorf("want at most %d bytes kept, %d to spare, and no growth from %d:\n%s", most, minSpare, room, s)
				}
			}
		})
	}
}

// minSpare is enough for another compiler's frames, in bytes.
const minSpare = 100

// idleStacks opens sessions in a worker that then wait for their first frame.
func idleStacks(ctx context.Context, t *testing.T, secure bool, n int, functions []string) []stack {
	t.Helper()
	s := &stage{}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.withNATS(ctx))
	must(s.withBackend(ctx, params{Frames: 1, TLS: secure}))
	var dump bytes.Buffer
	worker, err := spawnWith(ctx, s.addresses(params{Role: "worker", Concurrency: n}), &dump, "GOTRACEBACK=system")
	must(err)
	must(fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return job("idle"+strconv.Itoa(i), "hang", "discard") }))
	must(s.untilOpen(ctx, n))
	must(pause(ctx, 300*time.Millisecond)) // the last one has still to send its speech
	list, err := worker.stacks(&dump, functions)
	must(err)
	return list
}

func TestAStackIsAsLargeAsItsUseNeeds(t *testing.T) {
	for used, want := range map[int][2]int{
		100: {2 << 10, 124}, 223: {2 << 10, 1}, 224: {4 << 10, 1024}, 1247: {4 << 10, 1}, 1248: {8 << 10, 2048}, 3295: {8 << 10, 1}, 3296: {16 << 10, 4096},
	} {
		if s := (stack{Used: used}); s.keeps() != want[0] || s.spare() != want[1] {
			t.Errorf("%d bytes keep %d with %d to spare, want %v", used, s.keeps(), s.spare(), want)
		}
	}
}
