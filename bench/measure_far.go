package main

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"avatarworker/internal/errors"
)

// Metrics of starts on a slow network.
const (
	coldStart = "ms cold"
	warmStart = "ms warm"
)

// farDelay is how long packets to and from the backend take.
const farDelay = 100 * time.Millisecond

// roundTrip is to the far backend and back, in milliseconds.
const roundTrip = 200

// measureFarStart publishes jobs, one after the other, to a worker whose backend
// is farDelay away, and takes the time until the session's first message leaves
// the worker. The worker is new for each
// cold start; the warm ones follow.
func measureFarStart(ctx context.Context, profiles string, cold, warm int) (out sample, err error) {
	var first, later []float64
	for i := range cold {
		took, err := farStarts(ctx, profiles, strconv.Itoa(i), 1+warm)
		if err != nil {
			return nil, err
		}
		first, later = append(first, took[0]), append(later, took[1:]...)
	}
	slices.Sort(first)
	slices.Sort(later)
	return sample{coldStart: first[len(first)/2], warmStart: later[len(later)/2]}, nil
}

// farStarts returns the milliseconds of n starts of one worker.
func farStarts(ctx context.Context, profiles, prefix string, n int) (took []float64, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: 1}); err != nil {
		return nil, err
	}
	var (
		mu    sync.Mutex
		began time.Time // when the first message of the newest session left
	)
	console, err := s.far(&s.backend.said.Console, nil)
	if err != nil {
		return nil, err
	}
	defer console.close()
	// The first thing that the worker writes to a connection is the upgrade, the
	// second its first message.
	ingress, err := s.far(&s.backend.said.Ingress, func(n int, at time.Time) {
		if n == 2 {
			mu.Lock()
			began = at
			mu.Unlock()
		}
	})
	if err != nil {
		return nil, err
	}
	defer ingress.close()
	if _, err := s.with(ctx, params{Role: "worker", Concurrency: concurrency, Profiles: profiles}); err != nil {
		return nil, err
	}
	// The worker has asked for a token at its start, to check its API key. A cold
	// start has no such connection any more.
	if err := pause(ctx, 8*farDelay); err != nil {
		return nil, err
	}
	console.drop()
	ended, err := listen(s.nats.said.NATS)
	if err != nil {
		return nil, err
	}
	defer ended.close()
	for i := range n {
		at, err := publishOne(ended.nc, job("far"+prefix+"-"+strconv.Itoa(i), "ok", "discard"))
		if err == nil {
			err = ended.wait(ctx, 1)
		}
		if err != nil {
			return nil, err
		}
		mu.Lock()
		took = append(took, micros(began.Sub(at))/1e3)
		mu.Unlock()
	}
	return took, nil
}

// far puts a slow network between the worker and the server of an address.
func (s *stage) far(address *string, sent func(int, time.Time)) (*delayed, error) {
	u, err := url.Parse(*address)
	if err != nil {
		return nil, err
	}
	d, err := startDelayed(u.Host, farDelay, sent)
	if err != nil {
		return nil, err
	}
	if *address, err = d.in(*address); err != nil {
		d.close()
		return nil, fmt.Errorf("a slow network: %w", err)
	}
	return d, nil
}
