package main

import (
	"context"
	"os"
	"strconv"

	"avatarworker/internal/errors"
)

// sessionCosts are of the worker.
type sessionCosts struct {
	CPU         float64 `json:"cpu_ms"` // without its frames
	KiB         float64 `json:"kib"`    // peak
	CPUPerFrame float64 `json:"cpu_us_per_frame"`
	Published   float64 `json:"cpu_us_per_published_frame"`
	Files       float64 `json:"open_files"`
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
