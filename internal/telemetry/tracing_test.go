package telemetry

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
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
	ctx := WithParent(t.Context(), parent, state)
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
	ctx, span := provider.Tracer("t").Start(WithParent(t.Context(), parent, state), "s")
	defer span.End()
	if p, s := ParentOf(ctx); p != parent || s != state {
		t.Errorf("got %q %q", p, s)
	}
}

func TestTraceContextInNATSHeadersIsLowerCase(t *testing.T) {
	header := nats.Header{"Traceparent": {"old"}, "Other": {"x"}}
	Inject(WithParent(t.Context(), parent, state), header)
	if len(header) != 3 || header[TraceParent][0] != parent || header[TraceState][0] != state {
		t.Errorf("got %v", header)
	}
	for _, name := range []string{"traceparent", "Traceparent", "TRACEPARENT"} {
		sc := trace.SpanContextFromContext(Extract(t.Context(), nats.Header{name: {parent}}))
		if !sc.IsRemote() || sc.SpanID().String() != "00f067aa0ba902b7" {
			t.Errorf("%s: got %v", name, sc)
		}
	}
	empty := nats.Header{}
	if Inject(t.Context(), empty); len(empty) != 0 {
		t.Errorf("no span, but headers %v", empty)
	}
}

func TestMalformedTraceParentIsIgnored(t *testing.T) {
	for _, bad := range []string{
		"", "x", "00-0-0-0", strings.ToUpper(parent), parent + "-more", "ff" + parent[2:],
		"00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
	} {
		ctx := WithParent(t.Context(), bad, state)
		if p, s := ParentOf(ctx); p != "" || s != "" {
			t.Errorf("%q gives %q %q", bad, p, s)
		}
		if _, ok := LinkTo(ctx); ok {
			t.Errorf("%q gives a link", bad)
		}
	}
	if link, ok := LinkTo(WithParent(t.Context(), parent, "")); !ok || !link.SpanContext.IsRemote() {
		t.Error("a good parent gives no link")
	}
}

func FuzzWithParent(f *testing.F) {
	f.Add(parent, state)
	f.Add("00--", "a=b,")
	f.Fuzz(func(t *testing.T, p, s string) {
		out, _ := ParentOf(WithParent(t.Context(), p, s))
		if out == "" {
			return
		}
		if again, _ := ParentOf(WithParent(t.Context(), out, "")); again != out {
			t.Errorf("%q became %q, then %q", p, out, again)
		}
	})
}
