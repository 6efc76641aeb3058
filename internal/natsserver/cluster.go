package natsserver

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

const clusterName = "avatar"

// Cluster is a JetStream cluster in one process, for tests. Its nodes can be
// stopped, killed, cut off and restarted.
type Cluster struct {
	name     string
	gateways []*server.RemoteGatewayOpts     // all clusters of a Federation, this one too; nil: it is alone
	base     func() (*server.Options, error) // the accounts and users of each node; nil: none
	nodes    []*node
	// links[i][j] is the connection from node i to node j; nil for i == j.
	links [][]*link
	once  sync.Once
	err   error
}

type node struct {
	options     Options
	routePort   int
	gatewayPort int // 0: the cluster is alone

	mu      sync.Mutex
	running *Server // nil while it is down
}

// StartCluster starts n nodes with their files under dir, and returns when the
// cluster has a leader and all nodes are current. The zero logger logs nothing.
func StartCluster(ctx context.Context, n int, dir string, logger zerolog.Logger) (*Cluster, error) {
	c := &Cluster{name: clusterName}
	for i := range n {
		ports, err := StablePorts(2)
		if err != nil {
			return nil, err
		}
		c.add("n"+strconv.Itoa(i), ports, dir, logger)
	}
	err := c.start()
	if err == nil {
		err = c.WaitReady(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Shutdown())
	}
	return c, nil
}

// add adds a node with these ports: for clients, for routes and, if there is a
// third, for gateways.
func (c *Cluster) add(name string, ports []int, dir string, logger zerolog.Logger) {
	n := &node{routePort: ports[1], options: Options{
		StoreDir: filepath.Join(dir, name), Port: ports[0], Name: name, Logger: logger,
	}}
	if len(ports) > 2 {
		n.gatewayPort = ports[2]
	}
	c.nodes = append(c.nodes, n)
}

func (c *Cluster) start() error {
	for i := range c.nodes {
		c.links = append(c.links, make([]*link, len(c.nodes)))
		for j, to := range c.nodes {
			if i == j {
				continue
			}
			l, err := newLink(net.JoinHostPort("127.0.0.1", strconv.Itoa(to.routePort)))
			if err != nil {
				return err
			}
			c.links[i][j] = l
		}
	}
	for i := range c.nodes {
		if err := c.Start(i); err != nil {
			return err
		}
	}
	return nil
}

// StablePorts finds n free ports on the loopback address that stay free while
// their server is down: they lie below the range that systems use for outgoing
// connections.
func StablePorts(n int) ([]int, error) {
	var held []net.Listener // held so that the ports differ
	defer func() {
		for _, l := range held {
			_ = l.Close() // only held to reserve the port
		}
	}()
	const lowest, highest, tries = 10_000, 30_000, 1_000
	ports := make([]int, 0, n)
	for range tries {
		if len(ports) == n {
			return ports, nil
		}
		port := lowest + rand.IntN(highest-lowest)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue // taken
		}
		held = append(held, l)
		ports = append(ports, port)
	}
	return nil, fmt.Errorf("no %d free ports between %d and %d", n, lowest, highest)
}

// Start starts a node that is down, with its existing files, and returns when
// clients can connect. Use WaitReady to wait for the cluster.
func (c *Cluster) Start(i int) error {
	n := c.nodes[i]
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running != nil {
		return fmt.Errorf("node %d runs already", i)
	}
	c.Heal(i)
	s := &Server{logger: newLogger(n.options.Logger)}
	opts, err := c.serverOptions(i)
	if err != nil {
		return err
	}
	if err := s.openStore(n.options.StoreDir, opts); err != nil {
		return err
	}
	if err := s.run(opts); err != nil {
		return errors.Join(fmt.Errorf("node %d: %w", i, err), s.Shutdown())
	}
	n.running = s
	return nil
}

func (c *Cluster) serverOptions(i int) (*server.Options, error) {
	opts := serverOptions(c.nodes[i].options)
	if c.base != nil {
		base, err := c.base()
		if err != nil {
			return nil, err
		}
		opts.Accounts, opts.Users, opts.SystemAccount = base.Accounts, base.Users, base.SystemAccount
	}
	opts.Tags.Add("node:" + c.nodes[i].options.Name) // so that a stream can be placed on it
	if c.gateways != nil {
		opts.Gateway = server.GatewayOpts{
			Name: c.name, Host: "127.0.0.1", Port: c.nodes[i].gatewayPort, Gateways: c.gateways,
		}
	}
	opts.Cluster = server.ClusterOpts{
		Name: c.name, Host: "127.0.0.1", Port: c.nodes[i].routePort,
		// One route for each pair, only through the links. Nodes tell each other
		// the addresses of third nodes and would dial them past the links, so
		// they advertise an address where nothing listens.
		PoolSize: -1, NoAdvertise: true, Advertise: "127.0.0.1:1",
	}
	for _, l := range c.links[i] {
		if l != nil {
			opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats-route", Host: l.address()})
		}
	}
	if len(opts.Routes) == 0 { // JetStream asks for one; the server leaves a route to itself alone
		opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats-route", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.nodes[i].routePort))})
	}
	return opts, nil
}

// Stop stops a node cleanly: it hands over its leaderships.
func (c *Cluster) Stop(i int) error {
	n := c.nodes[i]
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running == nil {
		return nil
	}
	err := n.running.Shutdown()
	n.running = nil
	return err
}

// Kill stops a node abruptly: it is cut off from the others first, so that they
// must notice by themselves and hold an election. Its files stay as they are at
// that moment, flushed: losing a disk write can't be simulated in one process.
func (c *Cluster) Kill(i int) error {
	c.Isolate(i)
	return c.Stop(i)
}

// Isolate cuts a node off from the others; its clients stay connected.
func (c *Cluster) Isolate(i int) { c.setCut(i, true) }

// Heal reverts Isolate.
func (c *Cluster) Heal(i int) { c.setCut(i, false) }

func (c *Cluster) setCut(i int, cut bool) {
	for j := range c.nodes {
		if i != j {
			c.links[i][j].setCut(cut)
			c.links[j][i].setCut(cut)
		}
	}
}

// Delay delays what one node sends to another by d to 2d; 0: no delay. A replica
// then lags behind its leader. A delay below the election timeout (4 s) changes
// nothing else.
func (c *Cluster) Delay(from, to int, d time.Duration) {
	c.links[from][to].setDelay(forward, d)
	c.links[to][from].setDelay(backward, d) // the nodes use one of the two
}

// Size is how many nodes there are, running or not.
func (c *Cluster) Size() int { return len(c.nodes) }

// ClientURLs are the addresses of all nodes, comma-separated, for one client.
func (c *Cluster) ClientURLs() string {
	urls := make([]string, len(c.nodes))
	for i := range c.nodes {
		urls[i] = c.ClientURL(i)
	}
	return strings.Join(urls, ",")
}

// ClientURL is the address of one node, the same after a restart.
func (c *Cluster) ClientURL(i int) string {
	return "nats://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(c.nodes[i].options.Port))
}

// StreamLeader is the node that leads a stream; -1 while there is none.
func (c *Cluster) StreamLeader(stream string) int {
	return c.find(func(s *server.Server) bool { return s.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream) })
}

// ConsumerLeader is the node that leads a consumer; -1 while there is none.
func (c *Cluster) ConsumerLeader(stream, consumer string) int {
	return c.find(func(s *server.Server) bool {
		return s.JetStreamIsConsumerLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream, consumer)
	})
}

// Leader is the node that leads the cluster; -1 while there is none.
func (c *Cluster) Leader() int {
	return c.find((*server.Server).JetStreamIsLeader)
}

func (c *Cluster) find(is func(*server.Server) bool) int {
	for i, n := range c.nodes {
		if s := n.server(); s != nil && is(s) {
			return i
		}
	}
	return -1
}

func (n *node) server() *server.Server {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running == nil {
		return nil
	}
	return n.running.nats
}

// WaitReady waits until the cluster has a leader that can place a stream on every
// node that runs, and these are current, for the cluster and for each stream that
// they keep.
func (c *Cluster) WaitReady(ctx context.Context) error {
	return waitReady(ctx, func() string { return c.unready(c.placeable()) })
}

// placeable are the nodes that streams can be placed on, by name: those whose
// statistics the leader has received. Empty while this cluster has no leader.
func (c *Cluster) placeable() []string {
	leader := c.Leader()
	if leader < 0 {
		return nil
	}
	s := c.nodes[leader].server()
	if s == nil {
		return nil
	}
	return s.JetStreamClusterPeers()
}

// unready says which running node is not ready, and why: no stream can be placed on it,
// or it is not current, for the cluster or for a stream that it keeps. It returns "" if
// all nodes are ready.
func (c *Cluster) unready(placeable []string) (why string) {
	if len(placeable) == 0 {
		return "there is no leader"
	}
	c.find(func(s *server.Server) bool {
		switch {
		case !slices.Contains(placeable, s.Name()):
			why = fmt.Sprintf("no stream can be placed on node %s", s.Name())
		case !s.Running() || !s.JetStreamIsCurrent():
			why = fmt.Sprintf("node %s is not current", s.Name())
		default:
			why = staleStream(s)
		}
		return why != ""
	})
	return why
}

// staleStream says which stream of a node is not current; "": all are.
func staleStream(s *server.Server) string {
	info, err := s.Jsz(&server.JSzOptions{Accounts: true, Streams: true})
	if err != nil {
		return fmt.Sprintf("node %s: %v", s.Name(), err)
	}
	for _, account := range info.AccountDetails {
		for _, stream := range account.Streams {
			if !s.JetStreamIsStreamCurrent(account.Name, stream.Name) {
				return fmt.Sprintf("stream %s of node %s is not current", stream.Name, s.Name())
			}
		}
	}
	return ""
}

func waitReady(ctx context.Context, unready func() string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for why := unready(); why != ""; why = unready() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the NATS cluster is not ready: %s: %w", why, ctx.Err())
		}
	}
	return nil
}

// Shutdown stops all nodes; calling it again returns the same error.
func (c *Cluster) Shutdown() error {
	c.once.Do(func() { c.err = c.stopAll() })
	return c.err
}

func (c *Cluster) stopAll() error {
	stopped := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for i := range c.nodes {
		wg.Go(func() { stopped[i] = c.Stop(i) })
	}
	wg.Wait()
	failures := slices.Clone(stopped)
	for _, row := range c.links {
		for _, l := range row {
			if l != nil {
				failures = append(failures, l.close())
			}
		}
	}
	return errors.Join(failures...)
}
