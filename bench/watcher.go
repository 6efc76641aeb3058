package main

import (
	"context"
	"fmt"
	"sync"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

// watcher follows the state of the fleet in memory, as the page and status --watch do.
type watcher struct {
	nc     *nats.Conn
	stopIt context.CancelFunc
	ended  sync.WaitGroup
}

func (r *watcher) start(ctx context.Context, p params) (answer, error) {
	nc, js, err := connect(p.NATS)
	if err != nil {
		return answer{}, err
	}
	r.nc = nc
	model := status.NewModel(status.NewStore(js, topology.Names{}, nil, 0), 0)
	ctx, r.stopIt = context.WithCancel(ctx)
	r.ended.Go(func() { model.Run(ctx) })
	_, err = model.Fleet(ctx) // it has read everything once
	return answer{}, err
}

func (r *watcher) do(_ context.Context, c command) (answer, error) {
	return answer{}, fmt.Errorf("%s: the watcher takes no commands", c.Do)
}

func (r *watcher) stop() {
	r.stopIt()
	r.ended.Wait()
	r.nc.Close()
}
