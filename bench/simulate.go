package main

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// embeddedCosts are those that docs/scale.md shows.
//
//go:embed scale_costs.json
var embeddedCosts []byte

// plan says what a fleet is to carry, and on which machines.
type plan struct {
	sessions   string
	seconds    int           // of a session
	output     string        // frames or discard
	perWorker  int           // sessions of a worker process
	replicas   int           // 1 or 3
	cores      int           // of a NATS node, and of a host of workers
	memory     int           // GiB of a host of workers
	disk       int           // GiB of a NATS node
	network    float64       // Gbit/s of each machine and way
	keep       time.Duration // records and events
	keepFrames time.Duration
	use        float64 // how much of each is to be used
}

func (p *plan) flags(f *flag.FlagSet) {
	f.StringVar(&p.sessions, "sessions", "1000,100000,1000000", "with -simulate: sessions at once, several separated by commas")
	f.IntVar(&p.seconds, "session-seconds", 60, "with -simulate: seconds of a session")
	f.StringVar(&p.output, "output", "frames", "with -simulate: frames (through NATS) or discard (as with livekit and agora)")
	f.IntVar(&p.perWorker, "per-worker", 500, "with -simulate: worker.concurrency, all of it in use")
	f.IntVar(&p.replicas, "replicas", 3, "with -simulate: nats.replicas, 1 or 3; also the nodes of a cell")
	f.IntVar(&p.cores, "cores", 8, "with -simulate: cores of a NATS node and of a host of workers")
	f.IntVar(&p.memory, "memory", 32, "with -simulate: GiB of memory of a NATS node and of a host of workers")
	f.IntVar(&p.disk, "disk", 1000, "with -simulate: GiB of disk of a NATS node")
	f.Float64Var(&p.network, "network", 10, "with -simulate: Gbit/s of each machine, each way")
	f.DurationVar(&p.keep, "keep", 168*time.Hour, "with -simulate: nats.state_ttl and streams.events.max_age")
	f.DurationVar(&p.keepFrames, "keep-frames", time.Hour, "with -simulate: streams.frames.max_age")
	f.Float64Var(&p.use, "use", 0.5, "with -simulate: the share of each limit that is to be used")
}

// Facts that are not measured here.
const (
	firstFrame     = 2      // seconds of motion in a session's first frame
	otherFrames    = 4      // in each other
	frameBytes     = 49_868 // docs/protocol.md, section 4
	speechBytesSec = 32_000 // 16 kHz PCM
	keysPerJob     = 3      // subjects that NATS keeps in memory: its record, two events
	writesAtStart  = 2      // of a record: the take-over, and the confirm after 100 ms; its outcome is one more
	writesRenewing = 2      // the lease, and when it was renewed last
	renewEvery     = 7.5    // seconds: a quarter of lease.ack_wait
	fileLimit      = 65_536 // LimitNOFILE of deploy/systemd
	portsOfAHost   = 28_232 // Linux's range for outgoing connections to one address
)

func (p plan) validate() ([]int, error) {
	var list []int
	for text := range strings.SplitSeq(p.sessions, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || n < 1 || n > 10_000_000 {
			return nil, fmt.Errorf("-sessions: %q is not a number from 1 to 10,000,000", text)
		}
		list = append(list, n)
	}
	switch {
	case p.replicas != 1 && p.replicas != 3:
		return nil, fmt.Errorf("-replicas: is %d: 1 and 3 were measured", p.replicas)
	case p.output != "frames" && p.output != "discard":
		return nil, fmt.Errorf("-output: is %q: frames or discard", p.output)
	case p.seconds < 1 || p.perWorker < 1 || p.cores < 1 || p.memory < 1 || p.disk < 1 || p.network <= 0 || p.keep <= 0 || p.keepFrames <= 0 || p.use <= 0 || p.use > 1:
		return nil, fmt.Errorf("-session-seconds, -per-worker, -cores, -memory, -disk, -network, -keep, -keep-frames: give more than 0; -use: at most 1")
	}
	return list, nil
}

func readCosts(file string) (c unitCosts, err error) {
	data := embeddedCosts
	if file != "" {
		if data, err = os.ReadFile(file); err != nil { // #nosec G304 -- named by who runs the harness
			return c, fmt.Errorf("-costs: %w", err)
		}
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("-costs: %s is not what -scale prints: %w", file, err)
	}
	return c, nil
}

func simulate(costsFile string, p plan, out io.Writer) error {
	list, err := p.validate()
	if err != nil {
		return err
	}
	c, err := readCosts(costsFile)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Unit costs of %s on %s.\n", c.Measured, c.Machine)
	fmt.Fprintf(out, "Sessions of %d s to %s, %d a worker; R%d; machines of %d cores, %d GiB of memory, %d GiB of disk, %g Gbit/s, used to %g %%; records and events kept for %s, frames for %s.\n",
		p.seconds, p.output, p.perWorker, p.replicas, p.cores, p.memory, p.disk, p.network, p.use*100, p.keep, p.keepFrames)
	for _, n := range list {
		if err := fleetFor(c, p, n).print(out); err != nil {
			return err
		}
	}
	return nil
}

// need is one thing that can run out.
type need struct {
	what       string
	all        float64 // what the fleet takes of it
	one, units float64 // what one cell or host carries, and how many are needed
	unit       string
}

// fleetSize is what so many sessions need.
type fleetSize struct {
	sessions       int
	cells, workers int
	enough         bool // false: no number of cells carries them
	hosts          int
	peak           load
	jobs, frames   float64 // a second, on average
	perCell        []need  // what saturates first comes first
	perHost        []need
	replicas       int
	files, mib     float64 // of a worker process
}

// fleetFor finds the least number of cells that carry n sessions, by playing their
// seconds: each session begins at its own time, in the cell that its id
// belongs to.
func fleetFor(c unitCosts, p plan, n int) fleetSize {
	f := fleetSize{sessions: n, cells: 1, workers: ceil(float64(n) / float64(p.perWorker)), replicas: p.replicas}
	f.jobs = float64(n) / float64(p.seconds)
	for {
		f.peak = busiest(n, f.cells, p)
		f.perCell = cellNeeds(c, p, f)
		most := ceil(f.perCell[0].units)
		if f.enough = most <= f.cells; f.enough || f.cells >= n {
			break
		}
		f.cells = min(most, n)
	}
	f.workers = max(f.workers, f.cells) // each cell has one at least
	f.frames = f.framesASecond(p)
	f.files, f.mib = float64(p.perWorker)*c.Session.Files, c.Worker.MiB+float64(p.perWorker)*c.Session.KiB/1024
	f.perHost = hostNeeds(c, p, f)
	f.hosts = ceil(f.perHost[0].units)
	return f
}

func ceil(v float64) int { return max(int(math.Ceil(v-1e-9)), 1) }

// load is what the busiest cell has to do in its busiest second.
type load struct {
	sessions                       int // of the cell with the most
	starts, ends, frames, renewals float64
	writes                         float64 // to the bucket of records
}

// busiest plays the seconds of one session's length with n sessions at once.
func busiest(n, cells int, p plan) load {
	draw := rand.New(rand.NewPCG(1, uint64(n))) // #nosec G404 -- the same each time
	type second struct{ starts, ends, frames, renewals float64 }
	seconds := make([][]second, cells)
	for i := range seconds {
		seconds[i] = make([]second, p.seconds)
	}
	members := make([]int, cells)
	for i := range n {
		cell := partition("job-"+strconv.Itoa(i), cells)
		members[cell]++
		begin := draw.IntN(p.seconds)
		row := seconds[cell]
		row[begin].starts++
		row[(begin+p.seconds-1)%p.seconds].ends++ // the one before it in this slot
		if p.output != "frames" {
			continue
		}
		for at := firstFrame; at <= p.seconds; at += otherFrames {
			row[(begin+at)%p.seconds].frames++
		}
	}
	for cell, sessions := range members {
		for range ceil(float64(sessions) / float64(p.perWorker)) {
			for at := draw.Float64() * renewEvery; at < float64(p.seconds); at += renewEvery {
				seconds[cell][int(at)].renewals++
			}
		}
	}
	peak := load{sessions: slices.Max(members)}
	for _, row := range seconds {
		for _, s := range row {
			peak.starts, peak.ends = max(peak.starts, s.starts), max(peak.ends, s.ends)
			peak.frames, peak.renewals = max(peak.frames, s.frames), max(peak.renewals, s.renewals)
			peak.writes = max(peak.writes, writesAtStart*s.starts+s.ends+writesRenewing*s.renewals)
		}
	}
	return peak
}

// partition is NATS's own.
func partition(key string, n int) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))       // never fails
	return int(h.Sum32() % uint32(n)) // #nosec G115 -- a small number
}

// cellNeeds are in the units of cells, the most needed first.
func cellNeeds(c unitCosts, p plan, f fleetSize) []need {
	r := c.R1
	if p.replicas == 3 {
		r = c.R3
	}
	const micro = 1e-6
	cells := float64(f.cells)
	workers := float64(ceil(float64(f.peak.sessions) / float64(p.perWorker))) // of the largest cell
	nodes := float64(p.replicas)
	jobs := (f.peak.starts + f.peak.ends) / 2
	idle := max(c.Worker.NATSCPU-c.R1.CPUPerRenewal/renewEvery, 0) // without the renewals, which are counted
	cpu := micro * (jobs*r.CPUPerJob + f.peak.frames*r.CPUPerFrame + f.peak.renewals*r.CPUPerRenewal + workers*idle + workers*workers*c.Worker.PairCPU)
	// The node that leads the streams has each frame come in, and go out to the
	// other replicas and to one listener.
	bytes := jobs*(r.InPerJob+r.OutPerJob)/nodes + f.peak.frames*frameBytes*nodes
	kept := f.jobs/cells*r.BytesPerJob*p.keep.Seconds() + f.framesASecond(p)/cells*r.BytesPerFrame*p.keepFrames.Seconds()
	cell := func(what, unit string, busiest, carries float64) need {
		return need{what: what, unit: unit, all: busiest * cells, one: carries, units: busiest / carries * cells}
	}
	list := []need{
		cell("NATS CPU", "cores", cpu, nodes*float64(p.cores)*p.use),
		cell("writes to AVATAR_STATE", "a second", f.peak.writes, r.WritesPerSec*p.use),
		cell("of them lease renewals", "a second", f.peak.renewals, r.RenewalsPerSec*p.use),
		cell("network of the busiest NATS node", "MB/s", bytes/1e6, p.network*1e3/8*p.use),
		cell("memory of a NATS node", "GiB", (f.jobs/cells*p.keep.Seconds()*keysPerJob*r.RecordMemory+workers*c.Worker.NATSKiB*1024)/(1<<30), float64(p.memory)*p.use),
		cell("disk of a NATS node", "GiB", kept/(1<<30), float64(p.disk)*p.use),
	}
	slices.SortStableFunc(list, func(a, b need) int { return cmp.Compare(b.units, a.units) })
	return list
}

// framesASecond is how many frames all sessions have in a second.
func (f fleetSize) framesASecond(p plan) float64 {
	if p.output != "frames" {
		return 0
	}
	return float64(f.sessions) * float64((p.seconds-firstFrame)/otherFrames+1) / float64(p.seconds)
}

// hostNeeds are in the units of hosts of workers, the most needed first.
func hostNeeds(c unitCosts, p plan, f fleetSize) []need {
	sessions, workers := float64(f.sessions), float64(f.workers)
	motion := float64((p.seconds-firstFrame)/otherFrames+1) / float64(p.seconds) // frames a second
	frameCPU, copies := c.Session.CPUPerFrame, 1.0
	if p.output == "frames" {
		frameCPU, copies = c.Session.Published, 2
	}
	cpu := sessions * (c.Session.CPU/1e3/float64(p.seconds) + motion*frameCPU/1e6)
	memory := (workers*c.Worker.MiB + sessions*c.Session.KiB/1024) / 1024
	network := sessions * max(motion*frameBytes, speechBytesSec+(copies-1)*motion*frameBytes) / 1e6 // the busier way
	host := func(what, unit string, all, carries float64) need {
		return need{what: what, unit: unit, all: all, one: carries, units: all / carries}
	}
	list := []need{
		host("CPU of workers", "cores", cpu, float64(p.cores)*p.use),
		host("memory of workers", "GiB", memory, float64(p.memory)*p.use),
		host("network of workers", "MB/s", network, p.network*1e3/8*p.use),
		host("ports to one ingress address", "connections", sessions, portsOfAHost*p.use),
	}
	slices.SortStableFunc(list, func(a, b need) int { return cmp.Compare(b.units, a.units) })
	return list
}

func (f fleetSize) print(w io.Writer) error {
	if !f.enough {
		_, err := fmt.Fprintf(w, "\n%s sessions: no number of cells carries them: too little %s for one\n", grouped(float64(f.sessions)), f.perCell[0].what)
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s sessions: %s jobs/s, %s frames/s through NATS\n"+
		"  %d cell(s) of %d NATS node(s); %d worker(s) on %d host(s), each with %s MiB and %s of %s open files\n  first to saturate: %s; at the workers: %s\n",
		grouped(float64(f.sessions)), grouped(f.jobs), grouped(f.frames), f.cells, f.replicas, f.workers, f.hosts,
		grouped(f.mib), grouped(f.files), grouped(fileLimit), f.perCell[0].what, f.perHost[0].what)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(list []need, of string) {
		for _, n := range list {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s %s\t\n", n.what, short(n.all), n.unit, short(n.one), short(n.units), of)
		}
	}
	fmt.Fprintln(t, "what\tin all\tunit\tone carries\tneeds\t")
	row(f.perCell, "cells")
	row(f.perHost, "hosts")
	return t.Flush()
}

// grouped writes a whole number as 1,000,000.
func grouped(v float64) string {
	text := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
