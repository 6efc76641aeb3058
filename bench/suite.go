package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// measurement is one row of the table.
type measurement struct {
	group, name string
	run         func(ctx context.Context, profiles string) (sample, error)
}

func (m measurement) key() string { return m.group + "/" + m.name }

// sizes say how much each measurement does.
type sizes struct {
	jobs, asyncJobs int
	frames          int // of a session that relays only
	published       int // of a session whose frames are stored
	idle            int
	starts          int
	scales          []int
}

var (
	fullSizes  = sizes{jobs: 20_000, asyncJobs: 5_000, frames: 500, published: 125, idle: 2_000, starts: 300, scales: []int{100, 500, 2_000, 5_000}}
	quickSizes = sizes{jobs: 5_000, asyncJobs: 2_000, frames: 200, published: 50, idle: 300, starts: 100, scales: []int{50, 200}}
)

const concurrency = 16

// suite lists the measurements in the order of a round.
func suite(z sizes) []measurement {
	queue := func(name, role string, n int) measurement {
		return measurement{"queue", name, func(ctx context.Context, profiles string) (sample, error) {
			return measureQueue(ctx, params{Role: role, Concurrency: concurrency, Profiles: profiles}, n, strings.HasSuffix(name, "watched"))
		}}
	}
	relayed := func(name, role, output string, frames int) measurement {
		return measurement{"relay", name, func(ctx context.Context, profiles string) (sample, error) {
			return measureRelay(ctx, relay{
				params: params{Role: role, Concurrency: concurrency, Profiles: profiles},
				output: output, sessions: concurrency, frames: frames,
			})
		}}
	}
	idle := func(name, role string) measurement {
		return measurement{"idle", name, func(ctx context.Context, profiles string) (sample, error) {
			return measureIdle(ctx, params{Role: role, Concurrency: z.idle, Profiles: profiles}, role == "worker", z.idle)
		}}
	}
	list := []measurement{
		queue("bare nats.go loop", "queue bare", z.jobs),
		queue("choria-io/asyncjobs", "queue asyncjobs", z.asyncJobs),
		queue("our worker", "queue worker", z.jobs),
		queue("our worker, watched", "queue worker", z.jobs),
		relayed("bare reader", "reader", "", z.frames),
		relayed("our session client", "client", "", z.frames),
		relayed("our worker to discard", "worker", "discard", z.frames),
		relayed("bare reader that publishes", "reader to frames", "", z.published),
		relayed("our worker to frames", "worker", "frames", z.published),
		relayed("bare reader that puts an object", "reader to object", "", z.published),
		relayed("our worker to object", "worker", "object", z.published),
		idle("bare reader", "reader"),
		idle("our session client", "client"),
		idle("our worker", "worker"),
		{"start", "our worker", func(ctx context.Context, profiles string) (sample, error) {
			return measureStart(ctx, profiles, z.starts)
		}},
	}
	for _, n := range z.scales {
		list = append(list, measurement{"scale", strconv.Itoa(n) + " sessions", func(ctx context.Context, profiles string) (sample, error) {
			return measureScale(ctx, profiles, n)
		}})
	}
	return list
}

// results are the samples of each measurement, by its key.
type results map[string][]sample

// runLimit bounds one run of one measurement.
const runLimit = 5 * time.Minute

// play takes every measurement in turn, so many rounds.
func play(ctx context.Context, list []measurement, rounds int, profiles string, progress io.Writer) (results, error) {
	all := make(results)
	for round := range rounds {
		for _, m := range list {
			begun := time.Now()
			dir := ""
			if profiles != "" {
				dir = filepath.Join(profiles, strings.NewReplacer("/", "-", " ", "-").Replace(m.key()))
			}
			runCtx, cancel := context.WithTimeout(ctx, runLimit)
			got, err := m.run(runCtx, dir)
			cancel()
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", m.key(), round+1, err)
			}
			all[m.key()] = append(all[m.key()], got)
			fmt.Fprintf(progress, "round %d of %d: %s: %s (%.1f s)\n", round+1, rounds, m.key(), got, time.Since(begun).Seconds())
		}
	}
	return all, sameWork(all)
}

// String lists the metrics by name.
func (s sample) String() string {
	var parts []string
	for _, metric := range sorted(s) {
		parts = append(parts, fmt.Sprintf("%s %s", short(s[metric]), metric))
	}
	return strings.Join(parts, ", ")
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// sameWork returns an error unless the bare loop and the worker have left the same
// number of messages for each job: otherwise they did not do the same work.
func sameWork(all results) error {
	bare, ok1 := all["queue/bare nats.go loop"]
	ours, ok2 := all["queue/our worker"]
	if !ok1 || !ok2 {
		return nil
	}
	for i := range bare {
		// The worker's own presence is in another bucket: equal means equal.
		if bare[i][storedPerJob] != ours[i][storedPerJob] {
			return fmt.Errorf("the bare loop left %v messages for each job, the worker %v: they did not do the same",
				bare[i][storedPerJob], ours[i][storedPerJob])
		}
	}
	return nil
}

// spread is a metric over all rounds.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Runs   int     `json:"runs"`
}

func spreadOf(samples []sample, metric string) spread {
	var values []float64
	for _, s := range samples {
		values = append(values, s[metric])
	}
	slices.Sort(values)
	n := len(values)
	median := values[n/2]
	if n%2 == 0 {
		median = (values[n/2-1] + values[n/2]) / 2
	}
	return spread{Median: median, Min: values[0], Max: values[n-1], Runs: n}
}
