package telemetry

import (
	"context"
	"strings"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// W3C trace context: the header names, in lower case as the specification has
// them. NATS headers tell case apart, so the case matters.
const (
	TraceParent = "traceparent"
	TraceState  = "tracestate"
)

// HeaderCarrier carries trace context in NATS headers. OpenTelemetry's own
// carrier would write Traceparent, which no other client of NATS looks for.
type HeaderCarrier nats.Header

var _ propagation.TextMapCarrier = HeaderCarrier{}

// Get returns the first value of key, or of a key that differs by case: some
// publishers send Traceparent.
func (h HeaderCarrier) Get(key string) string {
	if values := h[key]; len(values) > 0 {
		return values[0]
	}
	for name, values := range h {
		if len(values) > 0 && strings.EqualFold(name, key) {
			return values[0]
		}
	}
	return ""
}

// Set puts value in place of what key, in any case, had.
func (h HeaderCarrier) Set(key, value string) {
	for name := range h {
		if strings.EqualFold(name, key) {
			delete(h, name)
		}
	}
	h[strings.ToLower(key)] = []string{value}
}

// Keys lists the headers' names.
func (h HeaderCarrier) Keys() []string {
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	return names
}

// Extract returns ctx with the trace context that the headers carry; where
// they carry none, or a malformed one, ctx as it is.
func Extract(ctx context.Context, header nats.Header) context.Context {
	return propagation.TraceContext{}.Extract(ctx, HeaderCarrier(header))
}

// Inject writes ctx's trace context into the headers; none, nothing. The
// headers must not be nil.
func Inject(ctx context.Context, header nats.Header) {
	propagation.TraceContext{}.Inject(ctx, HeaderCarrier(header))
}

// WithParent returns ctx under the remote span that parent and state (W3C
// traceparent and tracestate) name; a malformed parent changes nothing.
func WithParent(ctx context.Context, parent, state string) context.Context {
	carrier := propagation.MapCarrier{TraceParent: parent, TraceState: state}
	return propagation.TraceContext{}.Extract(ctx, carrier)
}

// ParentOf returns ctx's span as traceparent and tracestate; "" where there is
// none.
func ParentOf(ctx context.Context) (parent, state string) {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier[TraceParent], carrier[TraceState]
}

// LinkTo returns a link to ctx's span; ok is false where there is none.
func LinkTo(ctx context.Context) (link trace.Link, ok bool) {
	sc := trace.SpanContextFromContext(ctx)
	return trace.Link{SpanContext: sc}, sc.IsValid()
}
