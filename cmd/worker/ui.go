package main

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
	"avatarworker/internal/ui"
	"avatarworker/internal/ui/api"
)

const aboutUI = `Serve the page for operators: queues, jobs, workers, circuits, dead letters and
alerts, what failures mean, and the actions that help. It needs NATS and nothing
else, and keeps itself current.

Without ui.write (--write) the page only shows. An address that other machines can
reach needs ui.auth or ui.trusted_header.`

func newUICommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "ui", Short: "Serve the page for operators", Long: aboutUI, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.serveUI(cmd.Context()) },
	}
	c.keyFlag(cmd, "ui-addr", "ui.addr", "`HOST:PORT` where it listens")
	c.boolKeyFlag(cmd, "write", "ui.write", "also change jobs, queues, circuits and workers; --write=false: only show")
	return cmd
}

func (c *cli) serveUI(ctx context.Context) error {
	outliveReaders()
	cfg, err := c.config()
	if err != nil {
		return err
	}
	if cfg.UI.Addr == "" {
		return &configError{errors.New("ui.addr: is off: set the address where the page is to be served, such as 127.0.0.1:8090")}
	}
	if err := cfg.RequireUI(); err != nil {
		return &configError{err}
	}
	log, err := c.logger()
	if err != nil {
		return err
	}
	options, err := natsOptions(cfg, "avatarworker ui", log)
	if err != nil {
		return &configError{err}
	}
	// Without Once: the page says that NATS is away, and goes on when it is back.
	nc, js, err := natsconn.Open(ctx, options)
	if err != nil {
		return err
	}
	defer closeConn(nc, log)
	page, err := c.startPage(ctx, cfg, log, nc, js)
	if err != nil {
		return err
	}
	systemd := newSystemdNotifier(log)
	systemd.serving("serving " + page.url)
	stop := systemd.start(ctx)
	defer stop()
	c.note("the page is at %s", page.url)
	<-ctx.Done()
	return page.stop()
}

// embeddedPage serves the page next to a worker with embedded NATS, and returns what
// ends it. If the address is in use, that is logged and the worker goes on.
func (c *cli) embeddedPage(ctx context.Context, cfg *config.Config, log zerolog.Logger, server nats.InProcessConnProvider) (stop func(), err error) {
	if cfg.UI.Addr == "" {
		return func() {}, nil
	}
	options, err := natsOptions(cfg, "avatarworker ui", log)
	if err != nil {
		return nil, &configError{err}
	}
	options.InProcess = server
	nc, js, err := natsconn.Open(ctx, options)
	if err != nil {
		return nil, err
	}
	page, err := c.startPage(ctx, cfg, log, nc, js)
	if err != nil {
		closeConn(nc, log)
		var unusable *configError
		if errors.As(err, &unusable) {
			return nil, err
		}
		log.Warn().Err(err).Msg("the worker runs without the page for operators")
		return func() {}, nil
	}
	return func() {
		if err := page.stop(); err != nil {
			log.Warn().Err(err).Msg("the page did not stop cleanly")
		}
		closeConn(nc, log)
	}, nil
}

// closeConn sends what was published and closes.
func closeConn(nc *nats.Conn, log zerolog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := natsconn.Close(ctx, nc); err != nil {
		log.Debug().Err(err).Msg("closing the connection to NATS")
	}
}

// page is the page that this process serves.
type page struct {
	url    string
	server *ui.Server
	end    context.CancelFunc
	ended  chan struct{}
	log    zerolog.Logger
}

// startPage serves the page on a connection, until its stop is called.
func (c *cli) startPage(ctx context.Context, cfg *config.Config, log zerolog.Logger, nc *nats.Conn, js jetstream.JetStream) (*page, error) {
	table, err := errorTable(cfg)
	if err != nil {
		return nil, err
	}
	names := topology.Names{Prefix: cfg.NATS.Prefix}
	// Kept in memory, so that many viewers, and lists that are looked at again and
	// again, cost the fleet nothing.
	model := status.NewModel(status.NewStore(js, names, c.now, 0).WithTariff(app.Tariff(cfg)).WithBudgets(fleetBudgets(cfg, js, names, c.now)), 0)
	store := ui.NewStore(ui.StoreOptions{
		NC: nc, JS: js, Names: names, Statuses: model, Refresh: model.Refresh, DefaultApp: cfg.App.ID, Limits: sessionLimits(cfg), Now: c.now, Log: log,
		Costs: cost.NewStore(js, names, cfg.TotalLabels()), Tariff: app.Tariff(cfg), Budgets: fleetBudgets(cfg, js, names, c.now),
	})
	handler, err := api.New(api.Options{
		Permitted: store.Permitted,
		Costs:     cost.NewStore(js, names, cfg.TotalLabels()), Budgets: fleetBudgets(cfg, js, names, c.now),
		Reader: model, Letters: dlq.NewStore(js, names, nil), Write: cfg.UI.Write, Refresh: model.Refresh, DefaultApp: cfg.App.ID, Table: table, Now: c.now, Log: log,
		Recordings: store.StoredRecordings,
		Changes:    func(ctx context.Context) (api.Changes, error) { return store.Operator(ctx) },
	})
	if err != nil {
		return nil, err
	}
	server, err := ui.New(ui.Options{
		Addr: cfg.UI.Addr, Hosts: cfg.UI.Hosts, Write: cfg.UI.Write, Auth: pageAuth(&cfg.UI),
		Reader: store, Actor: store, API: handler, Codes: table.Rows(), Version: versionText(), Now: c.now, Logger: log,
	})
	if err != nil {
		return nil, &configError{err}
	}
	url, err := server.Start()
	if err != nil {
		return nil, err
	}
	log.Info().Str("url", url).Bool("write", cfg.UI.Write).Msg("the page for operators is served")
	follow, end := context.WithCancel(context.WithoutCancel(ctx))
	p := &page{url: url, server: server, end: end, ended: make(chan struct{}), log: log}
	go func() {
		defer close(p.ended)
		var wg sync.WaitGroup
		wg.Go(func() { model.Run(follow) })
		store.Run(follow)
		wg.Wait()
	}()
	return p, nil
}

// pageAuth is who may see the page.
func pageAuth(u *config.UI) ui.Auth {
	a := ui.Auth{User: u.Auth.User, TrustedHeader: u.TrustedHeader, Proxies: u.Networks()}
	if u.Auth.TokenFile != "" || u.Auth.PasswordFile != "" {
		a.Secrets = u.Auth.Secrets
	}
	return a
}

// sessionLimits are the session limits by the names that the page has for them.
func sessionLimits(cfg *config.Config) map[string]int {
	limits := make(map[string]int)
	app := func(id string, a *config.App) {
		if id != "" && a.MaxSessions > 0 {
			limits["app_id "+id] = a.MaxSessions
		}
	}
	app(cfg.App.ID, &cfg.App)
	for id, a := range cfg.Apps {
		app(id, a)
	}
	for _, limit := range cfg.Limits {
		limits[limit.Key] = limit.Max
	}
	return limits
}

// stopTime bounds the wait for requests that run when the page ends.
const stopTime = 10 * time.Second

// stop ends the page: requests that run are finished.
func (p *page) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	err := p.server.Stop(ctx)
	p.end()
	<-p.ended
	p.log.Info().Msg("the page has ended")
	return err
}
