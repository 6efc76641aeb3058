package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/simulator"
	"avatarworker/internal/topology"
)

const aboutDemo = `Start NATS with JetStream, a simulated avatar backend and one worker in this
process, publish sample jobs that complete, expire or become dead letters, and show
what happens to them.
Nothing is kept, and nothing outside this machine is used.`

const (
	demoApp = "demo-app"
	// demoKey is not a secret: the simulator takes any.
	demoKey = "demo-api-key"
	// demoSpeed is how much faster than real time the simulator moves.
	demoSpeed = 8
	// demoTimeout bounds the whole show.
	demoTimeout = 60 * time.Second
)

func newDemoCommand(c *cli) *cobra.Command {
	var stay, asJSON bool
	cmd := &cobra.Command{
		Use: "demo", Short: "Run everything in this process, with sample jobs", Long: aboutDemo, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.demo(cmd.Context(), stay, asJSON) },
	}
	cmd.Flags().BoolVar(&stay, "stay", false, "keep it running, and print how to use it")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) demo(ctx context.Context, stay, asJSON bool) error {
	stage, err := c.newStage(ctx, asJSON)
	if err != nil {
		return err
	}
	defer stage.close()
	show := &show{stage: stage, started: c.now(), jobs: demoJobs(c.now())}
	ok, err := show.run(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		err = c.printJSON(show.summary(ok))
	} else {
		err = show.printSummary(ok)
	}
	if err != nil {
		return err
	}
	if stay {
		if err := stage.stay(ctx); err != nil {
			return err
		}
	}
	if !ok {
		return errShown
	}
	return nil
}

// stage is everything that the demo runs on.
type stage struct {
	c       *cli
	quiet   bool // only the JSON
	backend *simulator.Server
	server  *natsserver.Server
	worker  *app.App
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names
	dir     string
	stop    context.CancelFunc
	wg      sync.WaitGroup
	failed  chan error // the worker ended
}

func (c *cli) newStage(ctx context.Context, quiet bool) (_ *stage, err error) {
	s := &stage{c: c, quiet: quiet, failed: make(chan error, 1), stop: func() {}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	log := zerolog.Nop() // the demo prints what happens; logs only with --log-level
	if _, asked := c.overrides["log.level"]; asked {
		if log, err = c.logger(); err != nil {
			return nil, err
		}
	}
	s.backend = simulator.New(simulator.Options{Addr: "127.0.0.1:0", Speed: demoSpeed, Logger: log})
	if err := s.backend.Start(ctx); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "avatarworker-demo-"); err != nil {
		return nil, err
	}
	if s.server, err = natsserver.Start(natsserver.Options{StoreDir: s.dir, Port: natsserver.RandomPort, Logger: log}); err != nil {
		return nil, err
	}
	cfg := s.config()
	s.names = topology.Names{Prefix: cfg.NATS.Prefix}
	if err := s.startWorker(ctx, cfg, log); err != nil {
		return nil, err
	}
	if s.nc, err = nats.Connect("", nats.InProcessServer(s.server), nats.Name("avatarworker demo")); err != nil {
		return nil, err
	}
	s.js, err = jetstream.New(s.nc)
	return s, err
}

// config is the defaults, but for addresses and for waits too long for a demo.
func (s *stage) config() *config.Config {
	cfg := config.Defaults()
	cfg.NATS.URL = s.server.ClientURL()
	cfg.App.ID, cfg.App.APIKey = demoApp, demoKey
	cfg.Backend.ConsoleURL, cfg.Backend.IngressURL = s.backend.ConsoleURL(), s.backend.IngressURL()
	cfg.Retry.Initial = 200 * time.Millisecond
	cfg.Audio.EgressMargin = 500 * time.Millisecond
	cfg.Worker.DrainTimeout = 5 * time.Second
	cfg.Worker.Name = "demo"
	cfg.Admin.Addr = "127.0.0.1:0"
	return cfg
}

func (s *stage) startWorker(ctx context.Context, cfg *config.Config, log zerolog.Logger) error {
	ready := make(chan struct{})
	worker, err := app.New(app.Options{
		Config: cfg, Logger: log, Version: versionText(), InProcess: s.server, OnReady: func() { close(ready) },
	})
	if err != nil {
		return err
	}
	s.worker = worker
	// It drains when the stage is cleared, not when a signal comes.
	workCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	s.wg.Go(func() { s.failed <- worker.Run(workCtx) })
	select {
	case <-ready:
		return nil
	case err := <-s.failed:
		return errors.Join(errors.New("the worker ended before it began"), err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close clears the stage; it may be called on half of one.
func (s *stage) close() {
	if s.nc != nil {
		s.nc.Close()
	}
	s.stop()
	s.wg.Wait()
	if s.server != nil {
		if err := s.server.Shutdown(); err != nil {
			s.c.note("avatarworker: stop NATS: %s", err)
		}
	}
	if s.backend != nil {
		s.backend.Stop()
	}
	if s.dir != "" {
		if err := os.RemoveAll(s.dir); err != nil {
			s.c.note("avatarworker: remove %s: %s", s.dir, err)
		}
	}
}

// printf prints a line of the demo.
func (s *stage) printf(format string, args ...any) {
	if !s.quiet {
		// A reader that went away does not stop the demo.
		_, _ = fmt.Fprintf(s.c.stdout, format+"\n", args...)
	}
}

// stay serves the page, prints how to use the demo, and returns when ctx ends.
func (s *stage) stay(ctx context.Context) error {
	cfg := s.config()
	// Only this machine reaches it, and there is nothing to lose.
	cfg.UI.Addr, cfg.UI.Write = "127.0.0.1:0", true
	page, err := s.c.startPage(ctx, cfg, zerolog.Nop(), s.nc, s.js)
	if err != nil {
		return err
	}
	s.explain(page.url)
	<-ctx.Done()
	return page.stop()
}

// explain prints how to use a demo that keeps running.
func (s *stage) explain(pageURL string) {
	url := s.server.ClientURL()
	s.c.note(`
The demo stays until Ctrl-C. The page for operators: %s

In another terminal:

  export NATS_URL=%s
  avatarworker submit --avatar ok --audio internal/audio/clip/hello.wav --wait
  avatarworker submit --avatar fail-avatarNotFound --audio internal/audio/clip/hello.wav --wait
  avatarworker status
  avatarworker events
  avatarworker dlq ls
  curl http://%s/metrics
  curl %s/                  the simulated backend and its avatars`, pageURL, url, s.worker.AdminAddr(), s.backend.URL())
}
