package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/status"
)

// letter gives a job up.
func (b *bench) letter(id string, code errors.Code, body string, failedAt time.Time) {
	b.t.Helper()
	err := dlq.NewWriter(b.js, names).Write(b.t.Context(), lifecycle.DeadLetter{
		Job: jobspec.Identity{ID: id, Run: 1, Queue: "default", Subject: "avatar.jobs.default", StreamSeq: 1}, Data: []byte(body),
		Reason: lifecycle.ReasonPermanent, Attempts: 1, FailedAt: failedAt, Worker: "host",
		Error: event.Error{
			JobID: id, Queue: "default", AppID: "app", AvatarID: "a", Code: code, Class: code.Class(), Phase: errors.PhaseHandshake,
			Message: "refused at https://h/x?sig=hush", Time: failedAt,
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) letters() uint64 {
	b.t.Helper()
	info, err := b.h.DLQ.Info(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return info.State.Msgs
}

func (b *bench) job(queue, id string) {
	b.t.Helper()
	b.publish(&nats.Msg{Subject: names.Jobs(queue), Header: nats.Header{"Nats-Msg-Id": {id}}, Data: []byte(`{}`)})
}

func TestFleetStatusShowsQueuesWorkersCircuitsAndTheWayToTheCause(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.job("default", "w1")
	b.job("vip", "v1")
	for i, state := range []lifecycle.State{lifecycle.StateRunning, lifecycle.StateHeld, lifecycle.StateCompleted} {
		b.record(lifecycle.Record{JobID: fmt.Sprint("r", i), Run: 1, StreamSeq: uint64(i + 1), Queue: "default", State: state})
	}
	presence, err := json.Marshal(fleet.Presence{Worker: "host", WorkerID: "host-1", At: time.Now(), Queues: map[string]int{"default": 1}, Slots: 4})
	if err != nil {
		t.Fatal(err)
	}
	circuit, err := json.Marshal(circuit.Circuit{App: "app", Region: "us-west", State: "open", Code: errors.CodeBillingRequired, OpenedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string][]byte{"worker.host-1": presence, "circuit.app.us-west": circuit} {
		if _, err := b.h.Fleet.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	b.letter("d1", errors.CodeAvatarNotFound, `{}`, time.Now())
	expect(t, 0, []string{
		"host-1", "billingRequired", "avatarworker dlq show --code avatarNotFound", "no worker serves queue vip (jobs waiting: 1)",
	}, b.args("status")...)
	f := decode[status.Fleet](t, expect(t, 0, nil, b.args("status", "--json")...))
	if len(f.Queues) != 2 || f.Queues[0].Waiting != 1 || f.Queues[0].Served != 1 || f.Queues[1].Waiting != 1 || f.Queues[1].Served != 0 || f.Queues[1].OldestWaiting.IsZero() {
		t.Errorf("queues: %+v", f.Queues)
	}
}

func TestJobStatusSaysWhereAReplayedJobWaits(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	deadLettered := func(id string) {
		b.record(lifecycle.Record{
			JobID: id, Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered,
			CreatedAt: time.Now(), UpdatedAt: time.Now(),
			LastError: &event.Error{Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Message: "no such avatar"},
		})
	}
	deadLettered("j1")
	b.letter("j1", errors.CodeAvatarNotFound, `{"avatar_id":"a","audio":{"object":"a.wav"}}`, time.Now())
	expect(t, 0, []string{"History\nnone is kept", "\n\nIts dead letter: avatarworker dlq show --job j1\nTo run it again: avatarworker dlq replay --job j1"}, b.args("jobs", "show", "j1")...)
	expect(t, 0, nil, b.args("queue", "pause", "default")...)
	expect(t, 0, nil, b.args("dlq", "replay", "--job", "j1", "-y")...)
	text := expect(t, 0, []string{"dead_lettered", "Run 2", "waiting: not delivered", "the queue is paused", "avatarworker queue resume default"}, b.args("jobs", "show", "j1")...)
	if strings.Contains(text, "dlq replay") {
		t.Errorf("a job that was replayed is to be replayed: %s", text)
	}
	j := decode[status.Job](t, expect(t, 0, nil, b.args("jobs", "show", "j1", "--json")...))
	if j.NextRun == nil || j.NextRun.Run != 2 || j.LetterGone {
		t.Errorf("next run %+v, letter gone %t", j.NextRun, j.LetterGone)
	}
	deadLettered("j2")
	expect(t, 0, []string{"Its dead letter is gone"}, b.args("jobs", "show", "j2")...)
}

func TestJobStatusShowsRecordEventsAndErrorsInOrder(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.letter("j1", errors.CodeAvatarNotFound, `{}`, time.Now())
	fields := event.JobFields{JobID: "j1", Run: 1, Attempt: 1, Worker: "host"}
	b.record(lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered, CreatedAt: time.Now(), UpdatedAt: time.Now(),
		LastError: &event.Error{Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Message: "no such avatar"},
	})
	b.event("1", event.Started{JobFields: fields, Crashes: 1})
	b.event("2", event.Error{JobID: "other", Code: errors.CodeInternal, Class: errors.ClassInternal})
	b.event("3", event.Error{JobID: "j1", Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Message: "no such avatar"})
	b.event("4", event.DeadLettered{JobFields: fields, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig})
	expect(t, 0, []string{"dead_lettered", "after 1 crash", "no such avatar", "what to do", "avatarworker dlq show --job j1"}, b.args("status", "j1")...)
	j := decode[status.Job](t, expect(t, 0, nil, b.args("status", "j1", "--json")...))
	var ids []string
	for _, e := range j.History {
		ids = append(ids, e.ID)
	}
	if got := strings.Join(ids, " "); got != "1 3 4" || j.Record == nil {
		t.Errorf("history %q, record %v", got, j.Record)
	}
	expect(t, 1, []string{"unknown job absent", "mistyped"}, b.args("status", "absent")...)
	if err := b.js.DeleteObjectStore(t.Context(), names.RecordingsBucket()); err != nil {
		t.Fatal(err)
	}
	expect(t, 1, []string{"bucket AVATAR_RECORDINGS not found: ", "or it was deleted; 'avatarworker setup' makes it"}, b.args("recording", "ls")...)
	expect(t, 1, []string{"no worker has run here"}, b.args("status", "--prefix", "other")...)
	for _, command := range [][]string{{"jobs", "ls"}, {"retry", "j1"}, {"cancel", "j1"}, {"drain", "w1"}, {"queue", "pause", "default"}, {"circuit", "ls"}} {
		expect(t, 1, []string{`streams of the fleet not found: no worker has run here with nats.prefix "other"`}, b.args(append(command, "--prefix", "other")...)...)
	}
}

func TestStatusOfAHeldJobSaysWhyAndWhatToDo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	for _, c := range []struct {
		record lifecycle.Record
		want   []string
	}{
		{lifecycle.Record{HeldReason: lifecycle.HeldCircuit, HeldCode: errors.CodeCreditsExhausted}, []string{"app shop are started in us-west", "creditsExhausted", "Buy credits"}},
		{lifecycle.Record{HeldCode: errors.CodeCreditsExhausted}, []string{"the circuit is open", "Buy credits"}}, // of an earlier version
		{lifecycle.Record{HeldReason: lifecycle.HeldRefused, HeldCode: errors.CodeBillingRequired}, []string{"one more session of app shop", "Set max_sessions"}},
		{lifecycle.Record{HeldReason: lifecycle.HeldPolicy, HeldCode: errors.CodeServerError}, []string{"policy holds jobs that fail with serverError", errors.Explain(errors.CodeServerError).Remedy[:20]}},
		{lifecycle.Record{HeldReason: lifecycle.HeldStorage, HeldWhy: "bucket AVATAR_RECORDINGS is full"}, []string{"can't take what the job makes: bucket AVATAR_RECORDINGS is full", "Make room"}},
		{lifecycle.Record{HeldReason: lifecycle.HeldBudget, HeldWhy: "the budget is spent"}, []string{"raise the budget", "To run it at once when the budget is raised: avatarworker retry held"}},
		{lifecycle.Record{HeldReason: lifecycle.HeldUnsettled, HeldWhy: "its last 5 sessions settled nothing", Unsettled: 5}, []string{"its last 5 sessions settled nothing", "cancel it", "5 in a row"}},
	} {
		r := c.record
		at := now.Add(-time.Second)
		r.JobID, r.Run, r.StreamSeq, r.Queue, r.AppID, r.Region = "held", 1, 1, "default", "shop", "us-west"
		r.State, r.NextAttemptAt, r.CreatedAt, r.UpdatedAt = lifecycle.StateHeld, &at, now, now
		b.record(r)
		expect(t, 0, append(c.want, "held because", "what to do", "still held"), b.args("status", "held")...)
	}
	b.record(lifecycle.Record{JobID: "held", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateReleased, Reason: "lease_lost", CreatedAt: now, UpdatedAt: now, HeldReason: lifecycle.HeldStorage})
	if out := expect(t, 0, []string{"lease_lost: its worker could not renew its lease"}, b.args("status", "held")...); strings.Contains(out, "held because") {
		t.Errorf("a job that is held no more is said to be:\n%s", out)
	}
}

func TestFleetStatusSaysWhyAWorkerTakesNoJobs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for id, p := range map[string]fleet.Presence{
		"keyless":  {NotReady: "the backend refuses this worker's API key for app \"shop\"", RefusedKeys: []string{"shop"}},
		"stopping": {NotReady: "draining", Draining: true},
	} {
		p.Worker, p.WorkerID, p.At, p.Queues = id, id, time.Now(), map[string]int{"default": 1}
		value, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.h.Fleet.Put(t.Context(), "worker."+id, value); err != nil {
			t.Fatal(err)
		}
	}
	out := expect(t, 0, []string{"not ready", "draining", `worker keyless takes no jobs, or not all: the backend refuses this worker's API key for app "shop"`}, b.args("status")...)
	if strings.Contains(out, "worker stopping") {
		t.Errorf("a drain is reported as a fault:\n%s", out)
	}
}

func TestAlertsOfWorkersSayWhatIsWrongInOneLine(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.event("storage", event.WorkerAlert{Kind: event.AlertStorage, What: jobspec.OutputObject, Message: "bucket AVATAR_RECORDINGS is full", Worker: "host"})
	b.event("key", event.WorkerAlert{Kind: event.AlertWorkerKey, What: "sessionTokenExpired", AppID: "shop", Message: "correct its key", Worker: "host"})
	b.event("unsettled", event.WorkerAlert{Kind: event.AlertUnsettled, What: "sessions", AppID: "shop", JobID: "j1", Message: "the job is held", Worker: "host"})
	b.event("held", event.Held{JobFields: event.JobFields{JobID: "j1", Run: 1, Worker: "host"}, Reason: lifecycle.HeldUnsettled, Message: "find out why its sessions end", RetryAt: time.Now()})
	out := expect(t, 0, []string{
		"alert.storage", "object, on host: bucket AVATAR_RECORDINGS is full",
		"alert.worker_key", "sessionTokenExpired, app shop, on host: correct its key",
		"alert.unsettled", "j1  sessions, app shop, on host: the job is held",
		"unsettled, on host: find out why its sessions end",
	}, b.args("events", "--no-follow")...)
	if strings.Count(out, "\n") != 4 {
		t.Errorf("not a line each:\n%s", out)
	}
	expect(t, 0, []string{"correct its key"}, b.args("events", "--no-follow", "--code", "sessionTokenExpired")...)
}

func TestAJobThatOnlyWaitsIsKnown(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i := range 20 {
		b.job("default", fmt.Sprint("before", i))
	}
	b.job("vip", "waits")
	b.publish(&nats.Msg{Subject: names.Jobs("default"), Data: []byte(`{}`), Header: nats.Header{"avatar-job-id": {"by-header"}}})
	expect(t, 0, []string{"waiting", "vip"}, b.args("status", "waits")...)
	if j := decode[status.Job](t, expect(t, 0, nil, b.args("status", "by-header", "--json")...)); j.Waiting == nil || j.Waiting.StreamSeq != 22 {
		t.Errorf("got %+v", j)
	}
	expect(t, 0, []string{"requested"}, b.args("cancel", "waits")...)
	expect(t, 0, []string{"waiting: not delivered", "requested", "vip"}, b.args("jobs", "show", "waits")...)
	if j := decode[status.Job](t, expect(t, 0, nil, b.args("jobs", "show", "waits", "--json")...)); j.Record != nil || j.Waiting == nil || !j.Waiting.CancelRequested || j.Waiting.StreamSeq != 21 {
		t.Errorf("cancelled while it waits: %+v", j)
	}
	expect(t, 0, []string{"requested"}, b.args("cancel", "later", "--if-unknown")...)
	expect(t, 0, []string{"not published yet: its cancel is noted"}, b.args("jobs", "show", "later")...)
	expect(t, 1, []string{"unknown"}, b.args("cancel", "before")...)
}

func TestCancelOfANameThatNoJobHasIsUnknownAndChangesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.job("default", "mine")
	expect(t, 1, []string{"unknown", "--if-unknown"}, b.args("cancel", "mien")...)
	if reply := decode[control.Reply](t, expect(t, 1, nil, b.args("cancel", "mien", "--json")...)); reply.Status != "unknown" || reply.JobID != "mien" {
		t.Errorf("got %+v", reply)
	}
	if _, err := b.h.State.Get(t.Context(), "mien"); !errors.Is(err, jetstream.ErrKeyNotFound) {
		t.Errorf("a record was made: %v", err)
	}
}

func TestNoDeadLettersAreAnEmptyListHoweverItIsAskedFor(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, emptied := range []bool{false, true} {
		if emptied {
			b.letter("j", errors.CodeAvatarNotFound, `{}`, time.Now())
			expect(t, 0, nil, b.args("dlq", "rm", "1")...)
		}
		for _, flags := range [][]string{nil, {"--newest"}, {"--newest", "--all"}, {"--after", "1h"}, {"--newest", "--code", "internal", "--limit", "3"}} {
			args := b.args(append([]string{"dlq", "ls"}, flags...)...)
			expect(t, 0, []string{"no dead letters"}, args...)
			if out := expect(t, 0, nil, append(args, "--json")...); out != "[]\n" {
				t.Errorf("%v: %q", args, out)
			}
		}
		expect(t, 1, []string{"no dead letter matches"}, b.args("dlq", "show", "--newest", "--code", "internal")...)
		expect(t, 0, []string{"0 dead letters"}, b.args("dlq", "rm", "--all", "-y", "--newest")...)
	}
}

// steering are characters that a terminal obeys: C1's CSI and OSC, a lone byte
// of it, a line separator, and an override of the direction of writing.
const steering = "\u009b31m \u009d0;title\u009c \x9b2J \u2028 \u202egnp.exe\u202c \u2066x\u2069 \u200f \u200b\u00ad\ufeff\u2060\U000e0041 \x1b[2J"

func TestWhatOthersWroteNeverSteersATerminal(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	wrong := event.Error{JobID: "j1", Code: errors.CodeServerError, Class: errors.ClassServer, Message: "said " + steering, ServerTitle: steering, ServerDetail: steering}
	b.record(lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 1, Queue: "default", State: lifecycle.StateDeadLettered, Outcome: lifecycle.StateDeadLettered, AvatarID: steering,
		Labels: map[string]string{steering: steering}, LastError: &wrong, CreatedAt: time.Now(), UpdatedAt: time.Now(),
	})
	b.event("1", wrong)
	raw := nats.NewMsg(names.Events(event.TypeCompleted, "j1"))
	raw.Data = []byte(`{"reason":"` + strings.ReplaceAll(steering, "\x1b", "") + `"}`)
	b.publish(raw)
	b.letter("j1", errors.CodeServerError, `{"avatar_id":"`+strings.ReplaceAll(steering, "\x1b", "")+`"}`, time.Now())
	b.letter("j2", errors.CodeServerError, "no JSON "+steering, time.Now())
	presence, err := json.Marshal(fleet.Presence{Worker: steering, WorkerID: steering, Version: steering, At: time.Now(), Queues: map[string]int{"default": 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.h.Fleet.Put(t.Context(), "worker.x", presence); err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, "job.json", []byte(`{"avatar_`+steering+`":1}`))
	lines := writeFile(t, "lines", []byte("no failure "+steering+"\n"))
	for _, args := range [][]string{
		{"status"}, {"status", "--json"}, {"status", "j1"}, {"status", "j1", "--json"},
		{"events", "--no-follow"}, {"events", "--no-follow", "--json"},
		{"dlq", "ls"}, {"dlq", "ls", "--json"}, {"dlq", "show", "1"}, {"dlq", "show", "1", "--json"}, {"dlq", "show", "2"},
		{"submit", file}, {"submit", steering}, {"errors", "classify", lines}, {"recording", "info", steering},
	} {
		_, stdout, stderr := call(t, b.args(args...)...)
		for _, text := range []string{stdout, stderr} {
			if !utf8.ValidString(text) {
				t.Errorf("%v: a byte that is not UTF-8: %q", args, text)
			}
			if i := strings.IndexFunc(text, func(r rune) bool {
				return r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r <= 0x9f || strings.ContainsRune("\u2028\u2029\u200e\u200f\u061c", r) || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
			}); i >= 0 {
				t.Errorf("%v: steers at %d: %q", args, i, text)
			}
		}
	}
	// What is JSON means what it did.
	if j := decode[status.Job](t, expect(t, 0, nil, b.args("status", "j1", "--json")...)); !strings.Contains(j.Record.AvatarID, "\u202egnp.exe") {
		t.Errorf("got %q", j.Record.AvatarID)
	}
	// A program that asks for a job's own bytes gets them.
	if raw := expect(t, 0, nil, b.args("dlq", "show", "2", "--raw")...); raw != "no JSON "+steering {
		t.Errorf("got %q", raw)
	}
}

func TestCancelDistinguishesRequestedFromFinished(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	expect(t, 0, []string{"requested"}, b.args("cancel", "new", "--if-unknown")...)
	var r lifecycle.Record
	entry, err := b.h.State.Get(t.Context(), "new")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(entry.Value(), &r); err != nil || !r.CancelRequested {
		t.Errorf("%v: %s", err, entry.Value())
	}
	b.record(lifecycle.Record{JobID: "done", Run: 1, State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted})
	expect(t, 1, []string{"finished (completed)"}, b.args("cancel", "done")...)
	reply := decode[control.Reply](t, expect(t, 1, nil, b.args("cancel", "done", "--json")...))
	if reply.Status != "finished" || reply.Outcome != string(lifecycle.StateCompleted) {
		t.Errorf("got %+v", reply)
	}
}

func TestDeadLettersAreListedByFilter(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	b.letter("a1", errors.CodeAvatarNotFound, `{}`, now.Add(-3*time.Hour))
	b.letter("a2", errors.CodeAvatarNotFound, `{}`, now)
	b.letter("s1", errors.CodeServerError, `{}`, now)
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"a1 a2 s1", nil},
		{"s1 a2", []string{"--newest", "--limit", "2"}},
		{"a1 a2 s1", []string{"--limit", "0"}},
		{"a1 a2", []string{"--code", "avatarNotFound"}},
		{"s1", []string{"--class", "server"}},
		{"a1", []string{"--before", "1h"}},
		{"a2 s1", []string{"--after", now.Add(-time.Hour).Format(time.RFC3339)}},
		{"a2", []string{"--job", "a2", "--app", "app"}},
		{"", []string{"--app", "other"}},
	} {
		list := decode[[]dlq.Entry](t, expect(t, 0, nil, b.args(append([]string{"dlq", "ls", "--json"}, tc.args...)...)...))
		var ids []string
		for _, e := range list {
			ids = append(ids, e.JobID)
		}
		if got := strings.Join(ids, " "); got != tc.want {
			t.Errorf("%v: got %q, want %q", tc.args, got, tc.want)
		}
	}
	stdout := expect(t, 0, []string{"SEQ", "avatarNotFound", "refused at"}, b.args("dlq", "ls")...)
	if strings.Contains(stdout, "hush") {
		t.Errorf("a URL's query is shown:\n%s", stdout)
	}
}

func TestALimitOfNoneIsNoneForEveryCommandOfDeadLetters(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const letters = defaultList + 1
	for i := range letters {
		b.letter(fmt.Sprint("j", i), errors.CodeAvatarNotFound, `{}`, time.Now())
	}
	for _, tc := range []struct {
		want int
		args []string
	}{
		{letters, []string{"ls", "--limit", "0"}},
		{letters, []string{"ls", "--all"}},
		{defaultList, []string{"ls"}},
		{letters, []string{"rm", "--dry-run", "--all", "--limit", "0"}},
		{letters, []string{"replay", "--dry-run", "--code", "avatarNotFound", "--limit", "0"}},
		{2, []string{"replay", "--dry-run", "--limit", "2"}},
	} {
		stdout := expect(t, 0, nil, b.args(append(append([]string{"dlq"}, tc.args...), "--json")...)...)
		if list := decode[[]json.RawMessage](t, stdout); len(list) != tc.want {
			t.Errorf("%v: %d letters, want %d", tc.args, len(list), tc.want)
		}
	}
	expect(t, 0, []string{"there are more"}, b.args("dlq", "ls")...)
}

func TestAHoldThatLastsHasItsNextAttemptAhead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	past := time.Now().Add(-time.Hour).UTC()
	b.record(lifecycle.Record{JobID: "h1", Run: 1, State: lifecycle.StateHeld, Queue: "default", NextAttemptAt: &past})
	stdout := expect(t, 0, []string{"checked again within a minute"}, b.args("status", "h1")...)
	if strings.Contains(stdout, past.Format(time.RFC3339)) {
		t.Errorf("the next attempt has passed:\n%s", stdout)
	}
	j := decode[status.Job](t, expect(t, 0, nil, b.args("status", "h1", "--json")...))
	if j.Record == nil || j.Record.NextAttemptAt == nil || !j.Record.NextAttemptAt.Equal(past) {
		t.Errorf("the record is not as it is: %+v", j.Record)
	}
}

func TestDeadLetterIsExplainedAndItsSecretsHidden(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	body := `{"avatar_id":"a","audio":{"url":"https://h/a.wav?sig=hush"},"output":{"livekit":{"url":"wss://lk","api_token":"hush","room_name":"r"}}}`
	b.letter("j1", errors.CodeAvatarNotFound, body, time.Now())
	b.letter("j2", errors.CodeInvalidJob, `{"token":"hush`, time.Now())
	for _, args := range [][]string{{"1"}, {"1", "--json"}, {"--job", "j1"}, {"2"}, {"2", "--json"}} {
		stdout := expect(t, 0, nil, b.args(append([]string{"dlq", "show"}, args...)...)...)
		if strings.Contains(stdout, "hush") {
			t.Errorf("%v: a secret is shown:\n%s", args, stdout)
		}
	}
	expect(t, 0, []string{"There is no avatar", "what to do", "publisher", "avatarworker dlq replay 1", "room_name", "[hidden]"}, b.args("dlq", "show", "1")...)
	if got := expect(t, 0, nil, b.args("dlq", "show", "1", "--raw")...); got != body {
		t.Errorf("raw: %s", got)
	}
	expect(t, 1, []string{"dead letter 99: not found"}, b.args("dlq", "show", "99")...)
	expect(t, 1, []string{"no dead letter"}, b.args("dlq", "show", "--job", "absent")...)
}

func TestReplayRunsEachJobOnceAlsoWhenRepeated(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	past := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	b.letter("a1", errors.CodeAvatarNotFound, `{"avatar_id":"a"}`, time.Now())
	b.letter("a2", errors.CodeAvatarNotFound, `{"avatar_id":"a","deadline":"`+past+`"}`, time.Now())
	b.letter("s1", errors.CodeServerError, `{"avatar_id":"a"}`, time.Now())
	code := []string{"dlq", "replay", "--code", "avatarNotFound"}
	expect(t, 0, []string{"would_replay", "deadline_passed"}, b.args(append(code, "--dry-run")...)...)
	if b.letters() != 3 || b.jobsStored() != 0 {
		t.Fatal("a dry run changed something")
	}
	results := decode[[]changed](t, expect(t, 0, []string{"1 replayed", "1 deadline_passed"}, b.args(append(code, "--json")...)...))
	if len(results) != 2 || results[0].Status != dlq.StatusReplayed || results[0].Run != 2 || results[1].Status != dlq.StatusDeadlinePassed {
		t.Errorf("got %+v", results)
	}
	expect(t, 0, []string{"1 deadline_passed"}, b.args(code...)...)
	if b.jobsStored() != 1 {
		t.Errorf("%d jobs, want 1", b.jobsStored())
	}
	expect(t, 0, []string{"1 replayed"}, b.args(append(code, "--ignore-deadline")...)...)
	expect(t, 1, []string{"dead letter 1: not found", "1 failed"}, b.args("dlq", "replay", "1")...)
	if b.jobsStored() != 2 || b.letters() != 1 {
		t.Errorf("%d jobs, %d letters", b.jobsStored(), b.letters())
	}
}

func TestInterruptedReplayCanBeRepeated(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const all = 300
	for i := range all {
		b.letter(fmt.Sprint("j", i), errors.CodeAvatarNotFound, `{"avatar_id":"a"}`, time.Now())
	}
	c := start(t, "", b.args("dlq", "replay", "--all")...)
	c.out.await(t, "replayed")
	c.interrupt()
	if code := c.wait(); code != 1 || !strings.Contains(c.stderr.String(), "interrupted: repeat") {
		t.Fatalf("exit %d: %s", code, c.stderr)
	}
	if left := b.letters(); left == 0 || b.jobsStored()+left != all {
		t.Errorf("%d jobs and %d letters of %d", b.jobsStored(), left, all)
	}
	expect(t, 0, nil, b.args("dlq", "replay", "--all")...)
	if b.letters() != 0 || b.jobsStored() != all {
		t.Errorf("%d letters, %d jobs, want 0 and %d", b.letters(), b.jobsStored(), all)
	}
}

func TestRemovedLettersAreGone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i := range 3 {
		b.letter(fmt.Sprint("j", i), errors.CodeAvatarNotFound, `{}`, time.Now())
	}
	expect(t, 0, []string{"would_remove"}, b.args("dlq", "rm", "--all", "--dry-run")...)
	expect(t, 0, []string{"2  j1  would_remove"}, b.args("dlq", "rm", "2", "--dry-run")...)
	expect(t, 0, []string{"2  j1  removed", "1 removed"}, b.args("dlq", "rm", "2")...)
	expect(t, 1, []string{"2  -  failed"}, b.args("dlq", "rm", "2")...)
	expect(t, 0, []string{"2 removed"}, b.args("dlq", "rm", "--all", "-y")...)
	if b.letters() != 0 || b.jobsStored() != 0 {
		t.Errorf("%d letters, %d jobs", b.letters(), b.jobsStored())
	}
}

func TestEventsArePrintedByKindJobAndCode(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.event("started", event.Started{JobFields: event.JobFields{JobID: "j1", Run: 1}})
	b.event("error", event.Error{JobID: "j1", Code: errors.CodeInternal, Class: errors.ClassInternal, Message: "a\x1b[31mb"})
	b.event("other", event.Error{JobID: "j2", Code: errors.CodeServerError, Class: errors.ClassServer})
	b.event("alert", event.RecurringAlert{Code: errors.CodeServerError, Count: 5, Window: "1m0s"})
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"started error other alert", nil},
		{"started error other alert", []string{"--since", "1h"}},
		{"error other", []string{"--errors"}},
		{"alert", []string{"--alerts"}},
		{"started", []string{"--jobs"}},
		{"started error", []string{"--job", "j1"}},
		{"other alert", []string{"--code", "serverError"}},
	} {
		stdout := expect(t, 0, nil, b.args(append([]string{"events", "--no-follow", "--json"}, tc.args...)...)...)
		var ids []string
		for line := range strings.Lines(stdout) {
			e := decode[status.Event](t, line)
			if e.Subject == "" || e.Type == "" || e.Time.IsZero() || len(e.Data) == 0 {
				t.Errorf("got %s", line)
			}
			ids = append(ids, e.ID)
		}
		if got := strings.Join(ids, " "); got != tc.want {
			t.Errorf("%v: got %q, want %q", tc.args, got, tc.want)
		}
	}
	stdout := expect(t, 0, []string{"error", "internal (internal)"}, b.args("events", "--no-follow")...)
	if strings.Contains(stdout, "\x1b") || strings.Count(stdout, "\n") != 4 {
		t.Errorf("control characters, or not a line each:\n%q", stdout)
	}
}

func TestEventsAreFollowedUntilInterrupted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.event("before", event.Started{JobFields: event.JobFields{JobID: "j0", Run: 1}})
	c := start(t, "", b.args("events", "--json", "--since", "1h")...)
	c.out.await(t, `"before"`)
	b.event("after", event.Started{JobFields: event.JobFields{JobID: "j1", Run: 1}})
	c.out.await(t, `"after"`)
	c.interrupt()
	if code := c.wait(); code != 0 {
		t.Errorf("exit %d: %s", code, c.stderr)
	}
}

func TestSignalEndsTheContext(t *testing.T) {
	ctx, stop := withSignals(context.Background())
	if ctx.Err() != nil {
		t.Fatal("it has ended before")
	}
	interruptSelf(t)
	select {
	case <-ctx.Done():
	case <-time.After(natstest.Patience):
		t.Fatal("the signal did not end it")
	}
	stop()
}

func TestAJobThatWasCorrectedShowsItsRunsAndTheWayToItsOriginal(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	original := `{"avatar_id":"gone","audio":{"url":"https://h/x.wav?sig=hush"},"output":{"livekit":{"url":"wss://lk","room_name":"r","publisher_id":"p","api_token":"lk-secret"}}}` + "\n"
	b.letter("j1", errors.CodeAvatarNotFound, original, time.Now())
	fields := event.JobFields{JobID: "j1", Run: 1, Queue: "default", Worker: "host", Time: time.Now()}
	b.event("j1.run1.dead_lettered", event.DeadLettered{JobFields: fields, Attempts: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig, Message: "gone"})
	b.record(lifecycle.Record{JobID: "j1", Run: 1, StreamSeq: 1, State: lifecycle.StateDeadLettered, Queue: "default", CreatedAt: time.Now()})
	expect(t, exitFailed, []string{"it was not corrected"}, b.args("dlq", "show", "--original", "j1")...)

	expect(t, exitDone, []string{"run 2 on avatar.jobs.default, corrected"}, b.args("dlq", "replay", "1", "--set", "avatar_id=ok")...)
	b.record(lifecycle.Record{JobID: "j1", Run: 2, StreamSeq: 2, State: lifecycle.StateCompleted, Queue: "default", CreatedAt: time.Now()})
	fields.Run = 2
	b.event("j1.run2.duplicate", event.Duplicate{JobFields: fields, StreamSeq: 9, KeptSeq: 2, CurrentRun: 2})
	b.event("j1.run2.completed", event.NewCompleted(fields, 1, nil, nil, 1, time.Second, ""))
	shown := expect(t, exitDone, nil, b.args("jobs", "show", "j1")...)
	at := 0
	for _, text := range []string{
		"dead_lettered          j1  run 1: avatarNotFound", "corrected              j1  run 2: from dead letter 1; the original: avatarworker dlq show --original j1 --run 2 (sha256:",
		"duplicate              j1  run 2: dropped message 9 of run 2, kept message 2 of run 2", "completed              j1  run 2: ",
	} {
		next := strings.Index(shown[at:], text)
		if next < 0 {
			t.Fatalf("no %q in its place in\n%s", text, shown)
		}
		at += next
	}
	if j := decode[status.Job](t, expect(t, exitDone, nil, b.args("jobs", "show", "j1", "--json")...)); len(j.Replays) != 1 || j.Replays[0].Corrected == "" || j.Replays[0].Run != 2 {
		t.Errorf("%+v", j.Replays)
	}
	if raw := expect(t, exitDone, nil, b.args("dlq", "show", "--original", "j1", "--raw")...); raw != original {
		t.Errorf("the original's bytes: %q", raw)
	}
	for _, args := range [][]string{{"--run", "2"}, {"--json"}} {
		masked := expect(t, exitDone, []string{"[hidden]", `"gone"`}, b.args(append([]string{"dlq", "show", "--original", "j1"}, args...)...)...)
		if strings.Contains(masked, "lk-secret") || strings.Contains(masked, "hush") {
			t.Errorf("a secret is shown:\n%s", masked)
		}
	}
	expect(t, exitFailed, []string{"run 3: it was not corrected"}, b.args("dlq", "show", "--original", "j1", "--run", "3")...)
	expect(t, exitUsage, []string{"--original JOB, or a SEQ"}, b.args("dlq", "show", "1", "--original", "j1")...)
	expect(t, exitUsage, []string{"--run 2"}, b.args("dlq", "show", "--run", "2", "1")...)
}

func TestADeadLetterForAHoldThatLastedTooLongSaysToReplayIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.letter("j1", errors.CodeCreditsExhausted, `{"avatar_id":"a"}`, time.Now())
	b.record(lifecycle.Record{
		JobID: "j1", Run: 1, StreamSeq: 1, State: lifecycle.StateDeadLettered, Queue: "default", CreatedAt: time.Now(), Reason: lifecycle.ReasonHeldTooLong,
		LastError: &event.Error{JobID: "j1", Code: errors.CodeCreditsExhausted, Class: errors.ClassBilling, Message: "used up"},
	})
	for _, args := range [][]string{{"dlq", "show", "1"}, {"dlq", "show", "1", "--json"}, {"jobs", "show", "j1"}} {
		if out := expect(t, exitDone, []string{"Buy credits.", "replay its dead letter"}, b.args(args...)...); strings.Contains(out, "go on by themselves") {
			t.Errorf("%s:\n%s", args, out)
		}
	}
}

func TestAnExpiredJobShowsItsDeadlineAndWhy(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	deadline := time.Date(2026, 3, 1, 13, 2, 31, 0, time.UTC)
	why := &event.Error{JobID: "j1", Code: errors.CodeServerError, Class: errors.ClassServer, Message: "busy; the backend asks to wait 30m0s, until after the deadline 2026-03-01T13:02:31Z"}
	for id, last := range map[string]*event.Error{"j1": why, "j2": nil} {
		b.event(id+".run1.expired", event.Expired{JobFields: event.JobFields{JobID: id, Run: 1, Queue: "default", Time: now}, Code: errors.CodeDeadlineExceeded, Deadline: deadline, LastError: last})
		b.record(lifecycle.Record{JobID: id, Run: 1, StreamSeq: 1, State: lifecycle.StateExpired, Queue: "default", CreatedAt: now, LastError: last})
	}
	expect(t, exitDone, []string{"deadline      2026-03-01T13:02:31Z", ", deadline 2026-03-01T13:02:31Z", "; the last failure was serverError: busy; the backend asks to wait 30m0s"}, b.args("jobs", "show", "j1")...)
	expect(t, exitDone, []string{"deadline  2026-03-01T13:02:31Z"}, b.args("jobs", "show", "j2")...)
}
