package session

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/errors"
)

// Span names.
const (
	spanToken     = "session token"
	spanConnect   = "websocket connect"
	spanHandshake = "websocket handshake"
	spanUtterance = "utterance"
)

func extractTrace(ctx context.Context, parent, state string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent, "tracestate": state})
}

// traceOf returns the trace of ctx, or else the given one.
func traceOf(ctx context.Context, given traceContext) traceContext {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return given
	}
	m := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, m)
	return traceContext{m["traceparent"], m["tracestate"]}
}

func (c *Client) span(ctx context.Context, name, region string) (context.Context, trace.Span) {
	return c.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("avatar.region", region)))
}

// endSpan ends a span. err must be redacted already.
func endSpan(span trace.Span, err error) {
	if err != nil && span.IsRecording() {
		var e *errors.Error
		if errors.As(err, &e) {
			span.SetAttributes(attribute.String("avatar.error.code", string(e.Code)),
				attribute.String("avatar.error.phase", string(e.Phase)))
		}
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}
