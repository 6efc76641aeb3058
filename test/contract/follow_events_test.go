package contract

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

func TestWhoFollowsOnlyTheDocumentCancelsAJob(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("live", "ok-avatar")
	id := f.id(job)
	events := f.listen("tellEvent", id)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Started")
	for range 2 {
		f.control(ctx, "cancel", id, "cancelled")
	}
	f.until(ctx, events, "Cancelled")

	job = f.job("inline", "ok-avatar")
	id = f.id(job)
	f.control(ctx, "cancel", map[string]string{"job_id": "never-published"}, "requested")
	events = f.listen("tellEvent", id)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Completed")
	f.control(ctx, "cancel", id, "tooLate")
}

func TestWhoFollowsOnlyTheDocumentInterruptsAnUtterance(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "hang-avatar") // says nothing, until it is interrupted
	id := f.id(job)
	events := f.listen("tellEvent", id)
	f.control(ctx, "interrupt", id, "notRunning")
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Started")
	request := f.example("obey", "ControlRequest", "interrupt")
	reply := f.send(ctx, "obey", "ControlRequest", id, request)
	for reply.Field("status") == "not_running" {
		reply = f.send(ctx, "obey", "ControlRequest", id, request)
	}
	if reply.Field("status") != "interrupted" {
		t.Errorf("the answer is %s", reply.Body)
	}
	received := f.until(ctx, events, "Completed")
	if got := received[len(received)-1].Field("utterances", "0", "interrupted"); got != "true" {
		t.Errorf("completed says %s", received[len(received)-1].Body)
	}
}

// control sends the example of a request, and wants an answer like that example.
func (f *following) control(ctx context.Context, request string, id map[string]string, want string) {
	f.t.Helper()
	reply := f.send(ctx, "obey", "ControlRequest", id, f.example("obey", "ControlRequest", request))
	example, err := reply.Message.Example(want)
	if err != nil {
		f.t.Fatal(err)
	}
	fields, _ := example.Payload.(map[string]any)
	for name, value := range fields {
		if value == fields["job_id"] {
			value = id["job_id"]
		}
		if got := reply.Field(name); got != fmt.Sprint(value) {
			f.t.Errorf("%s: %s is %q in %s, want %q", request, name, got, reply.Body, value)
		}
	}
}

func TestWhoFollowsOnlyTheDocumentDrainsAWorker(t *testing.T) {
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "ok-avatar")
	events := f.listen("tellEvent", f.id(job))
	f.store(ctx, "takeJob", "Job", nil, job)
	received := f.until(ctx, events, "Completed")
	worker := received[len(received)-1].Field("worker_id")
	token := regexp.MustCompile(`[^A-Za-z0-9_-]`).ReplaceAllStringFunc(worker, func(s string) string { return fmt.Sprintf("=%02X", s) })
	id := map[string]string{"worker_id": token}
	state := f.send(ctx, "report", "StateRequest", id, f.example("report", "StateRequest", "state"))
	if state.Field("worker_id") != worker || state.Field("ready") != "true" {
		t.Errorf("the state is %s", state.Body)
	}
	reply := f.send(ctx, "drain", "DrainRequest", id, f.example("drain", "DrainRequest", "drain"))
	if reply.Field("worker_id") != worker {
		t.Errorf("the answer is %s", reply.Body)
	}
}

func TestWhoFollowsOnlyTheDocumentSeesAJobGivenUp(t *testing.T) {
	t.Parallel()
	for _, message := range []string{"Job", "JobProtobuf"} {
		ctx := limited(t)
		f := follow(ctx, t, true)
		job := f.job("object", "ok-avatar") // and its speech was not uploaded
		id := f.id(job)
		events, failures, letters := f.listen("tellEvent", id), f.listen("tellError", nil), f.listen("giveUp", nil)
		f.store(ctx, "takeJob", message, nil, job)
		received := f.until(ctx, events, "DeadLettered")
		outcome := received[len(received)-1]
		f.until(ctx, failures, "ErrorEvent")
		letter := f.until(ctx, letters, "DeadLetter")[0]
		if outcome.Field("dead_letter") != letter.Subject {
			t.Errorf("the dead letter is on %s, the event says %s", letter.Subject, outcome.Body)
		}
		if got, err := letter.Message.ID(letter.Headers, nil); err != nil || got != id["job_id"] {
			t.Errorf("the dead letter is of job %q: %v", got, err)
		}
	}
}

func TestWhoFollowsOnlyTheDocumentSeesAnAppWait(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "fail-creditsExhausted")
	events, alerts := f.listen("tellEvent", f.id(job)), f.listen("alert", nil)
	f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Held")
	f.until(ctx, alerts, "CircuitOpened")
}

func TestWhoFollowsOnlyTheDocumentLearnsOfADuplicate(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("object", "ok-avatar")
	f.upload(ctx, job)
	first, again := f.store(ctx, "takeJob", "Job", nil, job), f.store(ctx, "takeJob", "Job", nil, job)
	if again.Field("duplicate") != "true" || again.Field("seq") != first.Field("seq") {
		t.Errorf("acknowledged with %s, then %s", first.Body, again.Body)
	}
	job = f.job("inline", "ok-avatar")
	events := f.listen("tellEvent", f.id(job))
	first = f.store(ctx, "takeJob", "Job", nil, job)
	f.until(ctx, events, "Completed") // of two that wait, either counts
	again = f.store(ctx, "takeJob", "Job", nil, job)
	received := f.until(ctx, events, "Duplicate")
	duplicate := received[len(received)-1]
	if duplicate.Field("stream_seq") != again.Field("seq") || duplicate.Field("kept_seq") != first.Field("seq") {
		t.Errorf("duplicate says %s, the acknowledgements %s and %s", duplicate.Body, first.Body, again.Body)
	}
}

func TestAJobThatIsTooLargeIsRefusedAsTheDocumentSays(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, true)
	job := f.job("inline", "ok-avatar")
	job.Payload = replaced(job.Payload, strings.NewReplacer("AAABAAIAAwA=", strings.Repeat("AAAA", int(f.MaxPayload()-48<<10)/4)))
	answer := f.send(ctx, "takeJob", "Job", nil, job)
	if answer.Message.Name != "NotStored" {
		t.Errorf("the answer is %s", answer.Body)
	}
}

func TestWithoutAWorkerThereIsNoAnswerAsTheDocumentSays(t *testing.T) {
	t.Parallel()
	ctx := limited(t)
	f := follow(ctx, t, false)
	job := f.job("inline", "ok-avatar")
	for operation, m := range map[string]string{"takeJob": "Job", "obey": "ControlRequest"} {
		e := job
		if operation == "obey" {
			e = f.example(operation, m, "cancel")
		}
		_, err := f.Send(ctx, f.operation(operation), f.id(job), f.message(operation, m), e.Headers, e.Payload)
		if err == nil || !strings.Contains(err.Error(), "no responders") {
			t.Errorf("%s: %v, want no responders", operation, err)
		}
	}
}
