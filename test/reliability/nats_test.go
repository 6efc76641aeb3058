package reliability

import (
	"context"
	"fmt"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
	"golang.org/x/sync/semaphore"

	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// insist tries again for a while: a port that has to stay the same over a
// restart may be taken for a moment by another process's outgoing connection.
func insist(try func() error) error {
	deadline := time.Now().Add(natstest.Patience)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		linger(context.Background(), 200*time.Millisecond)
	}
}

// proxy is a way to target that a test can cut, slow and narrow. Its port stays free
// while it is cut.
func (f *fleet) proxy(name, target string) *toxiproxy.Proxy {
	f.t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := toxiproxy.NewProxy(server, name, fmt.Sprintf("127.0.0.1:%d", natstest.Port(f.t)), target)
	if err := p.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(p.Stop)
	return p
}

// nodes bounds those at once: their elections need the processor in time.
var nodes = semaphore.NewWeighted(nodesAtOnce())

func nodesAtOnce() int64 {
	if natstest.Raced {
		return 7
	}
	return 19
}

// takeNodes waits until so many nodes may run, and has them until the test ends.
func takeNodes(t *testing.T, n int64) {
	t.Helper()
	if err := nodes.Acquire(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nodes.Release(n) })
}

// newCluster runs a cluster of three until the test ends; its files are under
// the directory.
func newCluster(t *testing.T) (cluster *natsserver.Cluster, dir string) {
	t.Helper()
	takeNodes(t, chaosNodes)
	err := insist(func() (err error) {
		dir = t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
		defer cancel()
		cluster, err = natsserver.StartCluster(ctx, chaosNodes, dir, zerolog.Nop())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Shutdown(); err != nil {
			t.Errorf("stopping the cluster: %v", err)
		}
	})
	return cluster, dir
}
