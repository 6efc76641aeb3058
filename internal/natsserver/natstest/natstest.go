// Package natstest gives tests a real NATS server with JetStream.
package natstest

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/natsserver"
)

// clusterTimeout is generous: a cluster forms in some 5 s on an idle machine.
const clusterTimeout = 60 * time.Second

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
	nc, err := nats.Connect(urls, opts...)
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
	ctx, cancel := context.WithTimeout(context.Background(), clusterTimeout)
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
