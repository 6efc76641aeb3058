package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/topology"
)

// node is one NATS server: alone, or one of a cluster.
type node struct {
	Name   string `json:"name"`
	Port   int    `json:"port"`
	Route  int    `json:"route,omitempty"`  // its port for routes; 0: it is alone
	Routes []int  `json:"routes,omitempty"` // of all nodes
}

// counts are what a node has had to do with its clients.
type counts struct {
	InMsgs   int64 `json:"in_msgs"`
	OutMsgs  int64 `json:"out_msgs"`
	InBytes  int64 `json:"in_bytes"`
	OutBytes int64 `json:"out_bytes"`
}

// nodeRole is a node with JetStream, its files in a temporary directory.
type nodeRole struct {
	server *server.Server
	dir    string
}

func (r *nodeRole) start(_ context.Context, p params) (answer, error) {
	n := p.Node
	var err error
	if r.dir, err = os.MkdirTemp("", "bench-nats-"); err != nil {
		return answer{}, err
	}
	opts := &server.Options{
		ServerName: n.Name, Host: "127.0.0.1", Port: n.Port, JetStream: true, StoreDir: r.dir, NoLog: true, NoSigs: true,
		JetStreamMaxStore: 64 << 30, // what the streams reserve, not what they take
	}
	if n.Route > 0 {
		opts.Cluster = server.ClusterOpts{Name: "bench", Host: "127.0.0.1", Port: n.Route}
		for _, port := range n.Routes {
			opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats-route", Host: "127.0.0.1:" + strconv.Itoa(port)})
		}
	}
	if r.server, err = server.NewServer(opts); err != nil {
		return answer{}, errors.Join(err, os.RemoveAll(r.dir))
	}
	r.server.Start()
	if !r.server.ReadyForConnections(20 * time.Second) {
		r.stop()
		return answer{}, fmt.Errorf("NATS node %s is not ready", n.Name)
	}
	return answer{NATS: r.server.ClientURL()}, nil
}

func (r *nodeRole) do(_ context.Context, c command) (answer, error) {
	if c.Do != "counts" {
		return answer{}, fmt.Errorf("%s: not a command of a NATS node", c.Do)
	}
	v, err := r.server.Varz(nil)
	if err != nil {
		return answer{}, err
	}
	return answer{Counts: counts{v.InMsgs, v.OutMsgs, v.InBytes, v.OutBytes}}, nil
}

func (r *nodeRole) stop() {
	r.server.Shutdown()
	r.server.WaitForShutdown()
	_ = os.RemoveAll(r.dir) // temporary
}

// natsCluster is one node, or three of a cluster, each a process.
type natsCluster struct {
	stage
	nodes    []*child
	urls     string
	replicas int
}

func startNATS(ctx context.Context, replicas int) (*natsCluster, error) {
	c := &natsCluster{replicas: replicas}
	ports, err := natsserver.StablePorts(2 * replicas)
	if err != nil {
		return nil, err
	}
	var urls []string
	for i := range replicas {
		n := &node{Name: "n" + strconv.Itoa(i), Port: ports[2*i]}
		if replicas > 1 {
			n.Route = ports[2*i+1]
			for j := range replicas {
				n.Routes = append(n.Routes, ports[2*j+1])
			}
		}
		started, err := c.spawn(ctx, params{Role: "nats node", Node: n})
		if err != nil {
			return nil, errors.Join(err, c.close())
		}
		c.nodes = append(c.nodes, started)
		urls = append(urls, started.said.NATS)
	}
	c.urls = strings.Join(urls, ",")
	c.nats = &child{name: "nats", said: answer{NATS: c.urls}} // what the others are told
	if err := c.ensure(ctx); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// ensure makes streams and buckets as the worker does. The nodes of a cluster take
// some seconds to elect a leader.
func (c *natsCluster) ensure(ctx context.Context) error {
	nc, js, err := connect(c.urls)
	if err != nil {
		return err
	}
	defer nc.Close()
	settings := topology.DefaultSettings()
	settings.Replicas = c.replicas
	for {
		once, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, _, err = topology.Ensure(once, js, topology.Names{}, settings)
		cancel()
		if err == nil {
			return nil
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return errors.Join(err, ctx.Err())
		}
	}
}

// used is what all nodes have used, and had to do, so far.
type used struct {
	cpu      time.Duration
	resident float64 // KiB
	counts
}

func (c *natsCluster) used() (u used, err error) {
	for _, n := range c.nodes {
		s, err := n.stats(false)
		if err != nil {
			return u, err
		}
		a, err := n.call(command{Do: "counts"})
		if err != nil {
			return u, err
		}
		u.cpu += s.CPU
		u.resident += float64(s.Resident) / 1024
		u.InMsgs += a.Counts.InMsgs
		u.OutMsgs += a.Counts.OutMsgs
		u.InBytes += a.Counts.InBytes
		u.OutBytes += a.Counts.OutBytes
	}
	return u, nil
}

// during is what work took of all nodes.
func (c *natsCluster) during(work func() error) (u used, elapsed time.Duration, err error) {
	before, err := c.used()
	if err != nil {
		return u, 0, err
	}
	begun := time.Now()
	if err := work(); err != nil {
		return u, 0, err
	}
	elapsed = time.Since(begun)
	after, err := c.used()
	u = used{after.cpu - before.cpu, after.resident - before.resident, counts{
		after.InMsgs - before.InMsgs, after.OutMsgs - before.OutMsgs, after.InBytes - before.InBytes, after.OutBytes - before.OutBytes,
	}}
	return u, elapsed, err
}

// memory is what all nodes have in use after collections, in bytes.
func (c *natsCluster) memory() (bytes float64, err error) {
	for _, n := range c.nodes {
		s, err := n.stats(true)
		if err != nil {
			return 0, err
		}
		bytes += float64(s.Memory)
	}
	return bytes, nil
}

// stored are the messages and bytes that all streams have taken.
func (c *natsCluster) stored(ctx context.Context) (messages, bytes float64, err error) {
	nc, js, err := connect(c.urls)
	if err != nil {
		return 0, 0, err
	}
	defer nc.Close()
	list := js.ListStreams(ctx)
	for info := range list.Info() {
		messages += float64(info.State.LastSeq)
		bytes += float64(info.State.Bytes)
	}
	return messages, bytes, list.Err()
}
