package event

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

var update = flag.Bool("update", false, "write the golden files")

// testSubjects names subjects as the worker does with the prefix "avatar".
type testSubjects struct{}

func (testSubjects) Events(eventType, jobID string) string {
	return "avatar.events." + eventType + "." + jobID
}
func (testSubjects) Errors(class, code string) string { return "avatar.errors." + class + "." + code }
func (testSubjects) Alerts(kind, code string) string  { return "avatar.alerts." + kind + "." + code }

var eventTime = time.Date(2026, 1, 31, 12, 0, 0, 123456789, time.FixedZone("CET", 3600))

func eventFields() JobFields {
	return JobFields{
		JobID: "J", Run: 1, Queue: "default", AppID: "app", AvatarID: "ok", Region: "us-west",
		Worker: "host a", WorkerID: "host a.7f3", Attempt: 2, Session: 3,
		Labels: map[string]string{"tier": "gold"}, Time: eventTime.UTC(),
	}
}

func goldenEvents() map[string]Event {
	job := eventFields()
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	retryAt := eventTime.Add(1500 * time.Millisecond)
	failure := NewError(job, Failure{
		Err: &errors.Error{
			Code: errors.CodeServerError, Phase: errors.PhaseRuntime, Message: "the backend failed: token geheim-7f3a <x>",
			HTTPStatus: 500, ServerCode: "13", ServerTitle: "Internal", ServerDetail: "echo geheim-7f3a",
			ConnectionID: "20260131120000_abc", ReqID: "20260131120000_req", CloseCode: 4503, CloseReason: "geheim-7f3a", Region: "ap-northeast",
		},
		Class: errors.ClassServer, Action: errors.ActionRetry, MaxAttempts: 5, RetryAt: retryAt, Secrets: []string{"geheim-7f3a"},
	})
	unread := NewError(JobFields{JobID: "jdg-7", Run: 1, Queue: "default", Worker: "host a", WorkerID: "host a.7f3", Time: eventTime.UTC()}, Failure{
		Err:   &errors.Error{Code: errors.CodeInvalidJob, Phase: errors.PhaseJob, Message: "avatar_id: is required"},
		Class: errors.ClassJob, Action: errors.ActionDeadLetter,
	})
	id := func(event string, more ...any) string { return ID("J", 1, 3, event, more...) }
	event := func(id string, body Body) Event { return Event{ID: id, Time: eventTime, Body: body} }
	traced := event(id(TypeStarted), Started{JobFields: job, MaxAttempts: 5, Output: jobspec.OutputFrames, Checkpoint: 1})
	traced.TraceParent, traced.TraceState = parent, "a=b"
	return map[string]Event{
		"started":      traced,
		"retrying":     event(id(TypeRetrying), Retrying{JobFields: job, MaxAttempts: 5, Code: errors.CodeConnectionClosed, Class: errors.ClassTransient, Phase: errors.PhaseRuntime, RetryAt: retryAt.UTC()}),
		"held":         event(id(TypeHeld, "h2"), Held{JobFields: job, Code: errors.CodeCreditsExhausted, RetryAt: retryAt.UTC(), Reason: "circuit", Message: "the circuit of app app in us-west is open"}),
		"held_budget":  event(ID("J", 1, 0, TypeHeld, 1), Held{JobFields: job, RetryAt: retryAt.UTC(), Reason: "budget", Message: "the budget is spent"}),
		"held_storage": event(ID("J", 1, 0, TypeHeld, 1), Held{JobFields: job, RetryAt: retryAt.UTC(), Reason: "storage", Message: "bucket AVATAR_RECORDINGS is full"}),
		"completed": event(id(TypeCompleted), NewCompleted(job, 2, []string{"c1", "c2"},
			[]Utterance{{ReqID: "r1", Frames: 6, Bytes: 252896, AudioMS: 20300, FirstFrameMS: 210, DurationMS: 4100}}, 1, 5200*time.Millisecond, "J")),
		"completed_discard": event(id(TypeCompleted), NewCompleted(job, 1, nil, nil, 0, 0, "")),
		"dead_lettered":     event(id(TypeDeadLettered), DeadLettered{JobFields: job, Attempts: 2, Crashes: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Phase: errors.PhaseConnect, Reason: "permanent", Message: "Avatar not found", ServerTitle: "Not Found", ServerDetail: "no avatar x", DeadLetter: "avatar.dlq.config.avatarNotFound"}),
		"expired":           event(ID("J", 1, 0, TypeExpired), Expired{JobFields: job, Attempts: 1, Code: errors.CodeDeadlineExceeded, Deadline: eventTime.UTC(), LastError: &failure}),
		"cancelled":         event(id(TypeCancelled), Cancelled{JobFields: job, Attempts: 1, UtterancesTotal: 2, SessionMS: 900}),
		"released":          event(id(TypeReleased), Released{JobFields: job, Reason: "drain", Checkpoint: 2}),
		"duplicate":         event(ID("J", 1, 0, TypeDuplicate, "seq9"), Duplicate{JobFields: job, StreamSeq: 9, KeptSeq: 4, CurrentRun: 1}),
		"error":             event(id(TypeError), failure),
		"error_invalid_job": event(ID("jdg-7", 1, 0, TypeError), unread),
		"alert_recurring": event(AlertID(AlertRecurring, eventTime, "serverError"),
			RecurringAlert{Code: errors.CodeServerError, Count: 5, Window: time.Minute.String(), First: eventTime.Add(-time.Minute).UTC(), Last: eventTime.UTC(), AppIDs: []string{"app"}, JobIDs: []string{"J", "K"}, Worker: "host a", Time: eventTime.UTC()}),
		"alert_circuit_opened": event(AlertID(AlertCircuitOpened, eventTime, "app", "us-west"), CircuitAlert{Kind: AlertCircuitOpened, AppID: "app", Region: "us-west", Code: errors.CodeBillingRequired, Failures: 1, Cooldown: "10s", Message: "pay", Worker: "host a", Time: eventTime.UTC()}),
		"alert_circuit_closed": event(AlertID(AlertCircuitClosed, eventTime, "app", "us-west"), CircuitAlert{Kind: AlertCircuitClosed, AppID: "app", Region: "us-west", Code: errors.CodeBillingRequired, Message: "a session works again", Worker: "host a", Time: eventTime.UTC()}),
		"alert_storage": event(AlertID(AlertStorage, eventTime, jobspec.OutputObject),
			WorkerAlert{Kind: AlertStorage, What: jobspec.OutputObject, Message: "bucket AVATAR_RECORDINGS is full", Worker: "host a", WorkerID: "host a.7f3", Time: eventTime.UTC()}),
		"alert_worker_key": event(AlertID(AlertWorkerKey, eventTime, "app"),
			WorkerAlert{Kind: AlertWorkerKey, What: string(errors.CodeSessionTokenExpired), AppID: "app", Message: "correct its key", Worker: "host a", WorkerID: "host a.7f3", Time: eventTime.UTC()}),
		"alert_unsettled": event(AlertID(AlertUnsettled, eventTime, "J"),
			WorkerAlert{Kind: AlertUnsettled, What: "sessions", AppID: "app", JobID: "J", Message: "the job is held", Worker: "host a", WorkerID: "host a.7f3", Time: eventTime.UTC()}),
		"alert_budget": event(AlertID(AlertBudget, eventTime, "spent", "app_id", "app", "month", "1000"),
			WorkerAlert{Kind: AlertBudget, What: "spent", AppID: "app", Message: "the budget is spent", Worker: "host a", WorkerID: "host a.7f3", Time: eventTime.UTC(), Key: "app_id", Value: "app", Credits: 1000, Spent: 1004, Per: "month", Until: eventTime.Add(time.Hour).UTC()}),
	}
}

// render shows a message as a golden file keeps it: subject, sorted headers,
// indented body.
func render(t *testing.T, msg *nats.Msg) []byte {
	t.Helper()
	var b bytes.Buffer
	fmt.Fprintln(&b, msg.Subject)
	for _, key := range sortedHeader(msg.Header) {
		fmt.Fprintf(&b, "%s: %s\n", key, strings.Join(msg.Header[key], ", "))
	}
	b.WriteString("\n")
	if err := json.Indent(&b, msg.Data, "", "  "); err != nil {
		t.Fatal(err)
	}
	b.WriteString("\n")
	return b.Bytes()
}

func sortedHeader(h nats.Header) []string {
	var keys []string
	for key := range h {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func TestEventsAreWhatSubscribersReceived(t *testing.T) {
	t.Parallel()
	for name, event := range goldenEvents() {
		t.Run(name, func(t *testing.T) {
			msg, err := event.Message(testSubjects{}, Source("host a"))
			if err != nil {
				t.Fatal(err)
			}
			got, file := render(t, msg), filepath.Join("testdata", "events", name+".golden")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if bytes.Contains(got, []byte("geheim-7f3a")) {
				t.Errorf("shows a secret:\n%s", got)
			}
		})
	}
}

func TestEveryGoldenFileHasItsEvent(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join("testdata", "events", "*.golden"))
	if err != nil {
		t.Fatal(err)
	}
	if events := goldenEvents(); len(files) != len(events) {
		t.Errorf("%d files, %d events", len(files), len(events))
	}
}

func TestEventIDDistinguishesWhatHappened(t *testing.T) {
	t.Parallel()
	ids := []string{
		ID("J", 1, 2, TypeCompleted), ID("J", 2, 2, TypeCompleted), ID("J", 1, 1, TypeCompleted),
		ID("J", 1, 0, TypeCompleted), ID("J", 1, 2, TypeHeld, 1), ID("J", 1, 2, TypeHeld, 2),
		AlertID(AlertRecurring, eventTime, "a"), AlertID(AlertRecurring, eventTime.Add(time.Second), "a"),
	}
	if ids[0] != "J.run1.s2.completed" || ids[3] != "J.run1.completed" {
		t.Errorf("got %s, %s", ids[0], ids[3])
	}
	slices.Sort(ids)
	if len(slices.Compact(ids)) != 8 {
		t.Errorf("two are the same: %v", ids)
	}
}

func TestEventsOfLongJobsStayBounded(t *testing.T) {
	t.Parallel()
	utterances := make([]Utterance, 5000)
	utterances[4999].ReqID = "last"
	body := NewCompleted(eventFields(), 1, make([]string, 500), utterances, 7000, time.Hour, "")
	if len(body.Utterances) != 256 || body.Utterances[255].ReqID != "last" || body.UtterancesTotal != 7000 || len(body.ConnectionIDs) != 100 {
		t.Errorf("%d utterances of %d, %d connections", len(body.Utterances), body.UtterancesTotal, len(body.ConnectionIDs))
	}
	failure := NewError(eventFields(), Failure{Err: &errors.Error{ServerDetail: strings.Repeat("ü", 1<<20)}})
	if len(failure.ServerDetail) > maxEventText || !strings.HasSuffix(failure.ServerDetail, "ü…") {
		t.Errorf("%d bytes, ending in %q", len(failure.ServerDetail), failure.ServerDetail[len(failure.ServerDetail)-8:])
	}
}

func TestRetryOfAnErrorIsNotBeforeTheError(t *testing.T) {
	t.Parallel()
	job := eventFields()
	for _, tc := range []struct{ asked, want time.Duration }{{-time.Hour, 0}, {-time.Millisecond, 0}, {0, 0}, {time.Second, time.Second}} {
		ev := NewError(job, Failure{Err: &errors.Error{}, RetryAt: job.Time.Add(tc.asked)})
		if ev.RetryAt == nil || !ev.RetryAt.Equal(job.Time.Add(tc.want)) {
			t.Errorf("%s after it happened: %v, happened %v", tc.asked, ev.RetryAt, ev.Time)
		}
	}
	if ev := NewError(job, Failure{Err: &errors.Error{}}); ev.RetryAt != nil {
		t.Errorf("not retried, but retry_at is %v", ev.RetryAt)
	}
}
