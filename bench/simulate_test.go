package main

import (
	"bytes"
	"flag"
	"io"
	"strings"
	"testing"
)

func defaults(t *testing.T) plan {
	t.Helper()
	var p plan
	f := flag.NewFlagSet("", flag.ContinueOnError)
	p.flags(f)
	if err := f.Parse(nil); err != nil {
		t.Fatal(err)
	}
	return p
}

func embedded(t *testing.T) unitCosts {
	t.Helper()
	c, err := readCosts("")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestEmbeddedCostsSayWhenAndWhereTheyWereMeasured(t *testing.T) {
	c := embedded(t)
	if c.Measured == "" || c.Machine == "" {
		t.Errorf("measured %q on %q", c.Measured, c.Machine)
	}
	for name, v := range map[string]float64{
		"r1 CPU a job": c.R1.CPUPerJob, "r3 CPU a job": c.R3.CPUPerJob, "r1 writes": c.R1.WritesPerSec, "r3 writes": c.R3.WritesPerSec,
		"r1 renewals": c.R1.RenewalsPerSec, "r3 renewals": c.R3.RenewalsPerSec, "r3 CPU a frame": c.R3.CPUPerFrame, "bytes a job": c.R3.BytesPerJob, "r3 memory a record": c.R3.RecordMemory,
		"memory of a worker": c.Worker.MiB, "messages of a worker": c.Worker.MsgsPerSecond, "memory of a session": c.Session.KiB, "files": c.Session.Files,
	} {
		if v <= 0 {
			t.Errorf("%s: %v", name, v)
		}
	}
}

func TestSimulationPrintsWhatSaturatesFirst(t *testing.T) {
	p := defaults(t)
	p.sessions = "1000,20000"
	var out bytes.Buffer
	if err := simulate("", p, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"1,000 sessions: 17 jobs/s, 250 frames/s", "20,000 sessions: 333 jobs/s, 5,000 frames/s", "first to saturate: ", "cell(s) of 3 NATS node(s)",
		"NATS CPU", "writes to AVATAR_STATE", "lease renewals", "network of the busiest NATS node", "disk of a NATS node", "memory of a NATS node",
		"memory of workers", "CPU of workers", "ports to one ingress address", "open files",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestCellsCarryWhatTheyAreGiven(t *testing.T) {
	c, p := embedded(t), defaults(t)
	cells := 0
	for _, n := range []int{1, 1_000, 20_000, 60_000} {
		f := fleetFor(c, p, n)
		if f.cells < cells {
			t.Errorf("%d sessions need %d cells, fewer sessions %d", n, f.cells, cells)
		}
		cells = f.cells
		for _, need := range f.perCell {
			if need.units > float64(f.cells)+1e-6 {
				t.Errorf("%d sessions: %s needs %.2f of %d cells", n, need.what, need.units, f.cells)
			}
		}
		if got := f.hosts; float64(got) < f.perHost[0].units || f.workers*p.perWorker < n {
			t.Errorf("%d sessions: %d hosts for %.2f, %d workers", n, got, f.perHost[0].units, f.workers)
		}
	}
}

func TestWhatIsScarceSaturatesFirst(t *testing.T) {
	for name, change := range map[string]func(*unitCosts, *plan){
		"NATS CPU":                         func(c *unitCosts, _ *plan) { c.R3.CPUPerJob = 1e6 },
		"writes to AVATAR_STATE":           func(c *unitCosts, _ *plan) { c.R3.WritesPerSec = 20 },
		"of them lease renewals":           func(c *unitCosts, p *plan) { c.R3.RenewalsPerSec, p.perWorker = 20, 10 },
		"network of the busiest NATS node": func(_ *unitCosts, p *plan) { p.network = 0.01 },
		"memory of a NATS node":            func(c *unitCosts, _ *plan) { c.R3.RecordMemory = 1e4 },
		"disk of a NATS node":              func(_ *unitCosts, p *plan) { p.disk = 1 },
	} {
		c, p := embedded(t), defaults(t)
		change(&c, &p)
		if f := fleetFor(c, p, 2_000); f.perCell[0].what != name || f.cells < 2 || !f.enough {
			t.Errorf("%s is scarce, but %s saturates first, with %d cells, enough: %t", name, f.perCell[0].what, f.cells, f.enough)
		}
	}
}

func TestASimulationEndsThatNoNumberOfCellsCanCarry(t *testing.T) {
	c, p := embedded(t), defaults(t)
	c.R3.WritesPerSec = 0.1
	f := fleetFor(c, p, 100)
	var out bytes.Buffer
	if err := f.print(&out); err != nil || !strings.Contains(out.String(), "no number of cells carries them: too little writes to AVATAR_STATE") {
		t.Errorf("%v: %s", err, out.String())
	}
}

// What each worker publishes to all others grows with the square of their number: in two
// cells it is half as much in all.
func TestWorkersOfACellCostItsNATSTheSquareOfTheirNumber(t *testing.T) {
	c, p := embedded(t), defaults(t)
	p.output, p.perWorker, c.Worker.PairCPU = "discard", 10, 1e9
	cores := func(cells int) float64 {
		f := fleetSize{sessions: 10_000, cells: cells, peak: busiest(10_000, cells, p)}
		return cellNeeds(c, p, f)[0].all
	}
	if ratio := cores(1) / cores(2); ratio < 1.9 || ratio > 2.1 {
		t.Errorf("one cell takes %.2f times as much as two", ratio)
	}
}

func TestIDsAreDividedOverCellsAsNATSDividesThem(t *testing.T) {
	// FNV-1a of 32 bits, as the server's partition function.
	for key, want := range map[string]int{"a": 0xe40c292c % 8, "foobar": 0xbf9cf968 % 8} {
		if got := partition(key, 8); got != want {
			t.Errorf("%s is in partition %d, want %d", key, got, want)
		}
	}
}

func TestPlansThatCanNotBeAreRefused(t *testing.T) {
	for name, change := range map[string]func(*plan){
		"-sessions: \"x\"": func(p *plan) { p.sessions = "10,x" },
		"-sessions: \"0\"": func(p *plan) { p.sessions = "0" },
		"-replicas":        func(p *plan) { p.replicas = 2 },
		"-output":          func(p *plan) { p.output = "object" },
		"-per-worker":      func(p *plan) { p.perWorker = 0 },
		"-use":             func(p *plan) { p.use = 2 },
	} {
		p := defaults(t)
		change(&p)
		if err := simulate("", p, io.Discard); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := simulate("simulate.go", defaults(t), io.Discard); err == nil || !strings.Contains(err.Error(), "-costs: simulate.go") {
		t.Errorf("a file that is not of -scale: %v", err)
	}
}
