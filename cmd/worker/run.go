package main

import (
	"context"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
)

const aboutRun = `Pull jobs from the queues, run each as one session against the avatar backend,
and settle it.

SIGTERM, SIGINT or SIGHUP drains the worker: it takes no new jobs, lets sessions
finish within worker.drain_timeout, and hands the other jobs back. A second signal
ends the process at once; even then no job is lost.

With --embedded the page for operators is served too, at ui.addr.`

func newRunCommand(c *cli) *cobra.Command {
	var embedded bool
	cmd := &cobra.Command{
		Use: "run", Short: "Run the worker", Long: aboutRun, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.runWorker(cmd.Context(), embedded) },
	}
	cmd.Flags().BoolVar(&embedded, "embedded", false, "start NATS with JetStream in this process: files in nats.store_dir, listening at nats.url")
	c.keyFlag(cmd, "concurrency", "worker.concurrency", "`N` sessions at a time")
	c.keyFlag(cmd, "queues", "worker.queues", "`LIST` of queues, each with a weight: default,vip:3")
	c.keyFlag(cmd, "admin-addr", "admin.addr", "`HOST:PORT` of health and metrics")
	c.keyFlag(cmd, "ui-addr", "ui.addr", "`HOST:PORT` of the page for operators, with --embedded; off: none")
	return cmd
}

func (c *cli) runWorker(ctx context.Context, embedded bool) error {
	outliveReaders()
	c.secrets = true
	cfg, err := c.config()
	if err != nil {
		return err
	}
	log, err := c.logger()
	if err != nil {
		return err
	}
	systemd := newSystemdNotifier(log)
	options := app.Options{Config: cfg, Logger: log, Version: versionText(), OnReady: systemd.ready}
	if embedded {
		if err := cfg.RequireUI(); err != nil {
			return &configError{err}
		}
		server, err := startEmbedded(cfg, log)
		if err != nil {
			return err
		}
		defer func() {
			if err := server.Shutdown(); err != nil {
				log.Warn().Err(err).Msg("embedded NATS did not stop cleanly")
			}
		}()
		log.Info().Str("url", server.ClientURL()).Str("store_dir", cfg.NATS.StoreDir).Msg("embedded NATS listens")
		options.InProcess = server
		stopPage, err := c.embeddedPage(ctx, cfg, log, server)
		if err != nil {
			return err
		}
		defer stopPage()
	}
	worker, err := app.New(options)
	if err != nil {
		return err
	}
	stop := systemd.start(ctx)
	defer stop()
	return worker.Run(ctx)
}

// versionText is the version that logs, metrics and other workers see.
func versionText() string { return thisBuild().Version }
