package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// appRole is the whole worker as `avatarworker run` runs it, metrics and log lines
// included; the lines go nowhere.
type appRole struct {
	stopIt context.CancelFunc
	ended  sync.WaitGroup
	err    error
}

func (r *appRole) start(ctx context.Context, p params) (answer, error) {
	c := config.Defaults()
	c.NATS.URL = p.NATS
	c.Worker.Name, c.Worker.Concurrency, c.Worker.DrainTimeout = "bench", p.Concurrency, time.Second
	c.App.ID, c.App.APIKey = "app", "bench"
	c.Backend.ConsoleURL, c.Backend.IngressURL = p.Console, p.Ingress
	// Idle sessions of the memory measurement owe speech, for as long as that
	// takes.
	c.Backend.StallTimeout = 10 * time.Minute
	c.Backend.ConnectTimeout, c.Backend.HandshakeTimeout = time.Minute, time.Minute
	c.Admin.Addr = ""
	ready := make(chan struct{})
	worker, err := app.New(app.Options{
		Config: c, Logger: zerolog.New(io.Discard).Level(zerolog.InfoLevel), Version: "bench", OnReady: func() { close(ready) },
	})
	if err != nil {
		return answer{}, err
	}
	runCtx, cancel := context.WithCancel(ctx)
	r.stopIt = cancel
	ended := make(chan struct{})
	r.ended.Go(func() { defer close(ended); r.err = worker.Run(runCtx) })
	select {
	case <-ready:
		return answer{}, nil
	case <-ended:
		return answer{}, errors.Join(errors.New("the worker ended"), r.err)
	}
}

func (r *appRole) do(_ context.Context, c command) (answer, error) {
	return answer{}, fmt.Errorf("%s: the worker takes its work from the queue", c.Do)
}

func (r *appRole) stop() {
	r.stopIt()
	r.ended.Wait()
}

// job is the body of a job with as little speech as the other readers send.
func job(id, avatar, output string) []byte {
	speech := base64.StdEncoding.EncodeToString(make([]byte, speechBytes))
	return fmt.Appendf(nil, `{"id":%q,"avatar_id":%q,"audio":{"inline":%q,"format":"pcm_s16le","sample_rate":16000},"output":{%q:{}}}`,
		id, avatar, speech, output)
}

// noopJob is the body of a job whose session does nothing.
func noopJob(id string) []byte {
	return fmt.Appendf(nil, `{"id":%q,"avatar_id":"ok","audio":{"object":"speech.wav"},"output":{"discard":{}}}`, id)
}

// outcomes counts how jobs end.
type outcomes struct {
	nc  *nats.Conn
	sub *nats.Subscription
}

func listen(url string) (*outcomes, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	sub, err := nc.SubscribeSync(topology.Names{}.AllEvents())
	if err == nil {
		err = sub.SetPendingLimits(-1, -1)
	}
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &outcomes{nc: nc, sub: sub}, nil
}

// wait returns when n jobs have completed, or says how one ended otherwise.
func (o *outcomes) wait(ctx context.Context, n int) error {
	for n > 0 {
		msg, err := o.sub.NextMsgWithContext(ctx)
		if err != nil {
			return fmt.Errorf("%d jobs have not ended: %w", n, err)
		}
		switch kind := msg.Header.Get("ce-type"); kind {
		case "avatar.job.started":
		case "avatar.job.completed":
			n--
		default:
			return fmt.Errorf("a job did not complete: %s: %s", kind, msg.Data)
		}
	}
	return nil
}

func (o *outcomes) close() { o.nc.Close() }
