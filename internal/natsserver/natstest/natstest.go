// Package natstest gives tests a real NATS server with JetStream, ways to it that lose
// or delay messages, and waiting without a limit of its own. It owns the servers that it
// starts, and must not know what a test stores in them.
package natstest

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
)

// Start runs a server on a random port, with its files in the test's own
// directory, until the test ends.
func Start(t testing.TB) *natsserver.Server {
	t.Helper()
	return StartWith(t, natsserver.Options{StoreDir: t.TempDir(), Port: natsserver.RandomPort})
}

// StartWith runs a server with these options until the test ends.
func StartWith(t testing.TB, o natsserver.Options) *natsserver.Server {
	t.Helper()
	s, err := natsserver.Start(o)
	if err != nil {
		t.Fatalf("starting NATS: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Shutdown(); err != nil {
			t.Errorf("stopping NATS: %v", err)
		}
	})
	return s
}

// Port is a port for a server that the test stops and starts again: nothing else
// takes it in between.
func Port(t testing.TB) int {
	t.Helper()
	ports, err := natsserver.StablePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// Connect connects a client until the test ends.
func Connect(t testing.TB, s *natsserver.Server, opts ...nats.Option) *nats.Conn {
	t.Helper()
	return ConnectURL(t, s.ClientURL(), opts...)
}

// ConnectURL connects a client to these servers until the test ends.
func ConnectURL(t testing.TB, urls string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	// A server that is there answers; the client's own limit of 2 s is too little on a
	// busy machine.
	nc, err := nats.Connect(urls, append([]nats.Option{nats.Timeout(Patience)}, opts...)...)
	if err != nil {
		t.Fatalf("connecting to NATS: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// JetStream runs a server and connects a JetStream client to it until the test
// ends.
func JetStream(t testing.TB) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(Connect(t, Start(t)))
	if err != nil {
		t.Fatalf("opening JetStream: %v", err)
	}
	return js
}

// Cluster runs a JetStream cluster of n nodes until the test ends.
func Cluster(t testing.TB, n int) *natsserver.Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := natsserver.StartCluster(ctx, n, t.TempDir(), zerolog.Nop())
	if err != nil {
		t.Fatalf("starting a NATS cluster: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Shutdown(); err != nil {
			t.Errorf("stopping the NATS cluster: %v", err)
		}
	})
	return c
}

// Losing connects a client whose first request of each of these kinds, such as
// "STREAM.INFO", is lost, as one is that was under way when a connection broke.
func Losing(t testing.TB, url string, kinds ...string) jetstream.JetStream {
	t.Helper()
	nc := ConnectURL(t, url)
	lost := make(map[string]bool)
	_, err := nc.Subscribe("losing.>", func(m *nats.Msg) {
		request := strings.TrimPrefix(m.Subject, "losing.")
		for _, kind := range kinds {
			if strings.HasPrefix(request, kind+".") && !lost[kind] {
				lost[kind] = true
				return
			}
		}
		onward := &nats.Msg{Subject: jetstream.DefaultAPIPrefix + request, Reply: m.Reply, Header: m.Header, Data: m.Data}
		if err := nc.PublishMsg(onward); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, "losing")
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// lag is how late a lagging node learns what is stored: long
// against a round trip, short against an election's timeout.
const lag = 500 * time.Millisecond

// Lagging lets one replica of a stream lag behind until the test ends, and
// connects a client to another one. Of the client's direct reads one in three is
// answered by the replica that lags: see UntilStale.
func Lagging(t testing.TB, c *natsserver.Cluster, stream string) jetstream.JetStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	leader := c.StreamLeader(stream)
	if leader < 0 {
		t.Fatalf("stream %s has no leader", stream)
	}
	behind, other := (leader+1)%c.Size(), (leader+2)%c.Size()
	c.Delay(leader, behind, lag)
	t.Cleanup(func() { c.Delay(leader, behind, 0) })
	js, err := jetstream.New(ConnectURL(t, c.ClientURL(other)))
	if err != nil {
		t.Fatalf("opening JetStream: %v", err)
	}
	return js
}

// UntilStale stores one thing after the other, numbered from 0, until one of the
// reads right after it fails with none. From then on the replica that lags
// answers reads: one that is new does not for a few seconds.
func UntilStale(ctx context.Context, t testing.TB, store func(n int), read func(n int) error, none error) {
	t.Helper()
	for n := 0; ctx.Err() == nil; n++ {
		store(n)
		var stale atomic.Bool
		Together(16, func(int) {
			if errors.Is(read(n), none) {
				stale.Store(true)
			}
		})
		if stale.Load() {
			return
		}
	}
	t.Fatal("no replica lags behind")
}

// Together calls f with 0 to n-1 at the same time and waits.
func Together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}
