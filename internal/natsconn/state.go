package natsconn

import (
	"crypto/tls"
	"strings"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// stateLogger logs changes of a connection, each outage once, and reports its
// state.
type stateLogger struct {
	log      zerolog.Logger
	onState  func(connected bool)
	onDenied func(operation string)
	away     atomic.Bool // the outage has been logged
}

func (w *stateLogger) notify(connected bool) {
	if w.onState != nil {
		w.onState(connected)
	}
}

func (w *stateLogger) connected(nc *nats.Conn) {
	w.away.Store(false)
	w.log.Info().Str("server", nc.ConnectedUrlRedacted()).Str("server_name", nc.ConnectedServerName()).Msg("connected to NATS")
	w.notify(true)
}

func (w *stateLogger) disconnected(_ *nats.Conn, err error) {
	if err != nil { // nil: we closed it
		w.away.Store(true)
		w.log.Warn().Str("error", Redact(err.Error())).Msg("lost the connection to NATS; trying again")
	}
	w.notify(false)
}

// reconnectFailed is called after each failed attempt to connect. The first of an
// outage is logged as a warning.
func (w *stateLogger) reconnectFailed(nc *nats.Conn, err error) {
	if err == nil {
		return
	}
	level := zerolog.DebugLevel
	if w.away.CompareAndSwap(false, true) {
		level = zerolog.WarnLevel
	}
	hint := ""
	if record := (tls.RecordHeaderError{}); errors.As(err, &record) { // the server sent its INFO first
		hint = tlsFirstHint
	}
	w.log.WithLevel(level).Str("urls", Redact(strings.Join(nc.Servers(), ","))).Str("error", Redact(err.Error())+hint).
		Msg("NATS can't be reached, trying again; nats.url, NATS_URL or --nats-url say where it is")
}

func (w *stateLogger) closed(*nats.Conn) { w.notify(false) }

func (w *stateLogger) failed(_ *nats.Conn, sub *nats.Subscription, err error) {
	event := w.log.Warn().Str("error", Redact(err.Error()))
	if sub != nil {
		event = event.Str("subject", sub.Subject)
	}
	event.Msg("NATS reports an error")
	if _, operation, found := strings.Cut(err.Error(), "Permissions Violation for "); found && w.onDenied != nil {
		w.onDenied(Redact(operation))
	}
}

func (w *stateLogger) lameDuck(nc *nats.Conn) {
	w.log.Info().Str("server", nc.ConnectedUrlRedacted()).Msg("the NATS server is about to stop; switching to another")
}
