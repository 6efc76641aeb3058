package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/propagation"
)

const (
	parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	state  = "vendor=value"
)

// withParent is ctx under the remote span that a traceparent and a tracestate name.
func withParent(ctx context.Context, parent, state string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent, "tracestate": state})
}

func TestLogLineHasUTCTimeAndTraceIDs(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLogger(&out, "info", "auto", false)
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now().UTC().Truncate(time.Millisecond)
	ctx := withParent(t.Context(), parent, state)
	log.Info().Ctx(ctx).Str("job", "j1").Msg("hello")
	var line struct {
		Level   string    `json:"level"`
		Time    time.Time `json:"time"`
		Job     string    `json:"job"`
		TraceID string    `json:"trace_id"`
		SpanID  string    `json:"span_id"`
		Message string    `json:"message"`
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v in %s", err, out.String())
	}
	if line.Level != "info" || line.Job != "j1" || line.Message != "hello" ||
		line.TraceID != "4bf92f3577b34da6a3ce929d0e0e4736" || line.SpanID != "00f067aa0ba902b7" {
		t.Errorf("got %s", out.String())
	}
	if line.Time.Before(before) || time.Since(line.Time) > time.Minute || line.Time.Location() != time.UTC {
		t.Errorf("time is %v", line.Time)
	}
}

func TestLoggerUnderAContextHasTraceIDsOnEachLine(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLogger(&out, "debug", "json", true)
	if err != nil {
		t.Fatal(err)
	}
	under := log.With().Ctx(withParent(t.Context(), parent, "")).Logger()
	under.Debug().Msg("with")
	log.Debug().Ctx(t.Context()).Msg("without")
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "00f067aa0ba902b7") || strings.Contains(lines[1], "trace_id") {
		t.Errorf("got %q", lines)
	}
}

func TestLogLevelAndFormat(t *testing.T) {
	for _, row := range []struct {
		level, format string
		tty           bool
		want          string // start of what an info line gives; "" nothing
		fault         string
	}{
		{"info", "json", true, "{", ""},
		{"info", "auto", false, "{", ""},
		{"info", "auto", true, "\x1b[", ""},
		{"warn", "json", false, "", ""},
		{"loud", "json", false, "", `log level "loud"`},
		{"", "json", false, "", `log level ""`},
		{"fatal", "json", false, "", `log level "fatal"`},
		{"info", "xml", false, "", `log format "xml"`},
	} {
		var out bytes.Buffer
		log, err := NewLogger(&out, row.level, row.format, row.tty)
		if (err == nil) != (row.fault == "") || (err != nil && !strings.Contains(err.Error(), row.fault)) {
			t.Errorf("%+v: error %v", row, err)
			continue
		}
		log.Info().Msg("x")
		if (row.want == "" && out.Len() > 0) || !strings.HasPrefix(out.String(), row.want) {
			t.Errorf("%+v gives %q", row, out.String())
		}
	}
}

func TestConsoleFormatInAFileHasNoColours(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLogger(&out, "info", "console", false)
	if err != nil {
		t.Fatal(err)
	}
	log.Info().Str("job", "j1").Msg("hello")
	if line := out.String(); strings.ContainsAny(line, "{\x1b") || !strings.Contains(line, " INF hello job=j1") {
		t.Errorf("got %q", line)
	}
}
