package main

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/topology"
)

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
