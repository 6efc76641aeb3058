package ui_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/status"
	"avatarworker/internal/ui"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is what the pages read and change in these tests. Its zero value has
// nothing in it.
type world struct {
	mu      sync.Mutex
	fleet   status.Fleet
	rows    []status.Row
	jobs    map[string]*status.Job
	letters []dlq.Letter
	alerts  []status.Event
	limits  []ui.Limit
	spend   *ui.Spend
	counts  []ui.CodeCount
	fresh   ui.Freshness
	err     error // of everything that is read
	changed chan struct{}
	calls   []string // of what was changed
	asked   []status.Query
}

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func (w *world) Fleet(context.Context) (*status.Fleet, error) { return &w.fleet, w.err }

func (w *world) Jobs(_ context.Context, q status.Query) (status.List, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, q)
	list := status.List{Waiting: status.Search{All: true}}
	for _, r := range w.rows {
		if len(q.States) == 0 || slices.Contains(q.States, r.State) {
			list.Rows = append(list.Rows, r)
		}
	}
	if q.By != "" {
		for _, r := range list.Rows {
			key := r.Labels[q.By.Label()]
			if q.By == status.ByCode {
				key = string(r.Code)
			}
			list.Groups = append(list.Groups, status.Group{Key: key, Jobs: 1, States: map[lifecycle.State]int{r.State: 1}})
		}
		list.Rows = nil
	}
	if q.Limit > 0 && len(list.Rows) > q.Limit {
		list.Rows, list.More = list.Rows[:q.Limit], true
	}
	return list, w.err
}

func (w *world) Job(_ context.Context, id string) (*status.Job, error) {
	if j := w.jobs[id]; j != nil {
		return j, w.err
	}
	return nil, fmt.Errorf("%w %s: it has no record", status.ErrNoJob, id)
}

func (w *world) Letters(_ context.Context, f dlq.Filter, limit int) ([]dlq.Entry, bool, error) {
	var list []dlq.Entry
	for _, l := range w.letters {
		if (len(f.Codes) == 0 || slices.Contains(f.Codes, l.Code)) && (len(f.Jobs) == 0 || slices.Contains(f.Jobs, l.JobID)) {
			list = append(list, l.Entry)
		}
	}
	if len(list) > limit {
		return list[:limit], true, w.err
	}
	return list, false, w.err
}

func (w *world) Letter(_ context.Context, seq uint64) (dlq.Letter, error) {
	for _, l := range w.letters {
		if l.Seq == seq {
			return l, w.err
		}
	}
	return dlq.Letter{}, fmt.Errorf("dead letter %d: %w", seq, dlq.ErrNoLetter)
}

func (w *world) Alerts(_ context.Context, limit int) ([]status.Event, bool, error) {
	return w.alerts[:min(limit, len(w.alerts))], len(w.alerts) > limit, w.err
}

func (w *world) Limits(context.Context) ([]ui.Limit, error) { return w.limits, w.err }

func (w *world) Recordings(context.Context, int) ([]ui.Recording, bool, error) {
	if len(w.rows) == 0 {
		return nil, false, w.err
	}
	return []ui.Recording{{Name: "rec <b>", JobID: "j1", Bytes: 2048, StoredAt: now}}, false, w.err
}

func (w *world) Failures(time.Time, time.Time, int) ui.Failures {
	return ui.Failures{Codes: w.counts, Complete: true}
}

func (w *world) Spend(context.Context) (*ui.Spend, error) { return w.spend, w.err }

func (w *world) Freshness() ui.Freshness { return w.fresh }

func (w *world) Changed() <-chan struct{} { return w.changed }

func (w *world) call(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, fmt.Sprintf(format, args...))
}

func (w *world) called() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.calls)
}

func (w *world) Cancel(_ context.Context, id string) (ui.Done, error) {
	w.call("cancel %s", id)
	return ui.Done{Status: "requested", OK: true}, nil
}

func (w *world) Retry(_ context.Context, id string, probe bool) (ui.Done, error) {
	w.call("retry %s %t", id, probe)
	return ui.Done{Status: "delivered", OK: true}, nil
}

func (w *world) Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (dlq.Result, error) {
	l, err := w.Letter(ctx, seq)
	if err != nil {
		return dlq.Result{}, err
	}
	r := dlq.Result{Seq: seq, JobID: l.JobID, Run: l.Run + 1, Subject: l.Subject, Status: dlq.StatusWouldReplay}
	body := l.Data
	if o.Correct != nil {
		if body, err = o.Correct(l); err != nil {
			return r, err
		}
		if !json.Valid(body) {
			return r, fmt.Errorf("dead letter %d: the corrected job is not valid, and nothing was published: not JSON", seq)
		}
	}
	if !o.DryRun {
		r.Status = dlq.StatusReplayed
		w.call("replay %d %s %t", seq, body, o.IgnoreDeadline)
	}
	return r, nil
}

func (w *world) Remove(_ context.Context, seq uint64) error {
	w.call("remove %d", seq)
	return nil
}

func (w *world) Pause(_ context.Context, queue string, d time.Duration) (time.Time, error) {
	w.call("pause %s %s", queue, d)
	return now.Add(d), nil
}

func (w *world) Resume(_ context.Context, queue string) (bool, error) {
	w.call("resume %s", queue)
	return true, nil
}

func (w *world) Probe(_ context.Context, app, region string) (string, error) {
	w.call("probe %s %s", app, region)
	return "j1", nil
}

func (w *world) CloseCircuit(_ context.Context, app, region string) error {
	w.call("close %s %s", app, region)
	return nil
}

func (w *world) Drain(_ context.Context, id string) (int, error) {
	w.call("drain %s", id)
	return 2, nil
}

// steering has what a screen would obey, and a secret.
const steering = "evil \u202e\u2066\x1b[31m\x00\u2028<script>alert(1)</script> https://h/x?sig=hush"

// busy is a world in which all is in use, by people who mean no good.
func busy() *world {
	w := &world{changed: make(chan struct{}), jobs: make(map[string]*status.Job)}
	w.fleet = status.Fleet{
		At: now, CountedAll: true,
		Queues: []status.Queue{
			{Name: "default", Served: 1, Waiting: 12345, OldestWaiting: now.Add(-time.Hour), Taken: 4, Running: 2, Retrying: 1, Held: 1},
			{Name: "vip", Served: 1, PausedUntil: now.Add(30 * time.Minute)},
			{Name: "nobody", Waiting: 3, OldestWaiting: now.Add(-3 * time.Hour)},
		},
		Workers: []status.Worker{
			{Presence: fleet.Presence{WorkerID: "host-1", Slots: 16, Running: 2, StartedAt: now.Add(-time.Hour), At: now, Queues: map[string]int{"default": 1, "vip": 3}, Version: "v1"}},
			{Presence: fleet.Presence{WorkerID: "host-2", Slots: 16, At: now.Add(-time.Minute), NotReady: steering}, Lost: true},
		},
		Budgets: []status.Budget{
			{Spending: budget.Spending{Key: "label.customer", Value: "acme", Per: budget.Month, Credits: 20, Spent: 1234, Until: time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC)}, Held: 1000},
			{Spending: budget.Spending{Key: "app_id", Value: steering, Per: budget.Day, Credits: 1, Spent: 1, Until: now.Add(time.Hour)}, Held: 1},
		},
		Circuits:    []circuit.Circuit{{App: "shop", Region: "us-west", State: "open", Code: errors.CodeCreditsExhausted, OpenedAt: now.Add(-time.Minute), RetryAt: now.Add(time.Minute)}},
		DeadLetters: []dlq.Count{{Class: errors.ClassConfig, Code: errors.CodeAvatarNotFound, Letters: 2}},
		Storage:     []status.Storage{{Object: "stream AVATAR_JOBS", Messages: 9, Bytes: 90, MaxBytes: 100, Fill: 0.9, Remedy: "raise its limit"}},
	}
	for i, state := range status.States() {
		w.rows = append(w.rows, status.Row{
			ID: fmt.Sprintf("j%d", i+1), Run: 1, State: state, Queue: "default", AppID: steering, AvatarID: "a", Labels: map[string]string{"customer": steering},
			Code: errors.CodeAvatarNotFound, AgeMS: 90_000, RunningMS: 5000, SessionMS: 7000,
		})
	}
	last := &event.Error{Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseHandshake, Message: steering, ServerDetail: "token=abc"}
	w.jobs["j1"] = &status.Job{
		Record: &lifecycle.Record{
			JobID: "j1", Run: 2, StreamSeq: 1, State: lifecycle.StateDeadLettered, Queue: "default", AppID: "shop", AvatarID: "a", PublishedAt: now.Add(-time.Minute),
			CreatedAt: now.Add(-time.Minute), UpdatedAt: now, LastError: last, Labels: map[string]string{"customer": "acme"}, Attempt: 1, MaxAttempts: 5,
		},
		Whole: true, Cost: status.Cost{Sessions: 1, SessionMS: 7000, Credits: 2},
		Replays: []dlq.ReplayedRun{{Run: 2, DeadLetter: 9, At: now.Add(-48 * time.Second), Corrected: "sha256:12"}},
	}
	for i, body := range []any{
		event.Started{JobFields: event.JobFields{JobID: "j1", Run: 1, Attempt: 1}},
		*last,
		event.DeadLettered{JobFields: event.JobFields{JobID: "j1", Run: 1}, Code: errors.CodeAvatarNotFound, Message: steering},
		event.Started{JobFields: event.JobFields{JobID: "j1", Run: 2, Attempt: 1}},
	} {
		data, _ := json.Marshal(body)
		kind := []string{"avatar.job.started", "avatar.session.error", "avatar.job.dead_lettered", "avatar.job.started"}[i]
		w.jobs["j1"].History = append(w.jobs["j1"].History, status.Event{Type: kind, Time: now.Add(time.Duration(i-50) * time.Second), Data: data})
	}
	w.jobs["j2"] = &status.Job{Record: &lifecycle.Record{JobID: "j2", Run: 1, State: lifecycle.StateRunning, WorkerID: "host-1", StartedAt: now.Add(-time.Second), UpdatedAt: now}}
	held := now.Add(time.Minute)
	w.jobs["j3"] = &status.Job{Record: &lifecycle.Record{JobID: "j3", Run: 1, State: lifecycle.StateHeld, HeldReason: lifecycle.HeldCircuit, HeldCode: errors.CodeCreditsExhausted, AppID: "shop", NextAttemptAt: &held, UpdatedAt: now}}
	w.jobs["back"] = &status.Job{Waiting: &status.Waiting{Queue: "default", StreamSeq: 8, Published: now.Add(-time.Hour), Run: 1, AppID: "lim", Labels: map[string]string{"batch": "17"}, Delivered: true, WaitsFor: "a free session of limit app_id/lim (1 in use)"}}
	w.jobs["noted"] = &status.Job{Waiting: &status.Waiting{Queue: "nobody", StreamSeq: 9, Published: now.Add(-time.Hour), Run: 1, CancelRequested: true}}
	w.jobs["early"] = &status.Job{Record: &lifecycle.Record{JobID: "early", Run: 1, State: lifecycle.StateReleased, CancelRequested: true, CreatedAt: now, UpdatedAt: now}}
	w.jobs["w1"] = &status.Job{Waiting: &status.Waiting{Queue: "nobody", StreamSeq: 7, Published: now.Add(-time.Hour), Run: 1}}
	for i := range 2 {
		w.letters = append(w.letters, dlq.Letter{
			Entry: dlq.Entry{
				Seq: uint64(i + 1), JobID: fmt.Sprintf("j%d", i+1), Run: 1, Queue: "default", AppID: "shop", AvatarID: "a", Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig,
				Phase: errors.PhaseHandshake, Reason: "permanent", Message: steering, Attempts: 1, FailedAt: now.Add(-time.Minute), Subject: "avatar.jobs.default", Worker: "host",
			},
			Header: nats.Header{"Avatar-Job-Id": {"j1"}, "X-Evil": {steering}},
			Error:  json.RawMessage(`{"message":"https://h/x?sig=hush"}`),
			Data:   []byte(`{"avatar_id":"a","audio":{"url":"https://h/x?sig=hush"},"output":{"livekit":{"url":"wss://r","api_token":"egress-secret"}}}`),
		})
	}
	alert, _ := json.Marshal(event.RecurringAlert{Code: errors.CodeServerError, Count: 7, Window: "1m0s", AppIDs: []string{steering}, JobIDs: []string{"j1", "../x"}})
	w.alerts = []status.Event{{Type: "avatar.alert.recurring", Time: now, Data: alert}, {Type: "avatar.alert.circuit_closed", Time: now, Data: json.RawMessage(`{"code":"creditsExhausted","app_id":"shop"}`)}, {Type: "x", Data: json.RawMessage(`"` + "text" + `"`)}}
	w.limits = []ui.Limit{{Name: "app_id shop", Used: 2, Max: 2}, {Name: "label.room <x>", Used: 1}}
	w.spend = &ui.Spend{Since: now.Truncate(24 * time.Hour), Connected: time.Hour, Credits: 601, Jobs: 4, AtLeast: true, Ledger: &cost.Overview{
		Today:   usage.Totals{Sessions: 4, ConnectedMS: 3_600_000, Credits: 601, EstimatedCredits: 11, FailedCredits: 23},
		Month:   usage.Totals{Sessions: 90, ConnectedMS: 720_000_000, Credits: 123_456},
		ByLabel: map[string][]cost.Row{"customer": {{Key: "acme <b>", Totals: usage.Totals{Sessions: 3, Credits: 98_765}}, {Totals: usage.Totals{Credits: 1}}}},
	}}
	w.counts = []ui.CodeCount{{Code: errors.CodeServerError, Total: 3, Counts: []int{59: 3}}, {Code: "<b>", Total: 1, Counts: []int{0: 1, 59: 0}}}
	return w
}

// site is a server without a listener, and a browser's session on it.
type site struct {
	t       testing.TB
	handler http.Handler
	server  *ui.Server
	world   *world
	cookie  string
	token   string
}

func open(t testing.TB, w *world, change func(*ui.Options)) *site {
	t.Helper()
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	o := ui.Options{
		Addr: "127.0.0.1:8090", Write: true, Reader: w, Actor: w, Version: "v1", Now: func() time.Time { return now }, Logger: zerolog.Nop(),
	}
	table, err := errors.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	o.Codes = table.Rows()
	if change != nil {
		change(&o)
	}
	server, err := ui.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return &site{t: t, handler: server.Handler(), server: server, world: w}
}

// do sends a request as a browser on this machine does; edit changes it.
func (s *site) do(method, target, body string, edit func(*http.Request)) *http.Response {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = "127.0.0.1:8090"
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Origin", "http://127.0.0.1:8090")
		r.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	if s.cookie != "" {
		r.Header.Set("Cookie", s.cookie)
	}
	if edit != nil {
		edit(r)
	}
	rec := httptest.NewRecorder()
	s.handler.ServeHTTP(rec, r)
	return rec.Result()
}

func text(t testing.TB, r *http.Response) string {
	t.Helper()
	defer r.Body.Close() // it was only read
	data, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

var formToken = regexp.MustCompile(`name="token" value="([^"]+)"`)

// visit opens a session: its cookie and the token of its forms.
func (s *site) visit() *site {
	s.t.Helper()
	r := s.do(http.MethodGet, "/", "", nil)
	for _, c := range r.Cookies() {
		s.cookie = c.Name + "=" + c.Value
	}
	if m := formToken.FindStringSubmatch(text(s.t, r)); m != nil {
		s.token = m[1]
	}
	return s
}

// form is a form's body with its session's token.
func (s *site) form(pairs ...string) string {
	v := url.Values{"token": {s.token}, "back": {"/"}}
	for i := 0; i+1 < len(pairs); i += 2 {
		v.Add(pairs[i], pairs[i+1])
	}
	return v.Encode()
}

// post sends a form and follows the redirect to what was done.
func (s *site) post(path string, pairs ...string) (code int, page string) {
	s.t.Helper()
	r := s.do(http.MethodPost, path, s.form(pairs...), nil)
	if r.StatusCode == http.StatusSeeOther {
		next := r.Header.Get("Location")
		r.Body.Close()
		r = s.do(http.MethodGet, next, "", nil)
	}
	return r.StatusCode, text(s.t, r)
}
