package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"avatarworker/internal/errors"
)

// Metrics of a worker with jobs that wait.
const heldCPU = "µs CPU/s for each held job"

// measureCrowd lets n jobs of an app whose circuit is open wait, then publishes
// jobs of another app and takes the time of their starts.
func measureCrowd(ctx context.Context, profiles string, n, starts int) (out sample, err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return nil, err
	}
	if err := s.withBackend(ctx, params{Frames: 1}); err != nil {
		return nil, err
	}
	c, err := s.with(ctx, params{Role: "worker", Concurrency: concurrency, Profiles: profiles})
	if err != nil {
		return nil, err
	}
	held, err := listen(s.nats.said.NATS)
	if err != nil {
		return nil, err
	}
	defer held.close()
	err = fill(ctx, s.nats.said.NATS, n, func(i int) []byte {
		return jobOf(crowdApp, "held"+strconv.Itoa(i), "fail-billingRequired", "discard")
	})
	if err == nil {
		err = held.waitFor(ctx, "avatar.job.held", n)
	}
	if err != nil {
		return nil, err
	}
	before, err := c.stats(false)
	if err != nil {
		return nil, err
	}
	const watched = 5 * time.Second
	if err := pause(ctx, watched); err != nil {
		return nil, err
	}
	after, err := c.stats(false)
	if err != nil {
		return nil, err
	}
	took, err := s.starts(ctx, starts, "crowd")
	if err != nil {
		return nil, err
	}
	return sample{
		heldCPU:     micros(after.CPU-before.CPU) / watched.Seconds() / float64(n),
		startMedian: quantile(took, 0.5), startP99: quantile(took, 0.99),
	}, nil
}

// waitFor returns when n events of a type came, whatever else comes.
func (o *outcomes) waitFor(ctx context.Context, kind string, n int) error {
	for n > 0 {
		msg, err := o.sub.NextMsgWithContext(ctx)
		if err != nil {
			return fmt.Errorf("%d %s events are missing: %w", n, kind, err)
		}
		if msg.Header.Get("ce-type") == kind {
			n--
		}
	}
	return nil
}
