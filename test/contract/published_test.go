package contract

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
	"avatarworker/internal/topology"
)

// stored reads everything that a stream holds.
func stored(ctx context.Context, t *testing.T, stream jetstream.Stream) []Message {
	t.Helper()
	info, err := stream.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var messages []Message
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		raw, err := stream.GetMsg(ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		messages = append(messages, Message{Subject: raw.Subject, Header: raw.Header, Data: raw.Data})
	}
	return messages
}

func TestDeadLettersAreAsTheSchemasSay(t *testing.T) {
	ctx, js, handles := ready(t)
	w := dlq.NewWriter(js, topology.Names{})
	failed := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	event := event.Error{
		JobID: "J", Queue: "default", Worker: "w", WorkerID: "w.1", Run: 1, Code: errors.CodeAvatarNotFound, Class: errors.ClassConfig,
		Phase: errors.PhaseConnect, Message: "Avatar not found", HTTPStatus: 404, Action: errors.ActionDeadLetter, Time: failed,
	}
	letter := lifecycle.DeadLetter{
		Job:    jobspec.Identity{ID: "J", Run: 1, Queue: "default", Subject: "avatar.jobs.default", StreamSeq: 7},
		Header: map[string][]string{nats.MsgIdHdr: {"mine"}, "Nats-TTL": {"1h"}, "X-Tenant": {"a"}},
		Data:   []byte(speak(``)), Reason: lifecycle.ReasonPermanent, Error: event, Attempts: 1, FailedAt: failed, Worker: "w",
	}
	wordy := letter
	wordy.Job.ID = "K"
	wordy.Error.JobID, wordy.Error.Message = "K", strings.Repeat("long ", 2000)
	huge := letter
	huge.Job.ID, huge.Error.JobID = "L", "L"
	huge.Data = []byte(strings.Repeat("x", 1<<20))
	for _, l := range []lifecycle.DeadLetter{letter, wordy, huge} {
		if err := w.Write(ctx, l); err != nil {
			t.Fatal(err)
		}
	}
	letters := stored(ctx, t, handles.DLQ)
	if len(letters) != 3 {
		t.Fatalf("%d dead letters, want 3", len(letters))
	}
	if err := validator(t).CheckAll(letters); err != nil {
		t.Error(err)
	}
	moved := letters[0]
	moved.Subject = "avatar.dlq.auth.avatarNotFound"
	if validator(t).Check(moved) == nil {
		t.Error("a dead letter under another class is not found")
	}
}

func TestFramesAreAsTheSchemasSay(t *testing.T) {
	ctx, js, handles := ready(t)
	names := topology.Names{}
	frames := output.NewFrames(js, names.Frames("J"), output.SessionID{JobID: "J", Run: 1, Session: 2, Attempt: 1})
	for _, end := range []bool{false, true} {
		if err := frames.Write(ctx, output.Envelope{Utterance: 1, ReqID: "r", End: end, Data: []byte{1}}); err != nil {
			t.Fatal(err)
		}
	}
	got := stored(ctx, t, handles.Frames)
	if len(got) != 2 {
		t.Fatalf("%d frames, want 2", len(got))
	}
	if err := validator(t).CheckAll(got); err != nil {
		t.Error(err)
	}
}

func TestUsageRecordsAreAsTheSchemasSay(t *testing.T) {
	ctx, js, handles := ready(t)
	ledger := usage.NewLedger(usage.Options{
		JS: js, Names: topology.Names{}, Tariff: usage.Tariff{Minimum: 1}, Window: topology.UsageDuplicates, Now: time.Now,
	})
	r := lifecycle.Record{
		JobID: "J", Run: 1, Session: 1, Attempt: 1, AppID: "my.app", Queue: "default", AvatarID: "ok", WorkerID: "w.1",
		StartedAt: time.Now(), State: lifecycle.StateRunning,
	}
	lost := r.Clone()
	lost.Lost(time.Now().Add(time.Minute))
	estimate := lost.UsageOf(lost.Usage[0], ledger.Credits)
	r.Connected("c", "us-west", time.Now())
	r.Closed(time.Second, usage.CodeReleased)
	if _, err := ledger.Store(ctx, estimate); err != nil {
		t.Fatal(err)
	}
	if err := ledger.Correct(ctx, estimate, r.UsageOf(r.Usage[0], ledger.Credits)); err != nil {
		t.Fatal(err)
	}
	got := stored(ctx, t, handles.Usage)
	if len(got) != 2 {
		t.Fatalf("%d usage records, want 2", len(got))
	}
	if err := validator(t).CheckAll(got); err != nil {
		t.Error(err)
	}
	moved := got[0]
	moved.Subject = "avatar.usage.other.default"
	if validator(t).Check(moved) == nil {
		t.Error("a usage record under another app is not found")
	}
}

func TestControlRepliesAreAsTheSchemaSays(t *testing.T) {
	v := validator(t)
	for _, reply := range []control.Reply{
		{JobID: "J", Status: control.StatusCancelled},
		{JobID: "J", Status: control.StatusRequested},
		{JobID: "J", Status: control.StatusFinished, Outcome: string(lifecycle.StateCompleted)},
		{JobID: "J", Status: control.StatusInterrupted, ReqID: "r", LastSeq: 3},
		{JobID: "J", Status: control.StatusNotRunning, State: string(lifecycle.StateHeld), Message: "no session of this job is open"},
		{JobID: "J", Status: control.StatusRefused, Message: "want an op"},
	} {
		data, err := json.Marshal(reply)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.body("control_reply.schema.json", data); err != nil {
			t.Errorf("%s: %v", data, err)
		}
	}
	for _, op := range []string{"cancel", "interrupt"} {
		data, err := json.Marshal(control.Request{Op: op})
		if err != nil {
			t.Fatal(err)
		}
		if err := v.body("control_request.schema.json", data); err != nil {
			t.Errorf("%s: %v", data, err)
		}
	}
}

// ready is a server with everything that a worker makes.
func ready(t *testing.T) (context.Context, jetstream.JetStream, topology.Handles) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), natstest.Patience)
	t.Cleanup(cancel)
	js := natstest.JetStream(t)
	handles, _, err := topology.Ensure(ctx, js, topology.Names{}, topology.DefaultSettings())
	if err != nil {
		t.Fatal(err)
	}
	return ctx, js, handles
}
