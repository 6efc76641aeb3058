package main

import (
	"context"
	"fmt"
	"io"
	"math"
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
	clusterJobs     int // of a queue with three replicas
	frames          int // of a session that relays only
	published       int // of a session whose frames are stored
	idle, idleTLS   int
	starts          int
	coldStarts      int // far away
	utterances      int // of a live session
	held            int
	scales          []int
}

var (
	fullSizes = sizes{
		jobs: 20_000, asyncJobs: 5_000, clusterJobs: 5_000, frames: 500, published: 125, idle: 2_000, idleTLS: 500, starts: 300,
		coldStarts: 3, utterances: 500, held: 5_000, scales: []int{100, 500, 2_000, 5_000},
	}
	quickSizes = sizes{
		jobs: 5_000, asyncJobs: 2_000, clusterJobs: 1_000, frames: 200, published: 50, idle: 300, idleTLS: 200, starts: 100,
		coldStarts: 1, utterances: 100, held: 500, scales: []int{50, 200},
	}
)

const concurrency = 16

// suite lists the measurements in the order of a round.
func suite(z sizes) []measurement {
	queue := func(name string, n int, p params) measurement {
		return measurement{"queue", name, func(ctx context.Context, profiles string) (sample, error) {
			p.Profiles = profiles
			return measureQueue(ctx, p, n, strings.HasSuffix(name, "watched"))
		}}
	}
	ledger := func(name, ledger string, confirmed bool) measurement {
		return queue(name, z.jobs, params{Role: "queue worker", Concurrency: concurrency, Confirmed: confirmed, Ledger: ledger})
	}
	relayed := func(name, output string, frames int, p params) measurement {
		return measurement{"relay", name, func(ctx context.Context, profiles string) (sample, error) {
			p.Concurrency, p.Profiles = concurrency, profiles
			return measureRelay(ctx, relay{params: p, output: output, sessions: concurrency, frames: frames})
		}}
	}
	idle := func(name string, n int, p params) measurement {
		return measurement{"idle", name, func(ctx context.Context, profiles string) (sample, error) {
			p.Concurrency, p.Profiles = n, profiles
			return measureIdle(ctx, p, p.Role == "worker", n)
		}}
	}
	live := func(name, role string) measurement {
		return measurement{"live", name, func(ctx context.Context, profiles string) (sample, error) {
			return measureLive(ctx, params{Role: role, Concurrency: concurrency, Profiles: profiles}, z.utterances)
		}}
	}
	list := []measurement{
		queue("bare nats.go loop", z.jobs, params{Role: "queue bare", Concurrency: concurrency}),
		queue("choria-io/asyncjobs", z.asyncJobs, params{Role: "queue asyncjobs", Concurrency: concurrency}),
		queue("our worker", z.jobs, params{Role: "queue worker", Concurrency: concurrency}),
		// A worker finishes as many jobs as it runs, at the same time.
		queue("our worker, 16 jobs in hand", z.jobs, params{Role: "queue worker", Concurrency: concurrency / 2}),
		queue("our worker, watched", z.jobs, params{Role: "queue worker", Concurrency: concurrency}),
		ledger("our worker, with ledger", "on", false),
		ledger("our worker, sessions confirmed, no ledger", "", true),
		ledger("our worker, sessions confirmed, with ledger", "on", true),
		queue("bare nats.go loop, 3 replicas", z.clusterJobs, params{Role: "queue bare", Concurrency: concurrency, Replicas: replicas}),
		queue("our worker, 3 replicas", z.clusterJobs, params{Role: "queue worker", Concurrency: concurrency, Replicas: replicas}),
		relayed("bare reader", "", z.frames, params{Role: "reader"}),
		relayed("our session client", "", z.frames, params{Role: "client"}),
		relayed("our worker to discard", "discard", z.frames, params{Role: "worker"}),
		relayed("bare reader, TLS", "", z.frames, params{Role: "reader", TLS: true}),
		relayed("our session client, TLS", "", z.frames, params{Role: "client", TLS: true}),
		relayed("our worker to discard, TLS", "discard", z.frames, params{Role: "worker", TLS: true}),
		relayed("bare reader that publishes", "", z.published, params{Role: "reader to frames"}),
		relayed("our worker to frames", "frames", z.published, params{Role: "worker"}),
		relayed("bare reader that puts an object", "", z.published, params{Role: "reader to object"}),
		relayed("our worker to object", "object", z.published, params{Role: "worker"}),
		idle("bare reader", z.idle, params{Role: "reader"}),
		idle("our session client", z.idle, params{Role: "client"}),
		idle("our worker", z.idle, params{Role: "worker"}),
		idle("bare reader, TLS", z.idleTLS, params{Role: "reader", TLS: true}),
		idle("our session client, TLS", z.idleTLS, params{Role: "client", TLS: true}),
		idle("our worker, TLS", z.idleTLS, params{Role: "worker", TLS: true}),
		{"start", "our worker", func(ctx context.Context, profiles string) (sample, error) {
			return measureStart(ctx, profiles, z.starts)
		}},
		{"start", "our worker, 100 ms each way", func(ctx context.Context, profiles string) (sample, error) {
			return measureFarStart(ctx, profiles, z.coldStarts, 3)
		}},
		{"start", "our worker, with a crowd of held jobs", func(ctx context.Context, profiles string) (sample, error) {
			return measureCrowd(ctx, profiles, z.held, z.starts)
		}},
		live("bare relay", "reader to frames"),
		live("our worker", "worker"),
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
		// The worker's lease is renewed in the bucket of the records.
		if math.Abs(bare[i][storedPerJob]-ours[i][storedPerJob]) > 0.01 {
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
