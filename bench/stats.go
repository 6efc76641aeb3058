package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"

	"avatarworker/internal/errors"
)

// stats are what a process has used.
type stats struct {
	CPU        time.Duration `json:"cpu_ns"`     // user and system
	Memory     uint64        `json:"memory"`     // bytes of heap and stacks in use
	Resident   uint64        `json:"resident"`   // bytes, as the kernel counts
	PeakRSS    uint64        `json:"peak_rss"`   // bytes
	Mallocs    uint64        `json:"mallocs"`    // ever
	Goroutines int           `json:"goroutines"` //
	Live       uint64        `json:"live"`       // bytes of objects in the heap
	Stacks     uint64        `json:"stacks"`     // bytes of goroutines' stacks
}

// collections that a settled process has had: each gives back half of a stack
// that is not needed any more.
const collections = 5

// readStats reads them; settled: after some collections and what they free.
func readStats(settled bool) stats {
	if settled {
		for range collections {
			runtime.GC()
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s := stats{Memory: m.HeapInuse + m.StackInuse, Mallocs: m.Mallocs, Goroutines: runtime.NumGoroutine(), Live: m.HeapAlloc, Stacks: m.StackInuse}
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err == nil {
		s.CPU = time.Duration(u.Utime.Nano() + u.Stime.Nano())
		s.PeakRSS = uint64(u.Maxrss) << 10 // #nosec G115 -- KiB, never below zero
	}
	s.Resident = resident()
	return s
}

// resident is 0 where the system does not report it.
func resident() uint64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize()) // #nosec G115 -- a page has a positive size
}

// startProfiles writes CPU, heap, mutex and block profiles into dir when the
// function returned is called; "": none.
func startProfiles(dir string) (stop func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	cpu, err := os.Create(filepath.Join(dir, "cpu.pprof")) // #nosec G304 -- named by who runs the harness
	if err != nil {
		return nil, err
	}
	runtime.SetMutexProfileFraction(10)
	runtime.SetBlockProfileRate(10_000)
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return nil, errors.Join(err, cpu.Close())
	}
	return func() {
		pprof.StopCPUProfile()
		err := cpu.Close()
		for _, name := range []string{"heap", "allocs", "mutex", "block"} {
			err = errors.Join(err, writeProfile(dir, name))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "profiles:", err)
		}
	}, nil
}

func writeProfile(dir, name string) error {
	f, err := os.Create(filepath.Join(dir, name+".pprof")) // #nosec G304 -- as above
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup(name).WriteTo(f, 0), f.Close())
}
