package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/operate"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestJobsAreChosenAsTheCommandDoes(t *testing.T) {
	h := serve(t, false)
	w := h.ask(http.MethodGet, "/jobs?state=held,waiting&queue=a&queue=b&app=x&avatar=v&label=k=v=1&label=n=&code=serverError&older=1h&newer=2026-02-01T00:00:00Z&sort=cost&limit=7", "")
	if w.Code != 200 || len(h.reader.queries) != 1 {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	want := status.Query{Filter: status.Filter{
		States: []lifecycle.State{lifecycle.StateHeld, status.StateWaiting}, Queues: []string{"a", "b"}, Apps: []string{"x"}, Avatars: []string{"v"},
		Labels: map[string]string{"k": "v=1", "n": ""}, Codes: []errors.Code{errors.CodeServerError}, Before: at.Add(-time.Hour), After: time.Date(2026, 2, 1, 0, 0, 0, 0, time.UTC),
	}, Order: status.ByCost, Limit: 7, DefaultApp: "a1"}
	got, err := json.Marshal(h.reader.queries[0])
	if err != nil {
		t.Fatal(err)
	}
	if wanted, _ := json.Marshal(want); string(got) != string(wanted) {
		t.Errorf("got %s\nwant %s", got, wanted)
	}
}

func TestChangesReachTheOperatorOnce(t *testing.T) {
	h := serve(t, true)
	refreshed := 0
	h.o.Refresh = func(context.Context) error { refreshed++; return nil }
	for _, c := range []struct {
		path, body string
		code       int
		answer     string
	}{
		{"/jobs/j1/cancel", "", 200, `"status":"cancelled"`},
		{"/jobs/done/cancel", "{}", 409, `"outcome":"completed"`},
		{"/jobs/none/cancel", `{"if_unknown":false}`, 404, `"status":"unknown"`},
		{"/jobs/j1/retry", `{"probe":true}`, 200, `"status":"delivered"`},
		{"/jobs/j2/retry", "", 409, `"status":"held"`},
		{"/queues/default/pause", `{"for":"30m"}`, 200, `"status":"paused"`},
		{"/queues/default/pause", "", 200, `"status":"paused"`},
		{"/queues/none/pause", "", 404, "no worker has served this queue"},
		{"/queues/default/resume", "", 200, `"status":"resumed"`},
		{"/queues/vip/resume", "", 200, `"status":"not_paused"`},
		{"/workers/w-1/drain", "", 200, `"running":2`},
		{"/workers/w-2/drain", "", 404, "no worker"},
		{"/circuits/probe", `{"app_id":"a1"}`, 200, `"job_id":"j1"`},
		{"/circuits/close", `{"app_id":"a1","region":"us-west"}`, 200, `"status":"closed"`},
		{"/circuits/close", `{"app_id":"a1","region":"eu"}`, 404, "app a1: no circuit"},
	} {
		if w := h.ask(http.MethodPost, c.path, c.body); w.Code != c.code || !strings.Contains(w.Body.String(), c.answer) {
			t.Errorf("%s %s: %d %s", c.path, c.body, w.Code, w.Body)
		}
	}
	want := []string{
		"cancel j1 false", "cancel done false", "cancel none false", "retry j1 true", "retry j2 false", "pause default 30m0s", "pause default " + operate.Forever.String(), "pause none " + operate.Forever.String(),
		"resume default", "resume vip", "drain w-1", "drain w-2", "probe a1 us-west", "close a1 us-west",
	}
	if !slices.Equal(h.operator.calls, want) || refreshed != 12 {
		t.Errorf("got %q, refreshed %d times", h.operator.calls, refreshed)
	}
}

func TestWhatIsWrongChangesNothing(t *testing.T) {
	h, readOnly := serve(t, true), serve(t, false)
	for _, c := range []struct{ path, body string }{
		{"/jobs/a.b/cancel", ""}, {"/jobs/j1/cancel", `{"if_unknown":"yes"}`}, {"/jobs/j1/cancel", `[]`}, {"/jobs/j1/cancel", `{} {}`}, {"/jobs/j1/retry?probe=true", ``},
		{"/queues/default/pause", `{"for":"soon"}`}, {"/queues/default/pause", `{"for":"-1m"}`}, {"/queues/a.b/pause", ``}, {"/dead-letters/0/replay", ``}, {"/dead-letters/17/replay", `{"set":["x"]}`},
		{"/dead-letters/17/replay", `{"set":["avatar_id=v"],"body":{"avatar_id":"v"}}`}, {"/dead-letters/17/replay", `{"body":{"avatar":"v"}}`}, {"/circuits/probe", `{}`}, {"/dead-letters/-1/remove", ``},
	} {
		if w := h.ask(http.MethodPost, c.path, c.body); w.Code != 400 {
			t.Errorf("%s %s: %d %s", c.path, c.body, w.Code, w.Body)
		}
	}
	for _, op := range operations() {
		if op.method != http.MethodPost {
			continue
		}
		r := httptest.NewRequestWithContext(t.Context(), op.method, Prefix+op.at, strings.NewReader("probe=true"))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded") // as a form of another site
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != http.StatusUnsupportedMediaType {
			t.Errorf("a form to %s: %d", op.path, w.Code)
		}
		if w := readOnly.ask(op.method, op.at, op.example); w.Code != http.StatusForbidden {
			t.Errorf("%s without write: %d", op.path, w.Code)
		}
		if w := h.ask(http.MethodGet, op.at, ""); w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != http.MethodPost {
			t.Errorf("GET %s: %d, Allow %q", op.path, w.Code, w.Header().Get("Allow"))
		}
	}
	if len(h.operator.calls)+len(h.letters.replayed)+len(readOnly.operator.calls)+len(readOnly.letters.replayed) != 0 {
		t.Errorf("%q, %d replays", h.operator.calls, len(h.letters.replayed))
	}
}

// A refused body says what was wrong in words of the API, not of its source.
func TestABodyThatIsRefusedSaysWhatWasWrong(t *testing.T) {
	h := serve(t, true)
	for _, tc := range []struct {
		body string
		code int
		want string
	}{
		{`[]`, 400, "the body is a JSON array: want an object"},
		{`"x"`, 400, "the body is a JSON string: want an object"},
		{`{"set":{"avatar_id":"x"}}`, 400, "set is a JSON object"},
		{`{"dry_run":"yes"}`, 400, "dry_run is a JSON string"},
		{`{"dry":true}`, 400, "unknown field"},
		{`{"set":["` + strings.Repeat("a", 64) + `"]}`, 413, "the body is larger than 64 bytes"},
	} {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, Prefix+"/dead-letters/17/replay", strings.NewReader(tc.body))
		r.Header.Set("Content-Type", "application/json")
		r.Body = http.MaxBytesReader(w, r.Body, 64)
		h.ServeHTTP(w, r)
		if text := w.Body.String(); w.Code != tc.code || !strings.Contains(text, tc.want) || strings.Contains(text, "Go ") || strings.Contains(text, "api.re") {
			t.Errorf("%.40s: %d %s; want %d %s", tc.body, w.Code, text, tc.code, tc.want)
		}
	}
}

// The whole way over NATS: a letter is found, corrected and replayed, and the model has
// it with the next answer.
func TestALetterIsCorrectedAndReplayed(t *testing.T) {
	js := natstest.JetStream(t)
	names := topology.Names{}
	if _, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings()); err != nil {
		t.Fatal(err)
	}
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: names.DLQ("config", "avatarNotFound"), Header: nats.Header{
		"Avatar-Job-Id": {"j"}, "Avatar-Run": {"1"}, "Avatar-Subject": {names.Jobs("default")}, "Avatar-Queue": {"default"},
	}, Data: []byte(`{"avatar_id":"gone","audio":{"url":"https://h/a.wav"}}`)}); err != nil {
		t.Fatal(err)
	}
	model := status.NewModel(status.NewStore(js, names, nil, 0), time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); model.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	h, err := New(Options{
		Reader: model, Letters: dlq.NewStore(js, names, nil), Write: true, Refresh: model.Refresh, Log: zerolog.Nop(),
		Recordings: func(ctx context.Context) ([]output.Stored, error) { return output.ListRecordings(ctx, js, names) },
		Changes:    func(ctx context.Context) (Changes, error) { return operate.Open(ctx, js.Conn(), js, names) },
	})
	if err != nil {
		t.Fatal(err)
	}
	s := served{Handler: h}
	expect := func(method, path, body string, code int, want string) {
		t.Helper()
		if w := s.ask(method, path, body); w.Code != code || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s %s: %d %s; want %d %s", method, path, w.Code, w.Body, code, want)
		}
	}
	expect("GET", "/dead-letters?code=avatarNotFound", "", 200, `"seq":1`)
	expect("POST", "/dead-letters/1/replay", `{"set":["avatar_id=5","nothing=1"]}`, 400, "nothing")
	expect("POST", "/dead-letters/1/replay", `{"set":["avatar_id=ok"],"dry_run":true}`, 200, "would_replay")
	expect("POST", "/dead-letters/1/replay", `{"set":["avatar_id=ok"]}`, 200, `"status":"replayed"`)
	expect("POST", "/dead-letters/1/replay", ``, 404, "dead letter 1: not found")
	expect("GET", "/jobs?state=waiting", "", 200, `"id":"j","run":2,"state":"waiting","queue":"default","app_id":"","avatar_id":"ok"`)
	expect("POST", "/queues/default/pause", `{"for":"1h"}`, 200, "paused")
	expect("GET", "/overview", "", 200, `"paused_until"`)
	expect("POST", "/jobs/j/cancel", ``, 200, "requested")
	expect("POST", "/jobs/none/cancel", ``, 404, "unknown")
	expect("GET", "/recordings", "", 200, `"recordings":[]`)
	expect("GET", "/jobs/none", "", 404, "unknown job")
}

func FuzzQueries(f *testing.F) {
	for _, query := range []string{"state=held&limit=5", "label=a=b&label=a=c", "older=1h&newer=x", "%zz", "sort=cost&sort=age", "before=2026-01-01T00:00:00Z&newest=true", "code=a,b,,c&class=d", "limit=99999999999999999999", ";", "a=%00"} {
		f.Add(query)
	}
	h := serve(f, false)
	f.Fuzz(func(t *testing.T, query string) {
		for _, r := range h.routes() {
			if r.method != http.MethodGet {
				continue
			}
			req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, Prefix+"/x", nil)
			req.URL = &url.URL{Path: Prefix + strings.NewReplacer("{id}", "j1", "{seq}", "17").Replace(r.path), RawQuery: query}
			answersWithJSON(t, h, req, false)
		}
		h.reader.queries = nil
	})
}

func FuzzPathsAndBodies(f *testing.F) {
	for _, seed := range [][2]string{{"j1", `{"probe":true}`}, {"17", `{"set":["avatar_id=1","labels.a=b"],"dry_run":true}`}, {"17", `{"body":{"avatar_id":"v","audio":{"inline":"AA=="}}}`}, {"w-1", `{"for":"1h"}`}, {"%2e%2e", `{"app_id":"a1","region":null}`}, {"default", "\xff"}, {"-1", `[[[[`}} {
		f.Add(seed[0], []byte(seed[1]))
	}
	h := serve(f, true)
	f.Fuzz(func(t *testing.T, name string, body []byte) {
		for _, r := range h.routes() {
			req := httptest.NewRequestWithContext(t.Context(), r.method, Prefix+"/x", strings.NewReader(string(body)))
			req.Header.Set("Content-Type", "application/json")
			req.URL = &url.URL{Path: Prefix + inPath.ReplaceAllLiteralString(r.path, name)}
			answersWithJSON(t, h, req, true)
		}
		h.operator.calls, h.letters.replayed = nil, nil
	})
}

// answersWithJSON checks that a request is answered, or refused, in JSON, whatever it is.
func answersWithJSON(t *testing.T, h served, r *http.Request, anyPath bool) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if anyPath && w.Code >= 300 && w.Code < 400 {
		return // to the path without dots
	}
	if w.Code >= 500 || !json.Valid(w.Body.Bytes()) || strings.Contains(w.Body.String(), secret) {
		t.Fatalf("%s %s: %d %s", r.Method, r.URL, w.Code, w.Body)
	}
	if w.Code >= 400 && !strings.Contains(w.Body.String(), `"error":"`) && !strings.Contains(w.Body.String(), `"status":"`) {
		t.Fatalf("%s %s: %d without a reason: %s", r.Method, r.URL, w.Code, w.Body)
	}
}
