package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

func FuzzControlRequestIsAnswered(f *testing.F) {
	for _, request := range []string{
		`{"op":"cancel"}`, `{"op":"interrupt"}`, `{"op":"stop"}`, `{"op":7}`, `{"op":null,"op":{}}`, ``, `null`, `[[[[`, "\xff\x00",
	} {
		f.Add([]byte(request), false)
		f.Add([]byte(request), true)
	}
	fleet := newFleet(f, nil)
	fleet.worker(worker{log: io.Discard})
	fleet.publish("runs", "hang", nil)
	fleet.state("runs", func(r lifecycle.Record) bool { return r.State == lifecycle.StateRunning })
	known := []string{
		control.StatusCancelled, control.StatusRequested, control.StatusFinished, control.StatusInterrupted, control.StatusNotRunning, control.StatusRefused,
	}
	f.Fuzz(func(t *testing.T, request []byte, runs bool) {
		job := "unknown"
		if runs {
			job = "runs"
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		msg, err := fleet.nc.RequestWithContext(ctx, fleet.names.Control(job), request)
		if err != nil {
			t.Fatal(err)
		}
		var reply control.Reply
		if err := json.Unmarshal(msg.Data, &reply); err != nil || len(msg.Data) > 1024 || reply.JobID != job || !slices.Contains(known, reply.Status) {
			t.Fatalf("answered %s, %v", msg.Data, err)
		}
		var wish struct {
			Op string `json:"op"`
		}
		if json.Unmarshal(request, &wish) != nil && reply.Status != control.StatusRefused {
			t.Fatalf("%q was answered %s", request, msg.Data)
		}
	})
}

// All who may write to the bucket of records can write anything: the worker
// outlives it, and other jobs go on.
func FuzzRecordThatIsNotOursStopsNoWorker(f *testing.F) {
	for _, record := range []string{
		`{"job_id":"j","run":1,"state":"running","stream_seq":1,"worker_id":"w"}`,
		`{"run":-1,"state":"retrying","attempt":-5,"max_attempts":-1,"next_attempt_at":"9999-12-31T23:59:59Z"}`,
		`{"state":"completed","utterances":[null,{}],"checkpoint":-9223372036854775808,"session":2147483647}`,
		`{"state":"held","held_since":"0001-01-01T00:00:00Z","last_error":{"code":"?"},"labels":{"a":"b"}}`,
		`{"state":{}}`, `null`, `[[[[`, ``, "\xff",
	} {
		f.Add([]byte(record))
	}
	fleet := newFleet(f, nil)
	fleet.worker(worker{log: io.Discard})
	kv, err := fleet.js.KeyValue(fleet.ctx, fleet.names.StateBucket())
	if err != nil {
		f.Fatal(err)
	}
	store := status.NewStore(fleet.js, fleet.names, time.Now, time.Second)
	n := 0
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) > 64<<10 || bytes.Contains(record, []byte("cancel_requested")) {
			return
		}
		fleet.t = t
		n++
		strange, good := fmt.Sprintf("strange-%d-%d", n, time.Now().UnixNano()), fmt.Sprintf("good-%d-%d", n, time.Now().UnixNano())
		if _, err := kv.Put(fleet.ctx, strange, record); err != nil {
			t.Fatal(err)
		}
		fleet.publish(strange, "ok", nil)
		fleet.publish(good, "ok", nil)
		if r := fleet.outcome(good); r.State != lifecycle.StateCompleted {
			t.Fatalf("another job ended %s", r.State)
		}
		// An error says that it can't be read.
		_, _ = store.Job(fleet.ctx, strange)
		// Without it the job is a new one: nothing piles up.
		if err := kv.Purge(fleet.ctx, strange); err != nil {
			t.Fatal(err)
		}
	})
}
