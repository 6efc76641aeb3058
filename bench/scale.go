package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
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
