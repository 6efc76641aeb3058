package operate_test

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

var (
	metricName = regexp.MustCompile(`\bavatar_worker_[a-z_]+`)
	scrapeURL  = regexp.MustCompile(`http://[^ ]+/metrics`)
	sampleName = regexp.MustCompile(`(?m)^[a-z_]+`)
)

func TestEveryMetricOfRulesAndDashboardIsInAScrapeOfTheDemo(t *testing.T) {
	t.Parallel()
	p := spawn(t, nil, "demo", "--stay")
	p.stderr.await(t, "address of the metrics", scrapeURL.MatchString)
	found := make(map[string]bool)
	for _, name := range sampleName.FindAllString(get(t, scrapeURL.FindString(p.stderr.String())), -1) {
		found[name] = true
	}
	for _, file := range []string{"../../deploy/prometheus/rules.yaml", "../../deploy/grafana/avatarworker.json"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		names := metricName.FindAllString(string(text), -1)
		slices.Sort(names)
		if names = slices.Compact(names); len(names) < 5 {
			t.Fatalf("%s names %v only: is it still read right?", file, names)
		}
		for _, name := range names {
			if !found[name] {
				t.Errorf("%s: %s is not in the scrape", file, name)
			}
		}
	}
	p.signal(syscall.SIGINT)
	if code := p.wait(); code != 0 {
		t.Errorf("demo --stay: exit %d\n%s", code, p.stderr)
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() // it was read to its end
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v", url, resp.Status, err)
	}
	return string(body)
}

// span is what the console exporter prints of one.
type span struct {
	Name        string
	SpanContext struct{ TraceID, SpanID string }
	Parent      struct{ TraceID, SpanID string }
	StartTime   time.Time
}

func TestTraceOfAJobHasItsParentAndItsIDsAreInLogsAndEvents(t *testing.T) {
	t.Parallel()
	const (
		trace  = "4bf92f3577b34da6a3ce929d0e0e4736"
		parent = "00f067aa0ba902b7"
	)
	s := newSite(t, 0)
	s.env = append(s.env, "OTEL_TRACES_EXPORTER=console")
	p := s.run()
	s.connect()
	msg := nats.NewMsg(s.names.Jobs("default"))
	msg.Header.Set("traceparent", "00-"+trace+"-"+parent+"-01")
	msg.Data = []byte(`{"id":"traced","avatar_id":"flaky-serverError-1","audio":{"inline":"` + strings.Repeat("AAAA", 800) +
		`","format":"pcm_s16le","sample_rate":16000},"output":{"discard":{}}}`)
	if _, err := s.js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
	s.awaitEvents(s.names.Events("completed", "traced"), 1)
	errorEvents := s.follow(s.names.EventsStream(), s.names.AllErrors())
	failed, err := errorEvents.Next()
	if err != nil {
		t.Fatal(err)
	}
	if tp := failed.Headers().Get("traceparent"); !strings.HasPrefix(tp, "00-"+trace+"-") {
		t.Errorf("the error event's traceparent is %q", tp)
	}
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Fatalf("exit %d", code)
	}
	checkSpans(t, spans(t, p.out.String()), trace, parent)
	logged := 0
	for _, line := range lines(p.stderr.String()) {
		if line["job_id"] == "traced" && line["trace_id"] == trace && line["span_id"] != "" {
			logged++
		}
	}
	if logged < 2 {
		t.Errorf("%d log lines have the trace's id, want one for each attempt\n%s", logged, p.stderr)
	}
	for _, session := range s.backend.SessionLog() {
		if !slices.ContainsFunc(session.TraceParents, func(tp string) bool { return strings.Contains(tp, trace) }) {
			t.Errorf("the backend got trace parents %v", session.TraceParents)
		}
	}
}

// checkSpans: two attempts, each a child of the publisher's span, with the
// steps of its session in order under it.
func checkSpans(t *testing.T, all []span, trace, parent string) {
	t.Helper()
	steps := make(map[string][]string)
	var attempts []string
	for _, sp := range all {
		if sp.SpanContext.TraceID != trace {
			t.Errorf("%s is of trace %s", sp.Name, sp.SpanContext.TraceID)
		}
		if strings.HasPrefix(sp.Name, "process") {
			attempts = append(attempts, sp.SpanContext.SpanID)
			if sp.Parent.SpanID != parent {
				t.Errorf("%s has parent %s, want the publisher's", sp.Name, sp.Parent.SpanID)
			}
			continue
		}
		steps[sp.Parent.SpanID] = append(steps[sp.Parent.SpanID], sp.Name)
	}
	if len(attempts) != 2 {
		t.Fatalf("%d attempts have a span, want 2: %+v", len(attempts), all)
	}
	want := "session token, websocket connect, websocket handshake, utterance, settle"
	if got := strings.Join(steps[attempts[1]], ", "); got != want {
		t.Errorf("the spans of the good attempt are\n%s, want\n%s", got, want)
	}
	if got := steps[attempts[0]]; len(got) < 2 || got[len(got)-1] != "settle" {
		t.Errorf("the spans of the failed attempt are %v", got)
	}
}

// spans are in the order in which they began.
func spans(t *testing.T, text string) []span {
	t.Helper()
	var all []span
	d := json.NewDecoder(strings.NewReader(text))
	for d.More() {
		var sp span
		if err := d.Decode(&sp); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		all = append(all, sp)
	}
	slices.SortStableFunc(all, func(a, b span) int { return a.StartTime.Compare(b.StartTime) })
	return all
}
