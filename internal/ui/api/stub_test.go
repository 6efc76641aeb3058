package api

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/operate"
	"avatarworker/internal/output"
	"avatarworker/internal/status"
)

var at = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// secret must not be in any answer.
const secret = "s3cr3t-of-the-publisher"

// stub answers with one of each thing.
type stub struct{ queries []status.Query }

func (*stub) Fleet(context.Context) (*status.Fleet, error) {
	workers, _ := (&stub{}).Workers(context.Background())
	storage, _ := (&stub{}).Storage(context.Background())
	return &status.Fleet{
		At: at, Queues: []status.Queue{{
			Name: "default", Served: 1, Waiting: 3, Taken: 2, Running: 1, Held: 1, OldestWaiting: at.Add(-time.Minute), PausedUntil: at.Add(time.Hour),
		}},
		Workers: workers,
		Circuits: []circuit.Circuit{{
			App: "a1", Region: "us-west", State: circuit.Open, Code: errors.CodeCreditsExhausted, Failures: []string{"j1"}, Cooldown: 10 * time.Second, OpenedAt: at,
			RetryAt: at.Add(time.Minute), ProbeJob: "j1", ProbeWorker: "w-1", Probes: 1, LastProbe: "j0", WorkingSessions: 1,
		}},
		DeadLetters: []dlq.Count{{Class: errors.ClassConfig, Code: errors.CodeAvatarNotFound, Letters: 3}},
		Storage:     storage, Budgets: []status.Budget{{Spending: budget.Spending{Key: "app_id", Value: "a1", Per: budget.Day, Credits: 5, Spent: 6, Until: at.Add(time.Hour)}, Held: 1}}, HeldBudget: 1, BudgetsUnread: "stream AVATAR_TOTALS is away", Warnings: []string{"queue default is paused until 2026-03-01T13:00:00Z: its jobs wait"}, CountedAll: true,
	}, nil
}

func (s *stub) Jobs(_ context.Context, q status.Query) (status.List, error) {
	s.queries = append(s.queries, q)
	if q.By != "" {
		return status.List{Rows: []status.Row{}, Groups: []status.Group{{Key: "acme", Jobs: 3, States: map[lifecycle.State]int{lifecycle.StateHeld: 3}}}, Waiting: status.Search{All: true}}, nil
	}
	next := at.Add(time.Minute)
	return status.List{Rows: []status.Row{{
		ID: "j1", Run: 1, State: lifecycle.StateRetrying, Queue: "default", AppID: "a1", AvatarID: "v1", Labels: map[string]string{"customer": "acme"}, Attempt: 2, Crashes: 1,
		Code: errors.CodeServerError, AgeMS: 90_000, RunningMS: 0, NextAttemptAt: &next, WorkerID: "w-1", SessionMS: 12_000,
	}}, More: true, Waiting: status.Search{Looked: 3, Of: 3, All: true}}, nil
}

func (*stub) Job(_ context.Context, id string) (*status.Job, error) {
	if id != "j1" {
		return nil, fmt.Errorf("%w %s", status.ErrNoJob, id)
	}
	failure := event.Error{JobID: "j1", Run: 1, Queue: "default", AppID: "a1", Code: errors.CodeServerError, Class: errors.ClassServer, Phase: errors.PhaseRuntime, Message: "internal error", Time: at}
	next := at.Add(time.Minute)
	return &status.Job{
		Record: &lifecycle.Record{
			JobID: "j1", Run: 1, StreamSeq: 7, Session: 1, State: lifecycle.StateRetrying, Queue: "default", AppID: "a1", AvatarID: "v1", Attempt: 2, MaxAttempts: 5,
			WorkerID: "w-1", CreatedAt: at, UpdatedAt: at, NextAttemptAt: &next, LastError: &failure, Labels: map[string]string{"customer": "acme"},
		},
		History: []status.Event{{Subject: "avatar.events.started.j1", ID: "j1.run1.started", Type: "avatar.job.started", Time: at, JobID: "j1", Data: json.RawMessage(`{"job_id":"j1","api_token":"` + secret + `"}`)}},
		Whole:   true, Cost: status.Cost{Sessions: 1, SessionMS: 12_000, Credits: 2},
		Waiting: &status.Waiting{Queue: "default", StreamSeq: 7, Published: at, Run: 1, AppID: "a1", Labels: map[string]string{}, Delivered: true, WaitsFor: "a session limit"},
	}, nil
}

func (*stub) Workers(context.Context) ([]status.Worker, error) {
	return []status.Worker{{Presence: fleet.Presence{Worker: "w", WorkerID: "w-1", Version: "1.0.0", StartedAt: at, At: at, Queues: map[string]int{"default": 1}, Slots: 16, Running: 1}}}, nil
}

func (*stub) Storage(context.Context) ([]status.Storage, error) {
	return []status.Storage{{Object: "stream AVATAR_JOBS", Messages: 5, Bytes: 900, MaxBytes: 1000, Fill: .9, Remedy: "raise its limit"}}, nil
}

func (*stub) Limits(context.Context) ([]status.Limit, error) {
	return []status.Limit{{Name: "app_id/a1", InUse: 1, Holders: []status.LimitHolder{{WorkerID: "w-1", JobID: "j1"}}}}, nil
}

func (*stub) Failures(context.Context) (status.Failures, error) {
	return status.Failures{
		Since: at.Add(-30 * time.Minute), StepMS: 900_000, CountedAll: true,
		Codes: []status.FailuresOfOne{{Code: errors.CodeServerError, Class: errors.ClassServer, Total: 3, Steps: []int{1, 2}}},
	}, nil
}

func (*stub) Alerts(context.Context, int) ([]status.Event, error) {
	return []status.Event{{Subject: "avatar.alerts.recurring.serverError", ID: "a", Type: "avatar.alert.recurring", Time: at, Data: json.RawMessage(`{"code":"serverError","count":5,"url":"https://h/a.wav?key=` + secret + `"}`)}}, nil
}

func (*stub) Freshness() status.Freshness { return status.Freshness{Version: 7, At: at, Loaded: true} }

// letters has one dead letter, of sequence 17.
type letters struct{ replayed []dlq.ReplayOptions }

func entry() dlq.Entry {
	return dlq.Entry{
		Seq: 17, JobID: "j1", Run: 1, Queue: "default", AppID: "a1", AvatarID: "v1", Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseConnect,
		Reason: "permanent", Message: "no such avatar at https://h/a?token=" + secret, ServerTitle: "Not found", ServerDetail: "avatar v1", Attempts: 1, Worker: "w", FailedAt: at, StoredAt: at,
		Subject: "avatar.jobs.default", StreamSeq: 7, Size: 200, Labels: map[string]string{"customer": "acme"},
	}
}

func (*letters) List(context.Context, dlq.Filter, int) iter.Seq2[dlq.Entry, error] {
	return func(yield func(dlq.Entry, error) bool) { yield(entry(), nil) }
}

func (*letters) Show(_ context.Context, seq uint64) (dlq.Letter, error) {
	if seq != 17 {
		return dlq.Letter{}, fmt.Errorf("dead letter %d: %w", seq, dlq.ErrNoLetter)
	}
	return dlq.Letter{
		Entry: entry(), Header: nats.Header{"Avatar-Job-Id": {"j1"}, "X-Url": {"https://h/a?key=" + secret}}, Error: json.RawMessage(`{"code":"avatarNotFound"}`),
		Data: []byte(`{"avatar_id":"v1","audio":{"url":"https://h/a.wav?sig=` + secret + `"},"output":{"livekit":{"api_token":"` + secret + `"}}}`),
	}, nil
}

func (l *letters) Replay(ctx context.Context, seq uint64, o dlq.ReplayOptions) (dlq.Result, error) {
	letter, err := l.Show(ctx, seq)
	if err != nil {
		return dlq.Result{}, err
	}
	l.replayed = append(l.replayed, o)
	r := dlq.Result{Seq: seq, JobID: "j1", Run: 2, Subject: "avatar.jobs.default", Status: dlq.StatusReplayed}
	if o.Correct != nil {
		if _, err := o.Correct(letter); err != nil {
			return r, err
		}
		r.Corrected = "sha256:00"
	}
	return r, nil
}

func (l *letters) Remove(ctx context.Context, seq uint64) error {
	_, err := l.Show(ctx, seq)
	return err
}

// operator knows job j1, queue default, worker w-1 and the circuit of app a1.
type operator struct{ calls []string }

func (o *operator) called(format string, args ...any) {
	o.calls = append(o.calls, fmt.Sprintf(format, args...))
}

func (o *operator) Cancel(_ context.Context, id string, ifUnknown bool) (control.Reply, error) {
	o.called("cancel %s %t", id, ifUnknown)
	switch id {
	case "j1":
		return control.Reply{JobID: id, Status: control.StatusCancelled}, nil
	case "done":
		return control.Reply{JobID: id, Status: control.StatusFinished, Outcome: "completed"}, nil
	}
	return control.Reply{JobID: id, Status: operate.StatusUnknown, Message: "no record and no waiting job has this id"}, nil
}

func (o *operator) Retry(_ context.Context, id string, probe bool) (operate.Retried, error) {
	o.called("retry %s %t", id, probe)
	if id != "j1" {
		return operate.Retried{JobID: id, Status: operate.StatusHeld, State: lifecycle.StateHeld, Message: "the circuit of app a1 is open"}, nil
	}
	return operate.Retried{JobID: id, Status: operate.StatusDelivered, State: lifecycle.StateRetrying}, nil
}

func (o *operator) Pause(_ context.Context, queue string, d time.Duration) (time.Time, error) {
	o.called("pause %s %s", queue, d)
	if queue != "default" {
		return time.Time{}, fmt.Errorf("queue %s: %w", queue, operate.ErrNoQueue)
	}
	return at.Add(time.Hour), nil
}

func (o *operator) Resume(_ context.Context, queue string) (bool, error) {
	o.called("resume %s", queue)
	return queue == "default", nil
}

func (o *operator) Drain(_ context.Context, id string) (operate.Draining, error) {
	o.called("drain %s", id)
	if id != "w-1" {
		return operate.Draining{}, fmt.Errorf("worker %s: %w", id, operate.ErrNoWorker)
	}
	return operate.Draining{WorkerID: id, Running: 2}, nil
}

func (o *operator) OpenCircuits(_ context.Context, app string, region *string) ([]circuit.Circuit, error) {
	if app != "a1" || region != nil && *region != "us-west" {
		return nil, nil
	}
	return []circuit.Circuit{{App: "a1", Region: "us-west", State: circuit.Open}}, nil
}

func (o *operator) ProbeCircuit(_ context.Context, c circuit.Circuit) (circuit.Circuit, string, error) {
	o.called("probe %s %s", c.App, c.Region)
	return c, "j1", nil
}

func (o *operator) CloseCircuit(_ context.Context, app, region string) (circuit.Circuit, error) {
	o.called("close %s %s", app, region)
	return circuit.Circuit{}, nil
}

// served is a handler over stubs.
type served struct {
	*Handler
	reader   *stub
	letters  *letters
	operator *operator
	costs    *costs
}

// costs has one row for each sum.
type costs struct{ queries []cost.Query }

func (c *costs) Sum(_ context.Context, q cost.Query) ([]cost.Row, error) {
	if q.By == "month" || q.By == "label:" {
		return nil, fmt.Errorf("sum by %q: %w", q.By, cost.ErrBy)
	}
	c.queries = append(c.queries, q)
	return []cost.Row{{Key: "acme", Totals: usage.Totals{Sessions: 3, ConnectedMS: 13_000, Credits: 5, EstimatedCredits: 1, FailedCredits: 2}}}, nil
}

func serve(t testing.TB, write bool) served {
	t.Helper()
	s := served{reader: &stub{}, letters: &letters{}, operator: &operator{}, costs: &costs{}}
	h, err := New(Options{
		Reader: s.reader, Letters: s.letters, Changes: func(context.Context) (Changes, error) { return s.operator, nil },
		Recordings: func(context.Context) ([]output.Stored, error) {
			return []output.Stored{{Name: "j1", JobID: "j1", Bytes: 100, StoredAt: at, Digest: "SHA-256=00"}}, nil
		},
		Costs: s.costs, Budgets: func(context.Context) ([]budget.Spending, error) {
			return []budget.Spending{{Key: "label.customer", Value: "acme", Per: budget.Month, Credits: 20, Spent: 21, Until: at.AddDate(0, 1, 0)}}, nil
		},
		Write: write, DefaultApp: "a1", Now: func() time.Time { return at }, Log: zerolog.Nop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Handler = h
	return s
}

// ask makes one request. A POST has a JSON body.
func (s served) ask(method, path, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequestWithContext(context.Background(), method, Prefix+path, strings.NewReader(body))
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}
