package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// workerCosts are of a worker that waits for jobs.
type workerCosts struct {
	MiB           float64 `json:"mib"`                 // of its process, without sessions
	NATSKiB       float64 `json:"nats_kib"`            // memory of NATS
	NATSCPU       float64 `json:"nats_cpu_us_per_s"`   // without what is said to other workers
	MsgsPerSecond float64 `json:"msgs_per_s"`          // in and out of NATS, likewise
	PairPerSecond float64 `json:"msgs_per_s_per_pair"` // for each other worker of the cell
	PairCPU       float64 `json:"nats_cpu_us_per_s_per_pair"`
}

// measure lets few workers and many workers wait: what grows faster than their
// number is what each says to all others.
func (w *workerCosts) measure(ctx context.Context, z scaleSizes) error {
	few, err := idleWorkers(ctx, z.few, z.idle)
	if err != nil {
		return err
	}
	many, err := idleWorkers(ctx, z.many, z.idle)
	if err != nil {
		return err
	}
	// a·n + b·n² through both.
	solve := func(f, m float64) (a, b float64) {
		nf, nm := float64(z.few), float64(z.many)
		b = max((m/nm-f/nf)/(nm-nf), 0)
		return m/nm - b*nm, b
	}
	w.MsgsPerSecond, w.PairPerSecond = solve(few.msgs, many.msgs)
	delivery, err := deliveryCPU(ctx, z)
	if err != nil {
		return err
	}
	w.PairCPU = w.PairPerSecond * delivery
	w.NATSCPU = max(few.cpu/float64(z.few)-w.PairCPU*float64(z.few), 0)
	w.NATSKiB = many.kib / float64(z.many)
	w.MiB = few.process
	return nil
}

// deliveryCPU is what NATS takes to hand one worker's presence to another, in
// microseconds: few presences are written while many watch.
func deliveryCPU(ctx context.Context, z scaleSizes) (perDelivery float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	c, err := startNATS(ctx, 1)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	var received sync.WaitGroup
	var watchers []*nats.Conn
	defer func() {
		for _, nc := range watchers {
			nc.Close()
		}
	}()
	presence := make([]byte, 350)
	for range z.many {
		nc, js, err := connect(c.urls)
		if err != nil {
			return 0, err
		}
		watchers = append(watchers, nc)
		bucket, err := js.KeyValue(ctx, topology.Names{}.FleetBucket())
		if err != nil {
			return 0, err
		}
		watch, err := bucket.Watch(ctx, "worker.>", jetstream.UpdatesOnly())
		if err != nil {
			return 0, err
		}
		received.Go(func() {
			for range z.presences {
				select {
				case <-watch.Updates():
				case <-ctx.Done():
					return
				}
			}
		})
	}
	write := func(kind string) func() error {
		return func() error {
			return publishMany(ctx, c.urls, z.presences, func(i int) (string, []byte) {
				return "$KV." + topology.Names{}.FleetBucket() + "." + kind + strconv.Itoa(i), presence
			})
		}
	}
	alone, _, err := c.during(write("unwatched."))
	if err != nil {
		return 0, err
	}
	watched, _, err := c.during(func() error {
		err := write("worker.")()
		received.Wait()
		return errors.Join(err, ctx.Err())
	})
	return max(micros(watched.cpu-alone.cpu), 0) / float64(z.presences*z.many), err
}

// idleUse is what so many idle workers take of NATS in a second.
type idleUse struct {
	msgs, cpu float64 // a second; microseconds
	kib       float64 // of NATS
	process   float64 // MiB of a process with one worker
}

func idleWorkers(ctx context.Context, n int, d time.Duration) (out idleUse, err error) {
	c, err := startNATS(ctx, 1)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := c.withBackend(ctx, params{Frames: 1}); err != nil {
		return out, err
	}
	one, err := c.with(ctx, params{Role: "worker", Concurrency: concurrency})
	if err != nil {
		return out, err
	}
	s, err := one.stats(true)
	if err != nil {
		return out, err
	}
	out.process = float64(s.Resident) / (1 << 20)
	before, err := c.used()
	if err != nil {
		return out, err
	}
	if _, err := c.with(ctx, params{Role: "workers", Concurrency: n - 1}); err != nil {
		return out, err
	}
	if err := pause(ctx, 2*time.Second); err != nil {
		return out, err
	}
	u, elapsed, err := c.during(func() error { return pause(ctx, d) })
	if err != nil {
		return out, err
	}
	after, err := c.used()
	out.msgs = float64(u.InMsgs+u.OutMsgs) / elapsed.Seconds()
	out.cpu = micros(u.cpu) / elapsed.Seconds()
	out.kib = after.resident - before.resident
	return out, err
}

// workersRole is many whole workers in one process, each with its own connection.
type workersRole struct {
	stopIt context.CancelFunc
	ended  sync.WaitGroup
}

func (r *workersRole) start(ctx context.Context, p params) (answer, error) {
	runCtx, cancel := context.WithCancel(ctx)
	r.stopIt = cancel
	for i := range p.Concurrency {
		c := config.Defaults()
		c.NATS.URL = p.NATS
		c.Worker.Name, c.Worker.DrainTimeout = "bench-"+strconv.Itoa(i), time.Second
		c.App.ID, c.App.APIKey = "app", "bench"
		c.Backend.ConsoleURL, c.Backend.IngressURL = p.Console, p.Ingress
		c.Admin.Addr = ""
		ready := make(chan struct{})
		worker, err := app.New(app.Options{
			Config: c, Logger: zerolog.Nop(), Version: "bench", OnReady: func() { close(ready) },
		})
		if err != nil {
			return answer{}, err
		}
		ended := make(chan error, 1)
		r.ended.Go(func() { ended <- worker.Run(runCtx) })
		select {
		case <-ready:
		case err := <-ended:
			return answer{}, errors.Join(fmt.Errorf("worker %d ended", i), err)
		}
	}
	return answer{}, nil
}

func (r *workersRole) do(_ context.Context, c command) (answer, error) {
	return answer{}, fmt.Errorf("%s: the workers take their work from the queue", c.Do)
}

func (r *workersRole) stop() {
	r.stopIt()
	r.ended.Wait()
}
