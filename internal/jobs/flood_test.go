package jobs_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
)

// Requests for unknown jobs, faster than they can be answered.
func TestFloodOfControlRequestsHarmsNoJob(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"cancel", "interrupt"} {
		t.Run(op, func(t *testing.T) {
			h := newEnv(t)
			renewed := newRenewals()
			flooded := make(chan struct{})
			h.start(runnerFunc(func(ctx context.Context, a *jobs.Attempt) error {
				connect(a)
				if a.Job.ID == "long" {
					select {
					case <-flooded:
					case <-ctx.Done():
						return untilDone(ctx)
					}
					if err := renewed.outlive(ctx, size(3, 12)); err != nil {
						return err
					}
				}
				return speak(ctx, a, 1)
			}), func(o *options) { o.Observer, o.AckWait = renewed, 8*time.Second })
			h.submit("default", job("long"))
			h.state("long", lifecycle.StateRunning)
			n := size(20_000, 60_000)
			for i := range n {
				if err := h.nc.Publish(h.names.Control(fmt.Sprintf("ghost-%d", i)), []byte(`{"op":"`+op+`"}`)); err != nil {
					t.Fatal(err)
				}
			}
			if err := h.nc.FlushTimeout(time.Minute); err != nil {
				t.Fatal(err)
			}
			close(flooded)
			from := time.Now()
			h.submit("default", job("honest"))
			h.outcome("honest", lifecycle.StateCompleted)
			if took := time.Since(from); took > natstest.Unhurried(5*time.Second) {
				t.Errorf("a job took %s", took)
			}
			if r := h.outcome("long", lifecycle.StateCompleted); r.Session != 1 {
				t.Errorf("the session under way was ended: %d sessions", r.Session)
			}
			if records := h.messages("KV_" + h.names.StateBucket()); records > 2000 {
				t.Errorf("%d requests for jobs that do not exist made %d records", n, records)
			}
		})
	}
}
