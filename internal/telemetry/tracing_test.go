package telemetry

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quiet takes away what the environment of the test run may ask for.
func quiet(t *testing.T) {
	t.Helper()
	for _, name := range []string{
		"OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
		"OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES",
	} {
		t.Setenv(name, "")
	}
}

func TestTracingIsOffUnlessAskedFor(t *testing.T) {
	for _, row := range []struct {
		name string
		env  map[string]string
		on   bool
	}{
		{"nothing", nil, false},
		{"none", map[string]string{"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, false},
		{"disabled", map[string]string{"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "otlp"}, false},
		{"exporter", map[string]string{"OTEL_TRACES_EXPORTER": "otlp"}, true},
		{"endpoint", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, true},
		{"traces endpoint", map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			quiet(t)
			for name, value := range row.env {
				t.Setenv(name, value)
			}
			provider, stop, err := NewTracing(t.Context(), Service{})
			if err != nil {
				t.Fatal(err)
			}
			_, span := provider.Tracer("t").Start(t.Context(), "s")
			if span.IsRecording() != row.on {
				t.Errorf("recording: %v", span.IsRecording())
			}
			if err := stop(t.Context()); err != nil { // the span has not ended: nothing to send
				t.Error(err)
			}
		})
	}
}

func TestBadTracingVariableIsAnErrorAndTracingIsOff(t *testing.T) {
	for name, value := range map[string]string{
		"OTEL_TRACES_EXPORTER": "carrier-pigeon", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke", "OTEL_RESOURCE_ATTRIBUTES": "nonsense",
	} {
		quiet(t)
		t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
		t.Setenv(name, value)
		provider, stop, err := NewTracing(t.Context(), Service{})
		if err == nil || !strings.Contains(err.Error(), "OTEL_") {
			t.Errorf("%s=%s gives %v", name, value, err)
		}
		if _, span := provider.Tracer("t").Start(t.Context(), "s"); span.IsRecording() {
			t.Errorf("%s=%s: spans are recorded", name, value)
		}
		if err := stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestSpansAreSentOnShutdown(t *testing.T) {
	quiet(t)
	got := make(chan string, 1)
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.URL.Path }))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	provider, stop, err := NewTracing(t.Context(), Service{Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	_, span := provider.Tracer("t").Start(t.Context(), "s")
	span.End()
	if err := stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if path := <-got; path != "/v1/traces" {
		t.Errorf("sent to %s", path)
	}
}

func TestResourceSaysWhoseSpansTheyAreAndTheOperatorWins(t *testing.T) {
	quiet(t)
	t.Setenv("OTEL_SERVICE_NAME", "my-fleet")
	exporter := tracetest.NewInMemoryExporter()
	provider, stop, err := NewTracing(t.Context(), Service{Version: "v1", Instance: "w.1", Exporter: exporter})
	if err != nil {
		t.Fatal(err)
	}
	ctx := withParent(t.Context(), parent, state)
	_, span := provider.Tracer("t").Start(ctx, "s")
	span.End()
	flusher, ok := provider.(interface{ ForceFlush(context.Context) error })
	if !ok {
		t.Fatal("the provider can't be flushed")
	}
	if err := flusher.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	spans := exporter.GetSpans()
	if err := stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(spans) != 1 || spans[0].Parent.SpanID().String() != "00f067aa0ba902b7" {
		t.Fatalf("got %+v", spans)
	}
	attributes := spans[0].Resource.String()
	for _, want := range []string{"service.name=my-fleet", "service.version=v1", "service.instance.id=w.1"} {
		if !strings.Contains(attributes, want) {
			t.Errorf("%s is not in %s", want, attributes)
		}
	}
}

func TestTraceContextPassesThroughWhenTracingIsOff(t *testing.T) {
	quiet(t)
	provider, _, err := NewTracing(t.Context(), Service{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, span := provider.Tracer("t").Start(withParent(t.Context(), parent, state), "s")
	defer span.End()
	passed := propagation.MapCarrier{}
	if (propagation.TraceContext{}).Inject(ctx, passed); passed["traceparent"] != parent || passed["tracestate"] != state {
		t.Errorf("got %q", passed)
	}
}
