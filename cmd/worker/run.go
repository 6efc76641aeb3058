package main

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
)

const aboutRun = `Pull jobs from the queues, run each as one session against the avatar backend,
and settle it.

SIGTERM, SIGINT or SIGHUP drains: nothing new is taken, sessions may finish within
worker.drain_timeout, what does not finish is handed back. A second signal ends
the process at once; nothing is lost by that either.`

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
	notice := newNotifier(log)
	options := app.Options{Config: cfg, Logger: log, Version: versionText(), OnReady: notice.ready}
	if embedded {
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
	}
	worker, err := app.New(options)
	if err != nil {
		return err
	}
	stop := notice.start(ctx)
	defer stop()
	return worker.Run(ctx)
}

// startEmbedded starts NATS where nats.url says.
func startEmbedded(cfg *config.Config, log zerolog.Logger) (*natsserver.Server, error) {
	host, port, err := listenAt(cfg.NATS.URL)
	if err != nil {
		return nil, &configError{err}
	}
	if cfg.NATS.NKey != "" {
		return nil, &configError{errors.New("nats.nkey: --embedded knows no nkeys: set nats.user and nats.password, or nats.token, instead")}
	}
	if tls := cfg.NATS.TLS; tls.Cert+tls.Key+tls.CA != "" || cfg.NATS.TLSFirst {
		return nil, &configError{errors.New("nats.tls: --embedded listens without TLS: leave out nats.tls_first, nats.tls.cert, nats.tls.key and nats.tls.ca, or run NATS as a server of its own")}
	}
	if cfg.NATS.APIPrefix != "" {
		return nil, &configError{errors.New("nats.api_prefix: --embedded has JetStream at $JS.API: leave it out, or run NATS as a server of its own")}
	}
	password, token, err := cfg.NATS.Login()
	if err != nil {
		return nil, &configError{err}
	}
	server, err := natsserver.Start(natsserver.Options{
		StoreDir: cfg.NATS.StoreDir, Host: host, Port: port, Domain: cfg.NATS.Domain,
		User: cfg.NATS.User, Password: password, Token: token, Logger: log,
	})
	if errors.Is(err, natsserver.ErrOpen) {
		return nil, &configError{err}
	}
	return server, err
}

// listenAt takes the address out of nats.url.
func listenAt(text string) (host string, port int, err error) {
	if strings.Contains(text, ",") {
		return "", 0, errors.New("nats.url: --embedded starts one server, so it takes one URL")
	}
	if !strings.Contains(text, "://") {
		text = "nats://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" {
		return "", 0, errors.New("nats.url: --embedded needs an address to listen at, such as nats://127.0.0.1:4222")
	}
	if u.Scheme != "nats" {
		return "", 0, fmt.Errorf("nats.url: --embedded listens without TLS and WebSocket, so that %s:// can't be served: write nats://host:port, or run NATS as a server of its own", u.Scheme)
	}
	if u.User != nil {
		return "", 0, errors.New("nats.url: with --embedded set nats.user and nats.password, or nats.token, instead of writing them into the URL")
	}
	port = 4222
	if p := u.Port(); p != "" {
		if port, err = strconv.Atoi(p); err != nil || port > 65535 {
			return "", 0, fmt.Errorf("nats.url: %q is no port", p)
		}
	}
	if port == 0 {
		port = natsserver.RandomPort
	}
	return u.Hostname(), port, nil
}

// notifier tells systemd how the service stands. Without systemd it does
// nothing.
type notifier struct {
	log   zerolog.Logger
	once  sync.Once
	began chan struct{} // closed when jobs are taken
}

func newNotifier(log zerolog.Logger) *notifier {
	return &notifier{log: log, began: make(chan struct{})}
}

func (n *notifier) ready() {
	n.once.Do(func() { close(n.began) })
	n.tell(daemon.SdNotifyReady + "\nSTATUS=taking jobs")
}

func (n *notifier) tell(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Debug().Err(err).Msg("could not notify systemd")
	}
}

// extendBy asks systemd for patience while NATS is away: the worker outlives
// that, and is only ready when it takes jobs.
const extendBy = 30 * time.Second

// start keeps systemd's timers content until ctx ends and stop is called.
func (n *notifier) start(ctx context.Context) (stop func()) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn().Err(err).Msg("WATCHDOG_USEC is not as systemd sets it; no watchdog")
	}
	unhook := context.AfterFunc(ctx, func() { n.tell(daemon.SdNotifyStopping + "\nSTATUS=draining") })
	ended := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		n.every(extendBy/3, n.began, ended, "EXTEND_TIMEOUT_USEC="+strconv.FormatInt(extendBy.Microseconds(), 10))
	})
	if interval > 0 {
		wg.Go(func() { n.every(interval/2, nil, ended, daemon.SdNotifyWatchdog) })
	}
	return func() {
		unhook()
		close(ended)
		wg.Wait()
	}
}

// every sends state again and again until one of the channels is closed.
func (n *notifier) every(interval time.Duration, enough, ended <-chan struct{}, state string) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-enough:
			return
		case <-ended:
			return
		case <-ticker.C:
			n.tell(state)
		}
	}
}

// versionText is the version that logs, metrics and other workers see.
func versionText() string { return thisBuild().Version }
