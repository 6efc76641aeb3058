package admin

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"avatarworker/internal/errors"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ask(t *testing.T, o Options, method, path, accept string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, path, nil)
	r.Host = "127.0.0.1:8080"
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	w := httptest.NewRecorder()
	New(o).Handler().ServeHTTP(w, r)
	return w
}

func TestReadyzSaysWhyNot(t *testing.T) {
	no := func() error { return errors.New("draining: 3 sessions left") }
	for _, row := range []struct {
		name, path, accept string
		options            Options
		status             int
		kind, body         string
	}{
		{"ready", "/readyz", "", Options{Ready: func() error { return nil }}, 200, "text/plain", "ready\n"},
		{"not ready", "/readyz", "*/*", Options{Ready: no}, 503, "text/plain", "not ready: draining: 3 sessions left\n"},
		{"not ready, JSON", "/readyz", "application/json", Options{Ready: no}, 503, "application/json", `{"status":"not ready","reason":"draining: 3 sessions left"}` + "\n"},
		{"ready, JSON", "/readyz", "text/xml, application/json;q=0.9", Options{}, 200, "application/json", `{"status":"ready"}` + "\n"},
		{"several reasons", "/readyz", "", Options{Ready: func() error { return errors.Join(no(), errors.New("no lease")) }}, 503, "text/plain", "not ready: draining: 3 sessions left; no lease\n"},
		{"several reasons, JSON", "/readyz", "application/json", Options{Ready: func() error { return errors.Join(no(), errors.New("no lease")) }}, 503, "application/json", `{"status":"not ready","reason":"draining: 3 sessions left; no lease"}` + "\n"},
		{"ready, with a note", "/readyz", "", Options{Note: func() string { return "queue default is paused" }}, 200, "text/plain", "ready: queue default is paused\n"},
		{"ready, with a note, JSON", "/readyz", "application/json", Options{Note: func() string { return "paused" }}, 200, "application/json", `{"status":"ready","note":"paused"}` + "\n"},
		{"text first", "/readyz", "text/plain, application/json", Options{}, 200, "text/plain", "ready\n"},
		{"live although not ready", "/livez", "", Options{Ready: no}, 200, "text/plain", "live\n"},
		{"not live", "/livez", "", Options{Live: func() error { return errors.New("stuck") }}, 503, "text/plain", "not live: stuck\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := ask(t, row.options, http.MethodGet, row.path, row.accept)
			if w.Code != row.status || w.Body.String() != row.body || !strings.HasPrefix(w.Header().Get("Content-Type"), row.kind) {
				t.Errorf("got %d %s %q", w.Code, w.Header().Get("Content-Type"), w.Body)
			}
		})
	}
}

func TestReadinessIsAskedEachTime(t *testing.T) {
	var fault error
	h := New(Options{Ready: func() error { return fault }}).Handler()
	for _, want := range []int{200, 503, 200} {
		fault = nil
		if want == 503 {
			fault = errors.New("not connected to NATS")
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "http://127.0.0.1/readyz", nil))
		if w.Code != want {
			t.Errorf("got %d, want %d", w.Code, want)
		}
	}
}

func TestOnlyGetAndHeadAreServed(t *testing.T) {
	for _, path := range []string{"/livez", "/readyz", "/metrics", "/", "/debug/pprof/symbol"} {
		for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"} {
			w := ask(t, Options{PProf: true}, method, path, "")
			if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: %d", method, path, w.Code)
			}
		}
	}
	if w := ask(t, Options{}, http.MethodHead, "/livez", ""); w.Code != http.StatusOK {
		t.Errorf("HEAD: %d", w.Code)
	}
}

func TestEveryAnswerHasTheSecurityHeaders(t *testing.T) {
	for _, path := range []string{"/livez", "/nowhere", "/"} {
		h := ask(t, Options{}, http.MethodGet, path, "").Header()
		for _, name := range []string{
			"X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy",
			"Content-Security-Policy", "Cross-Origin-Resource-Policy", "Cache-Control",
		} {
			if h.Get(name) == "" {
				t.Errorf("%s: %s is missing", path, name)
			}
		}
	}
}

func TestProfilesAreBehindASwitch(t *testing.T) {
	for path, want := range map[string]int{
		"/debug/pprof/": 200, "/debug/pprof/heap": 200, "/debug/pprof/goroutine": 200, "/debug/pprof/symbol": 200,
		"/debug/pprof/cmdline": 404, // the command line may hold secrets
	} {
		if w := ask(t, Options{PProf: true}, http.MethodGet, path, ""); w.Code != want {
			t.Errorf("%s: %d, want %d", path, w.Code, want)
		}
		if w := ask(t, Options{}, http.MethodGet, path, ""); w.Code != http.StatusNotFound {
			t.Errorf("%s without the switch: %d", path, w.Code)
		}
	}
}

func TestMetricsAreServed(t *testing.T) {
	reg := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "some_total", Help: "Some."})
	reg.MustRegister(counter)
	counter.Add(3)
	w := ask(t, Options{Gatherer: reg}, http.MethodGet, "/metrics", "")
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "some_total 3") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func start(t *testing.T, o Options) (s *Server, url string) {
	t.Helper()
	o.Addr, o.Logger = "127.0.0.1:0", zerolog.Nop()
	s = New(o)
	addr, err := s.Start()
	if err != nil {
		t.Fatal(err)
	}
	return s, "http://" + addr.String()
}

func get(t *testing.T, client *http.Client, url string) (int, string) {
	t.Helper()
	answer, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := answer.Body.Close(); err != nil {
			t.Error(err)
		}
	}()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(body)
}

func TestServesUntilStopped(t *testing.T) {
	s, url := start(t, Options{})
	client := &http.Client{}
	defer client.CloseIdleConnections()
	if code, body := get(t, client, url+"/livez"); code != http.StatusOK || body != "live\n" {
		t.Errorf("got %d %q", code, body)
	}
	if _, err := s.Start(); err == nil {
		t.Error("it starts twice")
	}
	for range 2 {
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if answer, err := client.Get(url + "/livez"); err == nil {
		t.Errorf("it still answers: %s", answer.Status)
	}
}

func TestStopOfWhatNeverStartedReturns(t *testing.T) {
	if err := New(Options{}).Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestStopIsBounded(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	s, url := start(t, Options{Ready: func() error { close(entered); <-release; return nil }})
	client := &http.Client{}
	defer client.CloseIdleConnections()
	cut := make(chan error, 1)
	go func() {
		answer, err := client.Get(url + "/readyz")
		if err == nil {
			err = answer.Body.Close()
		}
		cut <- err
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop gave %v", err)
	}
	if err := <-cut; err == nil {
		t.Error("the request that would not end was not cut off")
	}
	close(release)
}

func TestAddressInUseIsNamed(t *testing.T) {
	s, url := start(t, Options{})
	defer func() {
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	addr := strings.TrimPrefix(url, "http://")
	if _, err := New(Options{Addr: addr}).Start(); err == nil || !strings.Contains(err.Error(), "admin.addr: can't listen at "+addr) {
		t.Errorf("got %v", err)
	}
}

func TestListensOnLoopbackByDefault(t *testing.T) {
	if addr := New(Options{}).options.Addr; addr != "127.0.0.1:8080" {
		t.Errorf("got %s", addr)
	}
}

func TestReasonsAreValidJSONWhateverTheyHold(t *testing.T) {
	reason := "quote \" newline \n <tag>"
	w := ask(t, Options{Ready: func() error { return errors.New(reason) }}, http.MethodGet, "/readyz", "application/json")
	var got struct{ Reason string }
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || got.Reason != "quote \" newline ;  <tag>" {
		t.Errorf("got %q, %v", got.Reason, err)
	}
}
