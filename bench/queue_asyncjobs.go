package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/choria-io/asyncjobs"
	"github.com/nats-io/nats.go"
)

// asyncQueue is choria-io/asyncjobs with a handler that does nothing.
type asyncQueue struct {
	nc     *nats.Conn
	client *asyncjobs.Client
}

func (r *asyncQueue) start(_ context.Context, p params) (answer, error) {
	nc, err := nats.Connect(p.NATS, nats.UseOldRequestStyle()) // which it asks for
	if err != nil {
		return answer{}, err
	}
	r.nc = nc
	r.client, err = asyncjobs.NewClient(
		asyncjobs.NatsConn(nc), asyncjobs.ClientConcurrency(p.Concurrency),
		asyncjobs.WorkQueue(&asyncjobs.Queue{Name: "bench", MaxRunTime: time.Minute, MaxTries: 10, MaxConcurrent: p.Concurrency}),
	)
	return answer{}, err
}

func (r *asyncQueue) stop() { r.nc.Close() }

func (r *asyncQueue) do(ctx context.Context, c command) (answer, error) {
	if c.Do == "fill" {
		return answer{}, r.fill(ctx, c.N)
	}
	runCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	var handled atomic.Int64
	all := make(chan struct{})
	router := asyncjobs.NewTaskRouter()
	err := router.HandleFunc("noop", func(context.Context, asyncjobs.Logger, *asyncjobs.Task) (any, error) {
		if handled.Add(1) == int64(c.N) {
			close(all)
		}
		return "done", nil
	})
	if err != nil {
		return answer{}, err
	}
	begun := time.Now()
	var (
		ended  sync.WaitGroup
		runErr error
	)
	ended.Go(func() { runErr = r.client.Run(runCtx, router) })
	select {
	case <-all:
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
	// Its clock stops with the last handler: what it still writes and
	// acknowledges is a gift.
	elapsed := time.Since(begun)
	cancel()
	ended.Wait()
	return answer{Elapsed: elapsed}, runErr
}

// fill enqueues n tasks, several at a time.
func (r *asyncQueue) fill(ctx context.Context, n int) error {
	var (
		wg    sync.WaitGroup
		next  atomic.Int64
		fault atomic.Pointer[error]
	)
	for range 16 {
		wg.Go(func() {
			for next.Add(1) <= int64(n) && fault.Load() == nil {
				task, err := asyncjobs.NewTask("noop", map[string]string{"avatar_id": "ok"})
				if err == nil {
					err = r.client.EnqueueTask(ctx, task)
				}
				if err != nil {
					fault.Store(&err)
				}
			}
		})
	}
	wg.Wait()
	if err := fault.Load(); err != nil {
		return *err
	}
	return nil
}
