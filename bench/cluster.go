package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/topology"
)

// nodes of a cluster, each a process of its own.
const nodes = 3

// nodeRole is one node of a NATS cluster.
type nodeRole struct {
	server *server.Server
	dir    string
}

func (r *nodeRole) start(_ context.Context, p params) (answer, error) {
	var err error
	if r.dir, err = os.MkdirTemp("", "bench-nats-"); err != nil {
		return answer{}, err
	}
	opts := &server.Options{
		ServerName: "n" + strconv.Itoa(p.Node), Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: r.dir,
		Cluster: server.ClusterOpts{Name: "bench", Host: "127.0.0.1", Port: p.Routes[p.Node]},
	}
	for i, port := range p.Routes {
		if i != p.Node {
			opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats-route", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))})
		}
	}
	if r.server, err = server.NewServer(opts); err != nil {
		return answer{}, err
	}
	r.server.Start()
	if !r.server.ReadyForConnections(30 * time.Second) {
		return answer{}, errors.New("the node takes no connections")
	}
	return answer{NATS: r.server.ClientURL()}, nil
}

func (r *nodeRole) do(_ context.Context, c command) (answer, error) {
	return answer{}, fmt.Errorf("%s: NATS takes no commands", c.Do)
}

func (r *nodeRole) stop() {
	if r.server != nil {
		r.server.Shutdown()
		r.server.WaitForShutdown()
	}
	_ = os.RemoveAll(r.dir) // it is in the directory of temporary files
}

// withCluster starts a cluster and waits until it can keep streams.
func (s *stage) withCluster(ctx context.Context) error {
	routes, err := natsserver.StablePorts(nodes)
	if err != nil {
		return err
	}
	for i := range nodes {
		node, err := s.spawn(ctx, params{Role: "nats node", Node: i, Routes: routes})
		if err != nil {
			return err
		}
		s.nodes = append(s.nodes, node)
	}
	s.nats = s.nodes[0]
	nc, js, err := connect(s.nats.said.NATS)
	if err != nil {
		return err
	}
	defer nc.Close()
	for {
		if _, _, err = topology.Ensure(ctx, js, topology.Names{}, settings(nodes)); err == nil {
			return nil
		}
		if waitErr := pause(ctx, 500*time.Millisecond); waitErr != nil {
			return errors.Join(waitErr, err)
		}
	}
}

// settings are the worker's own, with that many replicas (0: one).
func settings(replicas int) topology.Settings {
	s := topology.DefaultSettings()
	s.Replicas = max(replicas, 1)
	return s
}
