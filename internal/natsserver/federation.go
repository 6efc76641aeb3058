package natsserver

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// Federation is several JetStream clusters in one process that are joined by
// gateways, for tests. The clusters have one JetStream together: their streams
// are placed by the name of a cluster, and a leader for all of them is elected by
// the majority of all nodes.
type Federation struct {
	clusters []*Cluster
	once     sync.Once
	err      error
}

// Member is one cluster of a Federation.
type Member struct {
	Name  string // of the cluster
	Nodes int
}

// StartFederation starts the clusters with their files under dir, and returns when
// there is a leader and all nodes are current. configFile gives the accounts and
// users of every node; empty: the default account without a login.
func StartFederation(ctx context.Context, configFile, dir string, logger zerolog.Logger, members ...Member) (*Federation, error) {
	f := &Federation{}
	var gateways []*server.RemoteGatewayOpts
	for _, m := range members {
		c := &Cluster{name: m.Name}
		if configFile != "" {
			c.base = func() (*server.Options, error) { return server.ProcessConfigFile(configFile) }
		}
		remote := &server.RemoteGatewayOpts{Name: m.Name}
		for i := range m.Nodes {
			ports, err := StablePorts(3)
			if err != nil {
				return nil, err
			}
			c.add(fmt.Sprintf("%s-n%d", m.Name, i), ports, filepath.Join(dir, m.Name), logger)
			remote.URLs = append(remote.URLs, &url.URL{Scheme: "nats", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[2]))})
		}
		gateways = append(gateways, remote)
		f.clusters = append(f.clusters, c)
	}
	err := f.start(ctx, gateways)
	if err != nil {
		return nil, errors.Join(err, f.Shutdown())
	}
	return f, nil
}

func (f *Federation) start(ctx context.Context, gateways []*server.RemoteGatewayOpts) error {
	for _, c := range f.clusters {
		c.gateways = gateways
		if err := c.start(); err != nil {
			return fmt.Errorf("cluster %s: %w", c.name, err)
		}
	}
	return f.WaitReady(ctx)
}

// Cluster is one of the clusters, in the order in which they were given.
func (f *Federation) Cluster(i int) *Cluster { return f.clusters[i] }

// WaitReady waits until there is a leader that can place a stream on every node
// that runs, and these are current.
func (f *Federation) WaitReady(ctx context.Context) error {
	return waitReady(ctx, func() string {
		var placeable []string
		for _, c := range f.clusters {
			placeable = append(placeable, c.placeable()...)
		}
		for _, c := range f.clusters {
			if why := c.unready(placeable); why != "" {
				return why
			}
		}
		return ""
	})
}

// KillCluster stops all nodes of a cluster at once, cut off from each other first.
func (f *Federation) KillCluster(i int) error {
	c := f.clusters[i]
	stopped := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for n := range c.nodes {
		wg.Go(func() { stopped[n] = c.Kill(n) })
	}
	wg.Wait()
	return errors.Join(stopped...)
}

// StartCluster starts the nodes of a cluster that are down, with their files.
func (f *Federation) StartCluster(i int) error {
	c := f.clusters[i]
	for n := range c.nodes {
		if err := c.Start(n); err != nil {
			return fmt.Errorf("cluster %s: %w", c.name, err)
		}
	}
	return nil
}

// Shutdown stops all nodes; calling it again returns the same error.
func (f *Federation) Shutdown() error {
	f.once.Do(func() {
		var failures []error
		for _, c := range f.clusters {
			failures = append(failures, c.Shutdown())
		}
		f.err = errors.Join(failures...)
	})
	return f.err
}
