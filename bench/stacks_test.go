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

// An idle session of the worker is two goroutines: its job's and its reader's, and
// one of the session client is its reader's. One more call on the way to where they
// wait can double their stacks, which is 4 KiB and more for each session. They need
// no more than 4 KiB, so a collection brings them back to that, however large the
// runtime made them at first and whatever they did before.
func TestStacksOfIdleSessionsKeepTheirSize(t *testing.T) {
	const (
		runner = "jobs.(*execution).process"
		reader = "session.(*Session).readLoop"
		most   = 4 << 10 // bytes
	)
	for name, c := range map[string]struct {
		role       string
		tls        bool
		goroutines []string
	}{
		"worker, plain": {"worker", false, []string{runner, reader}},
		"worker, TLS":   {"worker", true, []string{runner, reader}},
		"client, plain": {"client", false, []string{reader}},
		"client, TLS":   {"client", true, []string{reader}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			const sessions = 3
			list := idleStacks(ctx, t, params{Role: c.role, TLS: c.tls}, sessions, c.goroutines)
			if len(list) != len(c.goroutines)*sessions {
				t.Fatalf("%d stacks of %d sessions", len(list), sessions)
			}
			for _, s := range list {
				if s.keeps() > most || s.spare() < minSpare {
					t.Errorf("want at most %d bytes kept with %d to spare:\n%s", most, minSpare, s)
				}
			}
		})
	}
}

// minSpare is enough for another compiler's frames, in bytes.
const minSpare = 100

// idleStacks opens sessions that then wait for their first frame.
func idleStacks(ctx context.Context, t *testing.T, p params, n int, functions []string) []stack {
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
	must(s.withBackend(ctx, params{Frames: 1, TLS: p.TLS}))
	p.Concurrency = n
	var dump bytes.Buffer
	c, err := spawnWith(ctx, s.addresses(p), &dump, "GOTRACEBACK=system")
	must(err)
	if p.Role == "worker" {
		must(fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return job("idle"+strconv.Itoa(i), "hang", "discard") }))
	} else {
		_, err := c.call(command{Do: "open", N: n})
		must(err)
	}
	must(s.untilOpen(ctx, n))
	must(pause(ctx, 300*time.Millisecond)) // the last one has still to send its speech
	list, err := c.stacks(&dump, functions)
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
