package jobs

import (
	"context"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/jobs/jobspec"
)

// startProcess begins the span of one delivery, as a child of what the job's
// publisher said.
func (w *Worker) startProcess(ctx context.Context, header nats.Header, id jobspec.Identity, deliveries uint64) (context.Context, trace.Span) {
	ctx = propagation.TraceContext{}.Extract(ctx, jobspec.TraceCarrier(header))
	return w.o.Tracer.Start(ctx, "process "+id.Queue, trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(
		attribute.String("messaging.system", "nats"),
		attribute.String("messaging.operation.type", "process"),
		attribute.String("messaging.operation.name", "process"),
		attribute.String("messaging.destination.name", id.Subject),
		attribute.String("messaging.consumer.group.name", id.Queue),
		attribute.String("messaging.message.id", id.ID),
		attribute.Int("avatar.job.run", id.Run),
		attribute.Int64("messaging.nats.message.delivered_count", int64(deliveries)),
	))
}

// traceContext is what the events of an execution carry on: its own span where there
// is one, else what the job came with.
func (e *execution) traceContext() (parent, state string) {
	if sc := trace.SpanContextFromContext(e.ctx); sc.IsValid() {
		carrier := jobspec.TraceCarrier{}
		propagation.TraceContext{}.Inject(e.ctx, carrier)
		return carrier.Get(jobspec.HeaderTraceParent), carrier.Get(jobspec.HeaderTraceState)
	}
	return jobspec.TraceContext(e.msg.Headers())
}

// endSpan says how it went.
func endSpan(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}
