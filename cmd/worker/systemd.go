package main

import (
	"context"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
)

// systemdNotifier reports the service's state to systemd, and answers its
// watchdog. It does nothing where the process was not started by systemd.
type systemdNotifier struct {
	log   zerolog.Logger
	once  sync.Once
	began chan struct{} // closed when jobs are taken
}

func newSystemdNotifier(log zerolog.Logger) *systemdNotifier {
	return &systemdNotifier{log: log, began: make(chan struct{})}
}

func (n *systemdNotifier) ready() { n.serving("taking jobs") }

// serving reports that the service has started, and what it does.
func (n *systemdNotifier) serving(what string) {
	n.once.Do(func() { close(n.began) })
	n.notify(daemon.SdNotifyReady + "\nSTATUS=" + what)
}

func (n *systemdNotifier) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Debug().Err(err).Msg("could not notify systemd")
	}
}

// extendBy is by how much the start timeout is extended, again and again, until
// the worker takes jobs: it survives an absent NATS server, and is not ready
// before it has found one.
const extendBy = 30 * time.Second

// start keeps systemd's timers from running out until the returned function is
// called. When ctx ends, it reports that the worker stops.
func (n *systemdNotifier) start(ctx context.Context) (stop func()) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn().Err(err).Msg("WATCHDOG_USEC is not valid; systemd's watchdog is not answered")
	}
	unhook := context.AfterFunc(ctx, func() { n.notify(daemon.SdNotifyStopping + "\nSTATUS=draining") })
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

// every sends state at each interval until one of the channels is closed.
func (n *systemdNotifier) every(interval time.Duration, enough, ended <-chan struct{}, state string) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-enough:
			return
		case <-ended:
			return
		case <-ticker.C:
			n.notify(state)
		}
	}
}
