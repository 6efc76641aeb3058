package reliability

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/simulator"
	"avatarworker/test/reliability/invariant"
)

// chaos is a fleet on a cluster, with a breakable way from each worker to each
// node and to the backend.
type chaos struct {
	*fleet
	cluster *natsserver.Cluster
	dir     string // of the nodes' files
	workers []*chaosWorker
	count   map[string]int // faults by kind
}

type chaosWorker struct {
	name    string
	binary  string
	env     []string
	process *process
	queue   []*toxiproxy.Proxy // one for each node
	backend *toxiproxy.Proxy
	cut     time.Time // since when it is cut off from NATS
}

func TestNothingIsLostAndNothingSettledTwiceInChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("minutes of chaos: not with -short")
	}
	t.Parallel()
	type run struct {
		name  string
		lease time.Duration
		apart time.Duration // the clocks of the workers
	}
	runs := []run{
		{"lease of 15 s", 15 * time.Second, 0},
		{"lease of 5 s and clocks an hour apart", 5 * time.Second, time.Hour},
	}
	if long() {
		runs = append(runs, run{"lease of 15 s again", 15 * time.Second, 0})
	}
	first := chaosSeed(t)
	for i, run := range runs {
		t.Run(run.name, func(t *testing.T) {
			if !long() { // long chaos has the machine to itself
				t.Parallel()
			}
			seed := first + uint64(i)
			t.Logf("seed %d: replay with AVATAR_CHAOS_SEED=%d", seed, first)
			length, total := chaosLength(t)
			same := workerBinary(t)
			c := newChaos(t, run.lease, run.apart, same, same, same)
			c.run(seed, length, total)
			c.finish(seed)
		})
	}
}

// run breaks things for length, while so many jobs are published.
func (c *chaos) run(seed uint64, length time.Duration, total int) {
	t := c.t
	draw := rand.New(rand.NewPCG(seed, 1000))
	deadline := time.Now().Add(length + 15*time.Minute) // far off, but not for a clock that is wrong
	published := make(chan struct{})
	go func() {
		defer close(published)
		c.load(t.Context(), total, length/time.Duration(total), func(i int) map[string]any {
			return chaosJob(draw, fmt.Sprintf("j-%d", i), deadline)
		})
	}()
	c.measureOutages(natsAway, c.answers(c.js))
	start := time.Now()
	c.play(schedule(seed, length, c.lease, len(c.workers)), start)
	t.Logf("faults over after %s: %s", time.Since(start).Round(time.Second), c.states())
	<-published
}

// finish waits until everything is settled, and checks it.
func (c *chaos) finish(seed uint64) {
	t := c.t
	c.settle()
	total := len(c.accepted)
	for _, w := range c.workers {
		w.process.alive()
	}
	report, _ := c.check()
	t.Logf("seed %d, %d workers, %d nodes, lease %s, %d jobs\nfaults: %s\nsessions run again: %d, of %d that a fault may have taken\n%s",
		seed, len(c.workers), chaosNodes, c.lease, total, c.faultsByKind(), report.Again, report.Held, report)
	if report.Jobs != total || report.Outcomes[lifecycle.StateExpired] != 0 {
		t.Errorf("%d jobs were published, none of which could expire: %s", total, report)
	}
}

// chaosLength is how long faults go on, and how many jobs are published
// meanwhile: AVATAR_CHAOS, or the short form.
func chaosLength(t *testing.T) (time.Duration, int) {
	t.Helper()
	text := os.Getenv("AVATAR_CHAOS")
	if text == "" {
		return 16 * time.Second, 240
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Minute {
		t.Fatalf("AVATAR_CHAOS=%q: give a duration of at least a minute, such as 10m", text)
	}
	return d, int(d.Seconds() * 10)
}

func chaosSeed(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("AVATAR_CHAOS_SEED")
	if text == "" {
		return uint64(time.Now().UnixNano()) % 1_000_000
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("AVATAR_CHAOS_SEED=%q: %v", text, err)
	}
	return seed
}

// newChaos runs a fleet of one worker for each binary, whose clocks are apart by
// so much.
func newChaos(t *testing.T, lease, apart time.Duration, binaries ...string) *chaos {
	t.Helper()
	c := &chaos{count: map[string]int{}}
	c.cluster, c.dir = newCluster(t)
	c.fleet = newFleetAt(t, c.cluster.ClientURLs(), lease, 3, simulator.Options{Addr: "127.0.0.1:0"})
	c.env["AVATAR_RETRY_INITIAL"], c.env["AVATAR_RETRY_MAX"] = "200ms", "5s"
	c.env["AVATAR_CIRCUIT_COOLDOWN"], c.env["AVATAR_CIRCUIT_MAX_COOLDOWN"] = "1s", "4s"
	for i, binary := range binaries {
		w := c.newWorker(fmt.Sprintf("w%d", i))
		w.binary = binary
		ahead := apart*time.Duration(i)/time.Duration(len(binaries)-1) - apart/2
		w.env = append(w.env, "AVATAR_FAILPOINT_CLOCK="+ahead.String())
		c.workers = append(c.workers, w)
	}
	for _, w := range c.workers {
		c.start(w)
		w.process.waitReady()
	}
	return c
}

func (c *chaos) start(w *chaosWorker) { w.process = c.launchBuild(w.binary, w.name, w.env...) }

func (c *chaos) newWorker(name string) *chaosWorker {
	c.t.Helper()
	w := &chaosWorker{name: name}
	var urls []string
	for i := range chaosNodes {
		p := c.proxy(name, strings.TrimPrefix(c.cluster.ClientURL(i), "nats://"))
		w.queue = append(w.queue, p)
		urls = append(urls, "nats://"+p.Listen)
	}
	backend, err := url.Parse(c.backend.URL())
	if err != nil {
		c.t.Fatal(err)
	}
	w.backend = c.proxy(name, backend.Host)
	through := func(address string) string { return strings.Replace(address, backend.Host, w.backend.Listen, 1) }
	w.env = []string{
		"NATS_URL=" + strings.Join(urls, ","),
		"AVATAR_BACKEND_CONSOLE_URL=" + through(c.backend.ConsoleURL()),
		"AVATAR_BACKEND_INGRESS_URL=" + through(c.backend.IngressURL()),
	}
	return w
}

// step is the begin or the end of a fault.
type step struct {
	at time.Duration
	do func()
}

// play breaks and repairs, step by step.
func (c *chaos) play(faults []fault, start time.Time) {
	var steps []step
	for _, f := range faults {
		c.count[f.kind]++
		begin, end := c.timed(f)
		c.t.Logf("%s: %s %d, for %s", start.Add(f.at).UTC().Format(time.StampMilli), f.kind, f.target, f.lasts)
		steps = append(steps, step{f.at, begin}, step{f.at + f.lasts, end})
	}
	slices.SortStableFunc(steps, func(a, b step) int { return int(a.at - b.at) })
	for _, s := range steps {
		linger(c.t.Context(), time.Until(start.Add(s.at)))
		s.do()
	}
}

// timed is steps, and notes when the fault delayed what worker and backend told each
// other.
func (c *chaos) timed(f fault) (begin, end func()) {
	breaks, repairs := c.steps(f)
	switch f.kind {
	case freezeWorker, cutBackend, slowBackend, narrowBackend, backendDown:
	default:
		return breaks, repairs
	}
	var since time.Time
	return func() { since = time.Now(); breaks() }, func() { repairs(); c.delayed(since, time.Now()) }
}

// steps are what begins a fault and what ends it.
func (c *chaos) steps(f fault) (begin, end func()) {
	switch f.kind {
	case killWorker, freezeWorker:
		return c.workerSteps(f)
	case killNode, stopNode, loseNode:
		return func() { c.nodeDown(f) }, func() { c.nodeUp(f) }
	case cutQueue, slowQueue, narrowQueue, cutBackend, slowBackend, narrowBackend:
		return c.networkSteps(f)
	case storm:
		return func() { c.setFault(f.what) }, func() { c.setFault("") }
	default:
		return c.backend.Stop, func() {
			if err := c.backend.Start(context.Background()); err != nil {
				c.t.Error(err)
			}
		}
	}
}

func (c *chaos) setFault(name string) {
	if err := c.backend.SetFault(simulator.Control{Fault: name}); err != nil {
		c.t.Error(err)
	}
}

func (c *chaos) workerSteps(f fault) (begin, end func()) {
	w := c.workers[f.target]
	if f.kind == killWorker {
		return func() { c.kill(w.process) }, func() { c.start(w) }
	}
	var since time.Time
	return func() { since = time.Now(); w.process.signal(syscall.SIGSTOP) }, func() {
		w.process.signal(syscall.SIGCONT)
		if id := w.process.workerID(); id != "" {
			c.fault(invariant.Fault{Kind: f.kind, WorkerID: id, Start: since, End: time.Now().Add(wake), Lasting: true})
		}
	}
}

// nodeDown takes a node away, when the others are well: with two of three away
// nothing is promised.
func (c *chaos) nodeDown(f fault) {
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	defer cancel()
	if err := c.cluster.WaitReady(ctx); err != nil {
		c.t.Errorf("before %s: %v", f.kind, err)
	}
	down := c.cluster.Kill
	if f.kind == stopNode {
		down = c.cluster.Stop
	}
	if err := down(f.target); err != nil {
		c.t.Error(err)
	}
	if f.kind == loseNode {
		if err := os.RemoveAll(filepath.Join(c.dir, fmt.Sprintf("n%d", f.target))); err != nil {
			c.t.Error(err)
		}
	}
}

func (c *chaos) nodeUp(f fault) {
	if err := insist(func() error { return c.cluster.Start(f.target) }); err != nil {
		c.t.Error(err)
	}
}

// wake is how long a worker that was frozen may take to notice that its lease is
// gone. A take-over that was on its way lands meanwhile, and is given back at once.
const wake = time.Second

// reconnect is how long a client may take to notice that a cut is repaired.
const reconnect = 3 * time.Second

func (c *chaos) networkSteps(f fault) (begin, end func()) {
	w := c.workers[f.target]
	proxies := w.queue
	if f.kind == cutBackend || f.kind == slowBackend || f.kind == narrowBackend {
		proxies = []*toxiproxy.Proxy{w.backend}
	}
	switch f.kind {
	case cutQueue, cutBackend:
		return func() {
				w.cut = time.Now()
				for _, p := range proxies {
					p.Stop()
				}
			}, func() {
				for _, p := range proxies {
					if err := p.Start(); err != nil {
						c.t.Error(err)
					}
				}
				if id := w.process.workerID(); f.kind == cutQueue && id != "" {
					c.fault(invariant.Fault{Kind: f.kind, WorkerID: id, Start: w.cut, End: time.Now().Add(reconnect), Lasting: true})
				}
			}
	case slowQueue, slowBackend:
		return c.toxic(proxies, "latency", fmt.Sprintf(`{"latency":%d,"jitter":%d}`, f.amount, f.amount/2))
	default:
		return c.toxic(proxies, "bandwidth", fmt.Sprintf(`{"rate":%d}`, f.amount))
	}
}

// toxic puts a toxic on proxies, both ways, and takes it off again.
func (c *chaos) toxic(proxies []*toxiproxy.Proxy, kind, attributes string) (begin, end func()) {
	ways := []string{"upstream", "downstream"}
	return func() {
			for _, p := range proxies {
				for _, way := range ways {
					spec := fmt.Sprintf(`{"name":%q,"type":%q,"stream":%q,"attributes":%s}`, kind+way, kind, way, attributes)
					if _, err := p.Toxics.AddToxicJson(strings.NewReader(spec)); err != nil {
						c.t.Error(err)
					}
				}
			}
		}, func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			for _, p := range proxies {
				for _, way := range ways {
					if err := p.Toxics.RemoveToxic(ctx, kind+way); err != nil {
						c.t.Error(err)
					}
				}
			}
		}
}

func (c *chaos) faultsByKind() string {
	kinds := make([]string, 0, len(c.count))
	for kind, n := range c.count {
		kinds = append(kinds, fmt.Sprintf("%s %d", kind, n))
	}
	slices.Sort(kinds)
	return strings.Join(kinds, ", ")
}
