package telemetry

import (
	"context"
	"fmt"
	"os"
	"strings"

	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"avatarworker/internal/errors"
)

// Service names the service that the spans belong to. OTEL_SERVICE_NAME and
// OTEL_RESOURCE_ATTRIBUTES win over it.
type Service struct {
	Name     string // "": avatar-worker
	Version  string
	Instance string // the worker's id

	// Exporter takes the spans, whatever the environment says; nil: what the
	// environment asks for. Tests and embedding programs set it.
	Exporter sdktrace.SpanExporter
}

// NewTracing returns where spans are made, and what sends the last of them and
// stops. Tracing is off, at no cost, unless the standard OTEL_* variables ask
// for it: OTEL_TRACES_EXPORTER (other than none), or an
// OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.
// OTEL_SDK_DISABLED=true switches it off. When off, a trace context that comes
// in still goes out with the context.
//
// An error names the variable's fault; the provider is then the one that is off.
func NewTracing(ctx context.Context, service Service) (trace.TracerProvider, func(context.Context) error, error) {
	off := func() (trace.TracerProvider, func(context.Context) error) {
		return noop.NewTracerProvider(), func(context.Context) error { return nil }
	}
	exporter := service.Exporter
	if exporter == nil && !tracingAsked() {
		provider, stop := off()
		return provider, stop, nil
	}
	if exporter == nil {
		var err error
		if exporter, err = autoexport.NewSpanExporter(ctx); err != nil {
			provider, stop := off()
			return provider, stop, fmt.Errorf("setting up traces by the OTEL_* variables: %w", err)
		}
	}
	from, err := describe(ctx, service)
	if err != nil {
		provider, stop := off()
		return provider, stop, errors.Join(
			fmt.Errorf("traces: OTEL_RESOURCE_ATTRIBUTES or OTEL_SERVICE_NAME: %w", err), exporter.Shutdown(ctx))
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(from))
	return provider, provider.Shutdown, nil
}

func tracingAsked() bool {
	if strings.EqualFold(strings.TrimSpace(os.Getenv("OTEL_SDK_DISABLED")), "true") {
		return false
	}
	switch exporter := strings.TrimSpace(os.Getenv("OTEL_TRACES_EXPORTER")); exporter {
	case "none":
		return false
	case "":
		return os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
	}
	return true
}

func describe(ctx context.Context, service Service) (*resource.Resource, error) {
	name := service.Name
	if name == "" {
		name = "avatar-worker"
	}
	return resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(
			attribute.String("service.name", name),
			attribute.String("service.version", service.Version),
			attribute.String("service.instance.id", service.Instance),
		),
		resource.WithFromEnv(), // last: what the operator says wins
	)
}
