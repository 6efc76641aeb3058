package natstest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"avatarworker/internal/natsserver"
)

// Configured runs a server with this configuration file until the test ends, and
// returns the URL for its clients. The text sets listen and what the test needs;
// JetStream's files go to a directory of the test unless it names one.
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
	Eventually(t, "the leaf node is connected to its hub", func() bool { return s.NumLeafNodes() >= len(opts.LeafNode.Remotes) })
	return s.ClientURL()
}

// Denying runs a server whose user "worker" may not publish to a subject, until the
// test ends, and returns the URLs for that user and for one who may do anything.
func Denying(t testing.TB, subject string) (worker, admin string) {
	t.Helper()
	url := Configured(t, `
		listen: "127.0.0.1:-1"
		jetstream { max_memory_store: 64GB }
		authorization { users: [
			{user: admin, password: p}
			{user: worker, password: p, permissions: {publish: {allow: ">", deny: "`+subject+`"}}}
		] }`)
	return strings.Replace(url, "//", "//worker:p@", 1), strings.Replace(url, "//", "//admin:p@", 1)
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
