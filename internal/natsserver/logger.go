package natsserver

import (
	"fmt"
	"sync/atomic"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/rs/zerolog"
)

// logger passes the server's log lines to our log: warnings and errors as
// warnings, the rest at debug level. It keeps what the server calls fatal for
// Start, which returns it as an error: a library does not end the program.
type logger struct {
	to      zerolog.Logger
	failure atomic.Pointer[string]
}

var _ server.Logger = (*logger)(nil)

func newLogger(to zerolog.Logger) *logger {
	return &logger{to: to.With().Str("component", "nats-server").Logger()}
}

func (l *logger) debug() bool { return l.to.GetLevel() <= zerolog.DebugLevel }

// fatal returns the server's fatal message, or "" if there is none.
func (l *logger) fatal() string {
	if text := l.failure.Load(); text != nil {
		return *text
	}
	return ""
}

func (l *logger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.failure.CompareAndSwap(nil, &text)
}

func (l *logger) Noticef(format string, v ...any) { l.to.Debug().Msgf(format, v...) }
func (l *logger) Debugf(format string, v ...any)  { l.to.Debug().Msgf(format, v...) }
func (l *logger) Tracef(format string, v ...any)  { l.to.Trace().Msgf(format, v...) }
func (l *logger) Warnf(format string, v ...any)   { l.to.Warn().Msgf(format, v...) }
func (l *logger) Errorf(format string, v ...any)  { l.to.Warn().Msgf(format, v...) }
