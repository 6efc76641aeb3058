package natstest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"avatarworker/internal/natsserver"
)

// Configured runs a server with this configuration file until the test ends, and
// returns the URL for its clients. The text sets listen and whatever the test is
// about; JetStream's files go to a directory of
// the test unless it names one.
func Configured(t testing.TB, conf string) (url string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatalf("configuring NATS: %v", err)
	}
	opts.NoSigs, opts.NoLog = true, true
	if opts.JetStream && opts.StoreDir == "" {
		opts.StoreDir = t.TempDir()
	}
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatalf("configuring NATS: %v", err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("NATS is not ready")
	}
	again, deadline := time.NewTicker(5*time.Millisecond), time.After(20*time.Second)
	defer again.Stop()
	for s.NumLeafNodes() < len(opts.LeafNode.Remotes) {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatal("the leaf node is not connected to its hub")
		}
	}
	return s.ClientURL()
}

// Ports are for listeners that a configuration has to name.
func Ports(t testing.TB, n int) []int {
	t.Helper()
	ports, err := natsserver.StablePorts(n)
	if err != nil {
		t.Fatal(err)
	}
	return ports
}
