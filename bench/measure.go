package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

// sample is what one run of a measurement gave, by metric.
type sample map[string]float64

// Metrics. Times are microseconds of CPU, memory is KiB.
const (
	jobsPerSecond   = "jobs/s"
	cpuPerJob       = "µs CPU/job"
	allocsPerJob    = "allocs/job"
	natsPerJob      = "µs CPU/job of NATS"
	watchPerJob     = "µs CPU/job of the watcher"
	storedPerJob    = "messages/job"
	bytesPerJob     = "bytes kept/job"
	cpuPerFrame     = "µs CPU/frame"
	allocsPerFrame  = "allocs/frame"
	framesPerSecond = "frames/s"
	memoryPerIdle   = "KiB/session"
	residentPerIdle = "KiB RSS/session"
	objectsPerIdle  = "KiB of objects/session"
	stacksPerIdle   = "KiB of stacks/session"
	startMedian     = "ms median"
	startP99        = "ms p99"
	cpuPerSession   = "ms CPU/session"
	memoryPeak      = "KiB peak RSS/session"
	openAtOnce      = "open at once"
)

// measureQueue runs n no-op jobs through a queue. watched means that a process follows
// the state of the fleet meanwhile, as the page does.
func measureQueue(ctx context.Context, p params, n int, watched bool) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	start := s.withNATS
	if p.Replicas > 1 {
		start = s.withCluster
	}
	if err := start(ctx); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, p)
	if err != nil {
		return nil, err
	}
	ours := p.Role != "queue asyncjobs"
	if ours {
		err = fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return noopJob("job" + strconv.Itoa(i)) })
	} else {
		_, err = c.call(command{Do: "fill", N: n})
	}
	if err != nil {
		return nil, err
	}
	measured := append(s.nodes, c)
	if watched {
		watcher, err := s.with(ctx, params{Role: "watcher"})
		if err != nil {
			return nil, err
		}
		measured = append(measured, watcher)
	}
	before, err := statsOf(measured...)
	if err != nil {
		return nil, err
	}
	done, err := c.call(command{Do: "run", N: n})
	if err != nil {
		return nil, err
	}
	after, err := statsOf(measured...)
	if err != nil {
		return nil, err
	}
	out = sample{jobsPerSecond: float64(n) / done.Elapsed.Seconds()}
	for i := range len(s.nodes) + 1 {
		metric := natsPerJob
		if i == len(s.nodes) {
			metric = cpuPerJob
		}
		out[metric] += micros(after[i].CPU-before[i].CPU) / float64(n)
		if metric == cpuPerJob {
			out[allocsPerJob] = float64(after[i].Mallocs-before[i].Mallocs) / float64(n)
		}
	}
	if watched {
		out[watchPerJob] = micros(after[len(after)-1].CPU-before[len(before)-1].CPU) / float64(n)
	}
	if !ours {
		return out, nil
	}
	kept, err := storedIn(ctx, s.nats.said.NATS)
	out[storedPerJob] = float64(kept.Messages) / float64(n)
	out[bytesPerJob] = float64(kept.Bytes) / float64(n)
	return out, err
}

// statsOf adds up the stats of several processes.
func statsOf(children ...*child) ([]stats, error) {
	list := make([]stats, len(children))
	for i, c := range children {
		var err error
		if list[i], err = c.stats(false); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// relay is sessions that do nothing but relay frames, as fast as they come.
type relay struct {
	params
	output   string // of the worker's jobs; "": the role opens sessions itself
	sessions int
	frames   int // of each session
}

func measureRelay(ctx context.Context, r relay) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: r.frames, TLS: r.TLS}); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, r.params)
	if err != nil {
		return nil, err
	}
	// The first sessions fill pools and connections.
	if _, err := runSessions(ctx, s, c, r, r.sessions, "warm"); err != nil {
		return nil, err
	}
	before, err := c.stats(false)
	if err != nil {
		return nil, err
	}
	elapsed, err := runSessions(ctx, s, c, r, r.sessions, "run")
	if err != nil {
		return nil, err
	}
	after, err := c.stats(false)
	if err != nil {
		return nil, err
	}
	frames := float64(r.sessions * r.frames)
	return sample{
		cpuPerFrame:     micros(after.CPU-before.CPU) / frames,
		allocsPerFrame:  float64(after.Mallocs-before.Mallocs) / frames,
		framesPerSecond: frames / elapsed.Seconds(),
	}, nil
}

// runSessions runs n sessions at once to their end.
func runSessions(ctx context.Context, s *stage, c *child, r relay, n int, prefix string) (time.Duration, error) {
	if r.output == "" {
		a, err := c.call(command{Do: "run", N: n, Frames: r.frames})
		return a.Elapsed, err
	}
	ended, err := listen(s.nats.said.NATS)
	if err != nil {
		return 0, err
	}
	defer ended.close()
	begun := time.Now()
	err = fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return job(prefix+strconv.Itoa(i), "ok", r.output) })
	if err != nil {
		return 0, err
	}
	err = ended.wait(ctx, n)
	return time.Since(begun), err
}

// measureIdle opens n sessions that are left alone after their handshake.
func measureIdle(ctx context.Context, p params, worker bool, n int) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: 1, TLS: p.TLS}); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, p)
	if err != nil {
		return nil, err
	}
	before, err := c.stats(true)
	if err != nil {
		return nil, err
	}
	if worker {
		// This avatar confirms and sends no frames, so its sessions wait.
		err = fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return job("idle"+strconv.Itoa(i), "hang", "discard") })
	} else {
		_, err = c.call(command{Do: "open", N: n})
	}
	if err == nil {
		err = s.untilOpen(ctx, n)
	}
	if err != nil {
		return nil, err
	}
	// What the opening needed is dropped, and idle connections for token calls
	// are the same for all.
	if err := pause(ctx, 3*time.Second); err != nil {
		return nil, err
	}
	after, err := c.stats(true)
	if err != nil {
		return nil, err
	}
	kib := func(a, b uint64) float64 { return (float64(a) - float64(b)) / float64(n) / 1024 }
	return sample{
		memoryPerIdle:   kib(after.Memory, before.Memory),
		residentPerIdle: kib(after.Resident, before.Resident),
		objectsPerIdle:  kib(after.Live, before.Live),
		stacksPerIdle:   kib(after.Stacks, before.Stacks),
	}, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// untilOpen waits until the backend has confirmed n sessions.
func (s *stage) untilOpen(ctx context.Context, n int) error {
	for {
		b, err := s.readSessions(ctx)
		if err != nil || b.Confirmed >= n {
			return err
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("%d of %d sessions are open: %w", b.Confirmed, n, err)
		}
	}
}

func (s *stage) readSessions(ctx context.Context) (simulator.SessionLogPage, error) {
	var b simulator.SessionLogPage
	client, err := clientFor(s.backend.said.Trust)
	if err != nil {
		return b, err
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.backend.said.Page+"/book", nil)
	if err != nil {
		return b, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return b, err
	}
	defer func() { _ = resp.Body.Close() }() // read
	return b, json.NewDecoder(resp.Body).Decode(&b)
}

// measureStart publishes n jobs, one after the other, to an idle worker, and
// takes the time until each one's upgrade request is at the backend.
func measureStart(ctx context.Context, profiles string, n int) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: 1}); err != nil {
		return nil, err
	}
	if _, err := s.with(ctx, params{Role: "worker", Concurrency: concurrency, Profiles: profiles}); err != nil {
		return nil, err
	}
	took, err := s.starts(ctx, n, "start")
	if err != nil {
		return nil, err
	}
	return sample{startMedian: quantile(took, 0.5), startP99: quantile(took, 0.99)}, nil
}

// starts publishes n jobs, one after the other, and returns the milliseconds
// until each one's upgrade request was at the backend.
func (s *stage) starts(ctx context.Context, n int, prefix string) ([]float64, error) {
	const warm = 20
	ended, err := listen(s.nats.said.NATS)
	if err != nil {
		return nil, err
	}
	defer ended.close()
	published := make(map[string]time.Time, n)
	for i := range n + warm {
		avatar := "ok-" + strconv.Itoa(i)
		id := prefix + strconv.Itoa(i)
		at, err := publishOne(ended.nc, job(id, avatar, "discard"))
		if err == nil {
			err = ended.waitJob(ctx, id)
		}
		// Wait until the worker is idle.
		if err == nil {
			err = pause(ctx, 5*time.Millisecond)
		}
		if err != nil {
			return nil, err
		}
		if i >= warm {
			published[avatar] = at
		}
	}
	b, err := s.readSessions(ctx)
	if err != nil {
		return nil, err
	}
	var took []float64
	for _, session := range b.List {
		if at, ok := published[session.AvatarID]; ok {
			took = append(took, micros(session.Opened.Sub(at))/1e3)
		}
	}
	if len(took) != n {
		return nil, fmt.Errorf("the backend saw %d of %d sessions", len(took), n)
	}
	return took, nil
}

// quantile returns the value below which that part of the values lies.
func quantile(values []float64, part float64) float64 {
	slices.Sort(values)
	return values[int(part*float64(len(values)-1)+0.5)]
}

// publishOne sends a job at once and says when.
func publishOne(nc *nats.Conn, body []byte) (time.Time, error) {
	at := time.Now().Round(0) // compared with another process's clock
	if err := nc.Publish(topology.Names{}.Jobs("default"), body); err != nil {
		return at, err
	}
	return at, nc.Flush()
}

// scaleFrames are the envelopes of a session that is one of many: 14 s of
// motion, as fast as it plays.
const scaleFrames = 4

// measureScale runs n sessions of the whole worker at once.
func measureScale(ctx context.Context, profiles string, n int) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: scaleFrames, Speed: 1}); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, params{Role: "worker", Concurrency: n, Profiles: profiles})
	if err != nil {
		return nil, err
	}
	before, err := c.stats(true)
	if err != nil {
		return nil, err
	}
	if _, err := runSessions(ctx, s, c, relay{output: "discard"}, n, "scale"); err != nil {
		return nil, err
	}
	after, err := c.stats(false)
	if err != nil {
		return nil, err
	}
	b, err := s.readSessions(ctx)
	if err != nil {
		return nil, err
	}
	return sample{
		cpuPerSession: micros(after.CPU-before.CPU) / 1e3 / float64(n),
		memoryPeak:    (float64(after.PeakRSS) - float64(before.Resident)) / 1024 / float64(n),
		openAtOnce:    float64(b.Peak),
	}, nil
}

func roleOf(name string) (role, error) {
	switch name {
	case "nats":
		return &natsRole{}, nil
	case "backend":
		return &backendRole{}, nil
	case "nats node":
		return &nodeRole{}, nil
	case "workers":
		return &workersRole{}, nil
	case "queue bare":
		return &bareQueue{}, nil
	case "queue asyncjobs":
		return &asyncQueue{}, nil
	case "queue worker":
		return &workerQueue{}, nil
	case "watcher":
		return &watcher{}, nil
	case "reader":
		return &bareReader{}, nil
	case "reader to object":
		return &bareReader{record: true}, nil
	case "reader to frames":
		return &bareReader{publish: true}, nil
	case "client":
		return &clientReader{}, nil
	case "worker":
		return &appRole{}, nil
	default:
		return nil, fmt.Errorf("no role %q", strings.TrimSpace(name))
	}
}
