// Package telemetry makes a worker's logger, metrics and traces. It owns their names
// and labels, and must not know how jobs are run.
package telemetry

import (
	"fmt"
	"io"
	"time"

	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/trace"
)

// NewLogger returns a logger that writes to w, one write a line, safe for
// several goroutines. Level is trace, debug, info, warn or error; format is
// json, console, or auto: console where w is a terminal, else json.
//
// Times are UTC with milliseconds. A line logged under a context (Event.Ctx, or
// Context.Ctx for a whole logger) has its trace_id and span_id.
func NewLogger(w io.Writer, level, format string, isTTY bool) (zerolog.Logger, error) {
	parsed, err := zerolog.ParseLevel(level)
	if err != nil || parsed < zerolog.TraceLevel || parsed > zerolog.ErrorLevel {
		return zerolog.Nop(), fmt.Errorf("log level %q: give trace, debug, info, warn or error", level)
	}
	switch {
	case format == "console", format == "auto" && isTTY:
		w = zerolog.ConsoleWriter{Out: w, NoColor: !isTTY, TimeFormat: "15:04:05.000", TimeLocation: time.UTC}
	case format != "json" && format != "auto":
		return zerolog.Nop(), fmt.Errorf("log format %q: give auto, json or console", format)
	}
	return zerolog.New(zerolog.SyncWriter(w)).Level(parsed).Hook(stamp{}, traceIDs{}), nil
}

// stamp adds the time. zerolog's own timestamp takes its layout from a global.
type stamp struct{}

func (stamp) Run(e *zerolog.Event, _ zerolog.Level, _ string) {
	e.Str(zerolog.TimestampFieldName, time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
}

// traceIDs adds the ids of the span under which a line is logged.
type traceIDs struct{}

func (traceIDs) Run(e *zerolog.Event, _ zerolog.Level, _ string) {
	if ctx := e.GetCtx(); ctx != nil {
		if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
			e.Str("trace_id", sc.TraceID().String()).Str("span_id", sc.SpanID().String())
		}
	}
}
