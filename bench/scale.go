package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

// unitCosts are what one job, one lease, one worker and one session take. CPU is
// that of all NATS nodes together. Times are of the machine that is named, and
// compare with others of the same run only.
type unitCosts struct {
	Measured string `json:"measured"`
	Machine  string `json:"machine"`

	R1 natsCosts `json:"r1"`
	R3 natsCosts `json:"r3"`

	Worker  workerCosts  `json:"worker"`
	Session sessionCosts `json:"session"`
}

// natsCosts are of streams with so many replicas.
type natsCosts struct {
	JobsPerSecond  float64 `json:"jobs_per_s"` // no-op jobs, one worker of 64 slots on the same machine
	CPUPerJob      float64 `json:"cpu_us_per_job"`
	WritesPerJob   float64 `json:"writes_per_job"` // messages in all streams
	BytesPerJob    float64 `json:"bytes_kept_per_job"`
	InPerJob       float64 `json:"wire_in_bytes_per_job"` // from clients, all nodes
	OutPerJob      float64 `json:"wire_out_bytes_per_job"`
	WritesPerSec   float64 `json:"writes_per_s"` // one stream, messages of 400 bytes, many in flight
	CPUPerWrite    float64 `json:"cpu_us_per_write"`
	RenewalsPerSec float64 `json:"renewals_per_s"` // at most: 64 in flight
	CPUPerRenewal  float64 `json:"cpu_us_per_renewal"`
	BytesPerLease  float64 `json:"bytes_kept_per_lease"`
	KiBPerLease    float64 `json:"kib_per_lease"`           // memory of all nodes
	RecordMemory   float64 `json:"memory_bytes_per_record"` // of each node: what finds a record that is kept
	CPUPerFrame    float64 `json:"cpu_us_per_frame"`
	BytesPerFrame  float64 `json:"bytes_kept_per_frame"`
}

// workerCosts are of a worker that waits for jobs.
type workerCosts struct {
	MiB           float64 `json:"mib"`                 // of its process, without sessions
	NATSKiB       float64 `json:"nats_kib"`            // memory of NATS
	NATSCPU       float64 `json:"nats_cpu_us_per_s"`   // without what is said to other workers
	MsgsPerSecond float64 `json:"msgs_per_s"`          // in and out of NATS, likewise
	PairPerSecond float64 `json:"msgs_per_s_per_pair"` // for each other worker of the cell
	PairCPU       float64 `json:"nats_cpu_us_per_s_per_pair"`
}

// sessionCosts are of the worker.
type sessionCosts struct {
	CPU         float64 `json:"cpu_ms"` // without its frames
	KiB         float64 `json:"kib"`    // peak
	CPUPerFrame float64 `json:"cpu_us_per_frame"`
	Published   float64 `json:"cpu_us_per_published_frame"`
	Files       float64 `json:"open_files"`
}

type scaleSizes struct {
	jobs, writes, leases, records, frames, sessions int
	few, many                                       int // idle workers
	presences                                       int // that many watch
	idle                                            time.Duration
}

func measureUnitCosts(ctx context.Context, quick bool, stdout, progress io.Writer) error {
	z := scaleSizes{jobs: 10_000, writes: 50_000, leases: 10_000, records: 200_000, frames: 125, sessions: 1_000, few: 20, many: 100, presences: 1_000, idle: 30 * time.Second}
	if quick {
		z = scaleSizes{jobs: 1_000, writes: 5_000, leases: 500, records: 10_000, frames: 25, sessions: 100, few: 5, many: 20, presences: 200, idle: 10 * time.Second}
	}
	c := unitCosts{
		Measured: time.Now().UTC().Format(time.DateOnly),
		Machine:  fmt.Sprintf("%s/%s, %d CPUs, %s, nats-server %s", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), server.VERSION),
	}
	for _, r := range []struct {
		replicas int
		into     *natsCosts
	}{{1, &c.R1}, {3, &c.R3}} {
		if err := r.into.measure(ctx, r.replicas, z); err != nil {
			return fmt.Errorf("%d replicas: %w", r.replicas, err)
		}
		fmt.Fprintf(progress, "%d replicas: %+v\n", r.replicas, *r.into)
	}
	if err := c.Worker.measure(ctx, z); err != nil {
		return fmt.Errorf("idle workers: %w", err)
	}
	fmt.Fprintf(progress, "worker: %+v\n", c.Worker)
	if err := c.Session.measure(ctx, z); err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	fmt.Fprintf(progress, "session: %+v\n", c.Session)
	c.round()
	enc := json.NewEncoder(stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(c)
}

func (n *natsCosts) measure(ctx context.Context, replicas int, z scaleSizes) error {
	for _, part := range []func(context.Context, *natsCluster, scaleSizes) error{n.jobs, n.writes, n.leases, n.records, n.frames} {
		c, err := startNATS(ctx, replicas) // each begins with an empty one
		if err != nil {
			return err
		}
		if err := errors.Join(part(ctx, c, z), c.close()); err != nil {
			return err
		}
	}
	return nil
}

func (n *natsCosts) jobs(ctx context.Context, c *natsCluster, z scaleSizes) error {
	worker, err := c.with(ctx, params{Role: "queue worker", Concurrency: 64})
	if err != nil {
		return err
	}
	published, _, err := c.during(func() error {
		return publishMany(ctx, c.urls, z.jobs, func(i int) (string, []byte) {
			return topology.Names{}.Jobs("default"), noopJob("job" + strconv.Itoa(i))
		})
	})
	if err != nil {
		return err
	}
	var done answer
	run, _, err := c.during(func() (err error) {
		done, err = worker.call(command{Do: "run", N: z.jobs})
		return err
	})
	if err != nil {
		return err
	}
	messages, bytes, err := c.stored(ctx)
	jobs := float64(z.jobs)
	n.JobsPerSecond = jobs / done.Elapsed.Seconds()
	n.CPUPerJob = micros(published.cpu+run.cpu) / jobs
	n.WritesPerJob, n.BytesPerJob = math.Round(messages/jobs), bytes/jobs
	n.InPerJob, n.OutPerJob = float64(published.InBytes+run.InBytes)/jobs, float64(published.OutBytes+run.OutBytes)/jobs
	return err
}

// writes publishes to one stream, as fast as it takes.
func (n *natsCosts) writes(ctx context.Context, c *natsCluster, z scaleSizes) error {
	body := make([]byte, 400)
	u, elapsed, err := c.during(func() error {
		return publishMany(ctx, c.urls, z.writes, func(int) (string, []byte) { return topology.Names{}.Events("started", "x"), body })
	})
	if err != nil {
		return err
	}
	n.WritesPerSec = float64(z.writes) / elapsed.Seconds()
	n.CPUPerWrite = micros(u.cpu) / float64(z.writes)
	return nil
}

// publishMany publishes n messages with many in flight, and waits until all are
// acknowledged.
func publishMany(ctx context.Context, url string, n int, message func(i int) (subject string, body []byte)) error {
	nc, js, err := connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	for i := range n {
		subject, body := message(i)
		if _, err := js.PublishAsync(subject, body, jetstream.WithStallWait(time.Minute)); err != nil {
			return err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leases are renewed as workers do: a quarter of the window after the last renewal,
// and then as fast as NATS takes it.
func (n *natsCosts) leases(ctx context.Context, c *natsCluster, z scaleSizes) error {
	nc, js, err := connect(c.urls)
	if err != nil {
		return err
	}
	defer nc.Close()
	bucket, err := js.KeyValue(ctx, topology.Names{}.StateBucket())
	if err != nil {
		return err
	}
	keys := &leaseKeys{store: kv.NewStore(js, bucket, 10*time.Second), revisions: make([]uint64, z.leases)}
	taken, _, err := c.during(func() error { return keys.renew(ctx, 0) })
	if err != nil {
		return err
	}
	_, bytes, err := c.stored(ctx)
	if err != nil {
		return err
	}
	const quarter = 7500 * time.Millisecond // of lease.ack_wait at its default
	paced, _, err := c.during(func() error { return keys.renew(ctx, quarter) })
	if err != nil {
		return err
	}
	_, elapsed, err := c.during(func() error { return keys.renew(ctx, 0) })
	leases := float64(z.leases)
	n.KiBPerLease, n.BytesPerLease = max(taken.resident+paced.resident, 0)/leases, bytes/leases
	n.CPUPerRenewal = micros(paced.cpu) / leases
	n.RenewalsPerSec = leases / elapsed.Seconds()
	return err
}

// records are written under a key each; what stays in memory is their index.
func (n *natsCosts) records(ctx context.Context, c *natsCluster, z scaleSizes) error {
	before, err := c.memory()
	if err != nil {
		return err
	}
	body := make([]byte, 400)
	err = publishMany(ctx, c.urls, z.records, func(i int) (string, []byte) {
		return fmt.Sprintf("$KV.%s.job-%020d", topology.Names{}.StateBucket(), i), body
	})
	if err == nil {
		err = pause(ctx, 20*time.Second) // the server drops what it has cached
	}
	if err != nil {
		return err
	}
	after, err := c.memory()
	n.RecordMemory = max(after-before, 0) / float64(len(c.nodes)) / float64(z.records)
	return err
}

type leaseKeys struct {
	store     *kv.Store
	revisions []uint64
	number    int
}

// renew writes every key once, with a life, if its revision is still the last one:
// spread over that time, or 64 at once.
func (k *leaseKeys) renew(ctx context.Context, over time.Duration) error {
	k.number++
	const atOnce, window = 64, 30 * time.Second
	begun := time.Now()
	failures := make([]error, atOnce)
	var wg sync.WaitGroup
	for w := range atOnce {
		wg.Go(func() {
			for i := w; i < len(k.revisions); i += atOnce {
				due := begun.Add(over / time.Duration(len(k.revisions)) * time.Duration(i))
				if wait := time.Until(due); wait > 0 && pause(ctx, wait) != nil {
					failures[w] = ctx.Err()
					return
				}
				id := fmt.Sprintf("worker-%05d-AbCdEfGh", i)
				value := map[string]any{"worker_id": id, "renewal": k.number} // as internal/jobs/lease writes it
				revision, err := k.store.PutTTL(ctx, "lease."+id, value, k.revisions[i], window)
				if err != nil {
					failures[w] = err
					return
				}
				k.revisions[i] = revision
			}
		})
	}
	wg.Wait()
	return errors.Join(failures...)
}

// frames go out through a worker: what NATS has to do for each.
func (n *natsCosts) frames(ctx context.Context, c *natsCluster, z scaleSizes) error {
	if err := c.withBackend(ctx, params{Frames: z.frames}); err != nil {
		return err
	}
	if _, err := c.with(ctx, params{Role: "worker", Concurrency: concurrency}); err != nil {
		return err
	}
	r := relay{output: "frames", sessions: concurrency, frames: z.frames}
	var before, after uint64
	stored := func() (uint64, error) { return streamBytes(ctx, c.urls, topology.Names{}.FramesStream()) }
	u, _, err := c.during(func() (err error) {
		if before, err = stored(); err == nil {
			_, err = runSessions(ctx, &c.stage, nil, r, r.sessions, "frames")
		}
		if err == nil {
			after, err = stored()
		}
		return err
	})
	frames := float64(r.sessions * r.frames)
	n.CPUPerFrame, n.BytesPerFrame = micros(u.cpu)/frames, float64(after-before)/frames
	return err
}

func streamBytes(ctx context.Context, url, name string) (uint64, error) {
	nc, js, err := connect(url)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return 0, err
	}
	return stream.CachedInfo().State.Bytes, nil
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

// measure runs sessions of the whole worker, and frames through it.
func (s *sessionCosts) measure(ctx context.Context, z scaleSizes) error {
	scaled, err := measureScale(ctx, "", z.sessions)
	if err != nil {
		return err
	}
	for _, row := range []struct {
		output string
		into   *float64
	}{{"discard", &s.CPUPerFrame}, {"frames", &s.Published}} {
		relayed, err := measureRelay(ctx, relay{params: params{Role: "worker", Concurrency: concurrency}, output: row.output, sessions: concurrency, frames: z.frames})
		if err != nil {
			return err
		}
		*row.into = relayed[cpuPerFrame]
	}
	s.KiB = scaled[memoryPeak]
	s.CPU = max(scaled[cpuPerSession]-scaleFrames*s.CPUPerFrame/1e3, 0)
	s.Files, err = filesPerSession(ctx, z.sessions)
	return err
}

// filesPerSession opens n sessions that wait and counts the worker's open files.
func filesPerSession(ctx context.Context, n int) (files float64, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return 0, err
	}
	if err := s.withBackend(ctx, params{Frames: 1}); err != nil {
		return 0, err
	}
	c, err := s.with(ctx, params{Role: "worker", Concurrency: n})
	if err != nil {
		return 0, err
	}
	before, err := openFiles(c)
	if err != nil {
		return 0, err
	}
	if err := fill(ctx, s.nats.said.NATS, n, func(i int) []byte { return job("open"+strconv.Itoa(i), "hang", "discard") }); err != nil {
		return 0, err
	}
	if err := s.untilOpen(ctx, n); err != nil {
		return 0, err
	}
	after, err := openFiles(c)
	return float64(after-before) / float64(n), err
}

func openFiles(c *child) (int, error) {
	list, err := os.ReadDir("/proc/" + strconv.Itoa(c.cmd.Process.Pid) + "/fd")
	return len(list), err
}

// round keeps the digits that count.
func (c *unitCosts) round() {
	for _, f := range []*float64{
		&c.Worker.MiB, &c.Worker.NATSKiB, &c.Worker.NATSCPU, &c.Worker.MsgsPerSecond, &c.Worker.PairPerSecond, &c.Worker.PairCPU,
		&c.Session.CPU, &c.Session.KiB, &c.Session.CPUPerFrame, &c.Session.Published, &c.Session.Files,
	} {
		*f = digits(*f)
	}
	for _, n := range []*natsCosts{&c.R1, &c.R3} {
		for _, f := range []*float64{
			&n.JobsPerSecond, &n.CPUPerJob, &n.WritesPerJob, &n.BytesPerJob, &n.InPerJob, &n.OutPerJob, &n.WritesPerSec, &n.CPUPerWrite,
			&n.RenewalsPerSec, &n.CPUPerRenewal, &n.BytesPerLease, &n.KiBPerLease, &n.RecordMemory, &n.CPUPerFrame, &n.BytesPerFrame,
		} {
			*f = digits(*f)
		}
	}
}

// digits rounds to three that count.
func digits(v float64) float64 {
	rounded, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 3, 64), 64)
	if err != nil {
		return v
	}
	return rounded
}
