package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"runtime"
	"strconv"
	"text/tabwriter"

	"avatarworker/internal/errors"
)

// row is one metric of one measurement.
type row struct {
	Group       string `json:"group"`
	Measurement string `json:"measurement"`
	Metric      string `json:"metric"`
	spread
}

// target is one goal and what was measured.
type target struct {
	What  string  `json:"what"`
	Got   float64 `json:"got"`
	Limit float64 `json:"limit"`
	Least bool    `json:"least"` // the limit is the least, not the most
	Met   bool    `json:"met"`
}

type report struct {
	Go      string   `json:"go"`
	System  string   `json:"system"`
	CPUs    int      `json:"cpus"`
	Rounds  int      `json:"rounds"`
	Rows    []row    `json:"rows"`
	Targets []target `json:"targets"`
}

func reportOf(list []measurement, all results, rounds int) report {
	r := report{Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH, CPUs: runtime.NumCPU(), Rounds: rounds}
	for _, m := range list {
		samples := all[m.key()]
		for _, metric := range sorted(samples[0]) {
			r.Rows = append(r.Rows, row{m.group, m.name, metric, spreadOf(samples, metric)})
		}
	}
	r.Targets = targets(list, all)
	return r
}

// targets compares the medians of this run with the goals.
func targets(list []measurement, all results) []target {
	median := func(key, metric string) float64 {
		samples := all[key]
		if len(samples) == 0 {
			return math.NaN()
		}
		return spreadOf(samples, metric).Median
	}
	var out []target
	add := func(what string, got, limit float64, least bool) {
		if !math.IsNaN(got) {
			out = append(out, target{what, got, limit, least, least && got >= limit || !least && got <= limit})
		}
	}
	ratio := func(what, metric, ours, theirs string, limit float64, least bool) {
		add(what, median(ours, metric)/median(theirs, metric), limit, least)
	}
	most := func(what, metric, ours, theirs string, limit float64) {
		ratio(what, metric, ours, theirs, limit, false)
	}
	const bareQueue, ours16 = "queue/bare nats.go loop", "queue/our worker, 16 jobs in hand"
	most("CPU a no-op job, worker to bare loop", cpuPerJob, "queue/our worker", bareQueue, 1.25)
	ratio("no-op jobs/s with 16 jobs in hand, worker to bare loop", jobsPerSecond, ours16, bareQueue, 0.92, true)
	ratio("no-op jobs/s, worker to asyncjobs", jobsPerSecond, "queue/our worker", "queue/choria-io/asyncjobs", 3.5, true)
	ratio("no-op jobs/s, worker with ledger to worker without", jobsPerSecond, "queue/our worker, with ledger", "queue/our worker", 0.97, true)
	// A usage record is one message more for each job: 7.3 to NATS instead of 6.3. If it
	// costs what the others cost on average, the ratio is 0.86. The limit is a little
	// lower: the record is stored, and of the others only 4 are.
	ratio("jobs/s with confirmed sessions, worker with ledger to worker without", jobsPerSecond,
		"queue/our worker, sessions confirmed, with ledger", "queue/our worker, sessions confirmed, no ledger", 0.85, true)
	ratio("no-op jobs/s, watched worker to worker", jobsPerSecond, "queue/our worker, watched", "queue/our worker", 0.95, true)
	most("CPU a frame, session client to bare reader", cpuPerFrame, "relay/our session client", "relay/bare reader", 1.3)
	most("CPU a frame, worker to discard to bare reader", cpuPerFrame, "relay/our worker to discard", "relay/bare reader", 1.6)
	most("CPU a frame with TLS, session client to bare reader", cpuPerFrame, "relay/our session client, TLS", "relay/bare reader, TLS", 1.05)
	most("CPU a frame, worker to frames to bare reader that publishes", cpuPerFrame, "relay/our worker to frames", "relay/bare reader that publishes", 1.3)
	most("CPU a frame, worker to object to bare reader that puts", cpuPerFrame, "relay/our worker to object", "relay/bare reader that puts an object", 1.5)
	most("memory of an idle session, client to bare reader", memoryPerIdle, "idle/our session client", "idle/bare reader", 1.25)
	most("memory of an idle session with TLS, client to bare reader", memoryPerIdle, "idle/our session client, TLS", "idle/bare reader, TLS", 1.25)
	if samples := all["idle/our worker"]; len(samples) > 0 {
		add("KiB of an idle session, worker, in the worst round", spreadOf(samples, memoryPerIdle).Max, 40, false)
	}
	add("ms from publish to upgrade, median", median("start/our worker", startMedian), 5, false)
	add("ms from publish to upgrade, p99", median("start/our worker", startP99), 25, false)
	add("ms from publish to the first message, 100 ms each way, cold", median("start/our worker, 100 ms each way", coldStart), 3*roundTrip+20, false)
	add("ms from publish to the first message, 100 ms each way, warm", median("start/our worker, 100 ms each way", warmStart), 2*roundTrip+20, false)
	add("ms from publish to upgrade with a crowd of held jobs, median", median("start/our worker, with a crowd of held jobs", startMedian), 5, false)
	add("ms from publish to upgrade with a crowd of held jobs, p99", median("start/our worker, with a crowd of held jobs", startP99), 25, false)
	add("ms to the first frame of live speech beyond a bare relay's, median",
		median("live/our worker", firstFrameMedian)-median("live/bare relay", firstFrameMedian), 0.25, false)
	most("p99 to the first frame of live speech, worker to bare relay", firstFrameP99, "live/our worker", "live/bare relay", 2)
	var scales []measurement
	for _, m := range list {
		if m.group == "scale" {
			scales = append(scales, m)
		}
	}
	if n := len(scales); n > 1 {
		first, last := scales[0], scales[n-1]
		ratio("CPU a session, "+last.name+" to "+first.name, cpuPerSession, last.key(), first.key(), 1.2, false)
	}
	return out
}

// missed returns an error that names each target that was missed, its figure and
// its limit; nil: none was.
func (r report) missed() error {
	var list []error
	for _, x := range r.Targets {
		if !x.Met {
			list = append(list, fmt.Errorf("missed: %s: %s, want %s", x.What, short(x.Got), x.want()))
		}
	}
	return errors.Join(list...)
}

func (x target) want() string {
	if x.Least {
		return "≥ " + short(x.Limit)
	}
	return "≤ " + short(x.Limit)
}

func (r report) print(w io.Writer) error {
	if _, err := fmt.Fprintf(w, "%s, %s, %d CPUs, medians of %d\n\n", r.Go, r.System, r.CPUs, r.Rounds); err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "group\tmeasured\tmedian\tleast\tmost\tof")
	for _, row := range r.Rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", row.Group, row.Measurement, short(row.Median), short(row.Min), short(row.Max), row.Metric)
	}
	fmt.Fprintln(t, "\t\t\t\t\t\ntarget\t\tgot\tlimit\t\tmet")
	for _, x := range r.Targets {
		met := "yes"
		if !x.Met {
			met = "NO"
		}
		fmt.Fprintf(t, "%s\t\t%s\t%s\t\t%s\n", x.What, short(x.Got), x.want(), met)
	}
	return t.Flush()
}

func (r report) printJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// short writes a number with three digits that count.
func short(v float64) string {
	digits := 0
	if a := math.Abs(v); a > 0 && a < 100 {
		digits = min(max(2-int(math.Floor(math.Log10(a))), 0), 3)
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}
