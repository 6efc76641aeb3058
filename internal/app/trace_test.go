package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"avatarworker/internal/jobs/lifecycle"
)

// spanExporter keeps the spans that it gets.
type spanExporter struct {
	mu    sync.Mutex
	spans []sdktrace.ReadOnlySpan
}

func (k *spanExporter) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.spans = append(k.spans, spans...)
	return nil
}

func (k *spanExporter) Shutdown(context.Context) error { return nil }

// byStart are the spans in the order in which they began.
func (k *spanExporter) byStart() []sdktrace.ReadOnlySpan {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.SortedStableFunc(slices.Values(k.spans), func(a, b sdktrace.ReadOnlySpan) int {
		return a.StartTime().Compare(b.StartTime())
	})
}

const (
	traceID     = "0af7651916cd43dd8448eb211c80319c"
	parentID    = "b7ad6b7169203331"
	traceParent = "00-" + traceID + "-" + parentID + "-01"
)

func TestOneTraceGoesFromTheJobThroughItsAttemptsToTheBackendTheEventsAndTheLog(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	spans, log := &spanExporter{}, &buffer{}
	w := f.worker(worker{spans: spans, log: log})
	body, err := json.Marshal(fields{"id": "traced", "avatar_id": "flaky-connectionClosed-1", "utterances": []any{speech(), speech()}})
	if err != nil {
		t.Fatal(err)
	}
	f.publishRaw(&nats.Msg{Subject: f.names.Jobs("default"), Data: body, Header: nats.Header{"traceparent": {traceParent}}})
	f.completed("traced")
	w.stop()

	var names []string
	var process []sdktrace.ReadOnlySpan
	utterances := map[string]bool{} // traceparents of their spans
	for _, s := range spans.byStart() {
		names = append(names, s.Name())
		if s.SpanContext().TraceID().String() != traceID {
			t.Errorf("%s is of trace %s", s.Name(), s.SpanContext().TraceID())
		}
		switch s.Name() {
		case "process default":
			process = append(process, s)
			if s.Parent().SpanID().String() != parentID {
				t.Errorf("process is a child of %s", s.Parent().SpanID())
			}
		default:
			if s.Parent().SpanID() != process[len(process)-1].SpanContext().SpanID() {
				t.Errorf("%s is not a child of its process span", s.Name())
			}
		}
		if s.Name() == "utterance" {
			utterances["00-"+traceID+"-"+s.SpanContext().SpanID().String()+"-01"] = true
		}
	}
	want := []string{
		"process default", "session token", "websocket connect", "websocket handshake", "utterance", "settle",
		"process default", "session token", "websocket connect", "websocket handshake", "utterance", "utterance", "settle",
	}
	if !slices.Equal(names, want) {
		t.Fatalf("spans %q, want %q", names, want)
	}
	if s := process[0].Status(); s.Code != codes.Error || !strings.Contains(s.Description, "connectionClosed") {
		t.Errorf("the failed attempt's span: %+v", s)
	}
	if s := process[1].Status(); s.Code == codes.Error {
		t.Errorf("the good attempt's span: %+v", s)
	}
	received := 0
	for _, s := range f.sessions("flaky-connectionClosed-1") {
		for _, parent := range s.TraceParents {
			received++
			if !utterances[parent] {
				t.Errorf("the backend was given %s, which is not an utterance's span", parent)
			}
		}
	}
	if received != 3 {
		t.Errorf("the backend was given %d traces for 3 utterances", received)
	}
	f.checkTraceOfEvents("traced", process)
	f.checkTraceOfLog(log.String(), process)
}

func (f *fleet) checkTraceOfEvents(id string, process []sdktrace.ReadOnlySpan) {
	f.t.Helper()
	of := func(i int) string { return "00-" + traceID + "-" + process[i].SpanContext().SpanID().String() + "-01" }
	events := 0
	for _, msg := range f.event(id, "completed") {
		events++
		if got := msg.Headers().Get("traceparent"); got != of(0) && got != of(1) {
			f.t.Errorf("%s has traceparent %q", msg.Subject(), got)
		}
	}
	if events != 4 { // started, retrying, started, completed
		f.t.Errorf("%d events", events)
	}
	for _, msg := range f.all(f.names.EventsStream(), f.names.AllErrors()) {
		if got := msg.Headers().Get("traceparent"); got != of(0) {
			f.t.Errorf("the error event has traceparent %q, want %q", got, of(0))
		}
	}
}

func (f *fleet) checkTraceOfLog(log string, process []sdktrace.ReadOnlySpan) {
	f.t.Helper()
	e := f.errorEvents("traced")[0]
	for _, line := range bytes.Split([]byte(log), []byte("\n")) {
		var l struct {
			Message, Code, Phase string
			ConnectionID         string `json:"connection_id"`
			ReqID                string `json:"req_id"`
			TraceID              string `json:"trace_id"`
			SpanID               string `json:"span_id"`
			JobID                string `json:"job_id"`
			Attempt              int
		}
		if err := json.Unmarshal(line, &l); err != nil || l.Message != "attempt failed" {
			continue
		}
		if l.TraceID != traceID || l.SpanID != process[0].SpanContext().SpanID().String() {
			f.t.Errorf("log line: %s", line)
		}
		if l.JobID != e.JobID || l.ConnectionID != e.ConnectionID || l.ReqID != e.ReqID || l.Code != string(e.Code) || l.Phase != string(e.Phase) || l.Attempt != e.Attempt || l.ReqID == "" {
			f.t.Errorf("log line %s differs from the error event %+v", line, e)
		}
		return
	}
	f.t.Errorf("no line says that the attempt failed:\n%s", log)
}

func TestATraceGoesOnAlsoWithoutACollectorOfSpans(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	body, err := json.Marshal(fields{"id": "plain", "avatar_id": "ok", "audio": speech()})
	if err != nil {
		t.Fatal(err)
	}
	f.publishRaw(&nats.Msg{Subject: f.names.Jobs("default"), Data: body, Header: nats.Header{"traceparent": {traceParent}}})
	f.completed("plain")
	for _, msg := range f.event("plain", "completed") {
		if got := msg.Headers().Get("traceparent"); got != traceParent {
			t.Errorf("%s has traceparent %q", msg.Subject(), got)
		}
	}
	if s := f.sessions("ok"); len(s) != 1 || !slices.Equal(s[0].TraceParents, []string{traceParent}) {
		t.Errorf("%+v", s)
	}
	if r := f.record("plain"); r.State != lifecycle.StateCompleted {
		t.Errorf("%+v", r)
	}
}
