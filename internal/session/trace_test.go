package session

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"avatarworker/internal/errors"
)

func TestSpansCoverASessionAndReachTheBackend(t *testing.T) {
	const job = "0af7651916cd43dd8448eb211c80319c"
	var sent string
	b := &backend{session: func(p *peer) {
		p.confirm()
		id, _, all := p.speech()
		sent = all[0].GetClientAudioInput().GetTraceContext().GetTraceparent()
		p.sendRaw(frame(p.t, id, true, "x"))
	}}
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	inMemory(t, b, Options{Tracer: provider.Tracer("")}, func(c *Client) {
		p := params()
		p.TraceParent, p.TraceState = "00-"+job+"-b7ad6b7169203331-01", "k=v"
		s := mustOpen(t, c, p)
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(2, 0)}); err != nil {
			t.Fatal(err)
		}
	})
	var names []string
	for _, s := range spans.Ended() {
		names = append(names, s.Name())
		if s.SpanContext().TraceID().String() != job {
			t.Errorf("span %s is in trace %s, not in the job's", s.Name(), s.SpanContext().TraceID())
		}
		if s.Name() == spanUtterance && sent != "00-"+job+"-"+s.SpanContext().SpanID().String()+"-01" {
			t.Errorf("the backend got trace context %q", sent)
		}
	}
	if got := strings.Join(names, ","); got != "session token,websocket connect,websocket handshake,utterance" {
		t.Errorf("spans %s", got)
	}
}

func TestFailedSpanSaysWhyWithoutSecrets(t *testing.T) {
	b := &backend{token: answer(403, "the-api-key is wrong")}
	spans := tracetest.NewSpanRecorder()
	inMemory(t, b, Options{Tracer: sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("")}, func(c *Client) {
		_, err := c.Open(context.Background(), params())
		wantError(t, err, errors.CodeInvalidRequest, errors.PhaseToken)
	})
	status := spans.Ended()[0].Status()
	if status.Description == "" || strings.Contains(status.Description, "the-api-key") {
		t.Errorf("status %+v", status)
	}
}

// TestTLSSessionsAndConnectionsAreReused looks at what the server sees.
func TestTLSSessionsAndConnectionsAreReused(t *testing.T) {
	resumed := 0
	b := &backend{upgrade: func(_ http.ResponseWriter, r *http.Request) bool {
		if r.TLS.DidResume {
			resumed++
		}
		return false
	}}
	b.reset(t)
	srv := httptest.NewTLSServer(b)
	defer srv.Close()
	hc := NewHTTPClient()
	tr := hc.Transport.(*http.Transport)
	tr.TLSClientConfig.RootCAs = srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	defer tr.CloseIdleConnections()
	c := New(Options{HTTPClient: hc, Endpoints: Endpoints{ConsoleURL: srv.URL + "/v1/console", IngressURL: srv.URL + "/v2/driveningress"}})
	defer c.Close()
	for range 3 {
		s := mustOpen(t, c, params())
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	wantClosed1000(t, b, 3)
	if resumed < 2 {
		t.Errorf("%d of 3 upgrades resumed a TLS session", resumed)
	}
}
