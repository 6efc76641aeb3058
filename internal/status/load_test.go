package status_test

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

// loadOf says how much a load test writes.
type loadOf struct{ records, waiting, letters, failures int }

var (
	fullLoad  = loadOf{records: 100_000, waiting: 20_000, letters: 10_000, failures: 10_000}
	shortLoad = loadOf{records: 3_000, waiting: 600, letters: 300, failures: 300}
)

// chosenLoad is the short load, unless AVATAR_LONG asks for the full one.
func chosenLoad() (load loadOf, full bool) {
	if os.Getenv("AVATAR_LONG") != "" {
		return fullLoad, true
	}
	return shortLoad, false
}

// fill writes the load, as a week of a fleet leaves it: nearly all of the jobs with a
// record have ended.
func fill(t testing.TB, js jetstream.JetStream, load loadOf) {
	t.Helper()
	async, err := jetstream.New(js.Conn(), jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		t.Fatal(err)
	}
	publish := func(subject string, header nats.Header, body []byte) {
		if _, err := async.PublishMsgAsync(&nats.Msg{Subject: subject, Header: header, Data: body}, jetstream.WithStallWait(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now().UTC()
	for i := range load.records {
		r := loadedRecord(i, load.records, begin)
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		publish("$KV."+names.StateBucket()+"."+r.JobID, nil, data)
	}
	for i := range load.waiting {
		body := fmt.Appendf(nil, `{"app_id":"app-%d","avatar_id":"avatar-%d","audio":{"url":"https://h/%d.wav"},"labels":{"customer":"c%d"}}`, i%5, i%40, i, i%200)
		publish(names.Jobs([]string{"default", "vip"}[i%2]), nats.Header{"Avatar-Job-Id": {"w" + strconv.Itoa(i)}}, body)
	}
	failures := []errors.Code{errors.CodeServerError, errors.CodeAvatarNotFound, errors.CodeConnectionClosed}
	for i := range load.letters {
		code := failures[i%len(failures)]
		class := string(code.Class())
		publish(names.DLQ(class, string(code)), nats.Header{
			"Avatar-Job-Id": {"dead" + strconv.Itoa(i)}, "Avatar-Run": {"1"}, "Avatar-Error-Code": {string(code)}, "Avatar-Error-Class": {class},
			"Avatar-Subject": {names.Jobs("default")}, "Avatar-Queue": {"default"},
		}, []byte(`{"avatar_id":"x"}`))
	}
	for i := range load.failures {
		code := failures[i%len(failures)]
		body, err := json.Marshal(loadedError(i, code, begin))
		if err != nil {
			t.Fatal(err)
		}
		publish(names.Errors(string(code.Class()), string(code)), nats.Header{"ce-subject": {"j" + strconv.Itoa(i)}}, body)
	}
	select {
	case <-async.PublishAsyncComplete():
	case <-time.After(2 * time.Minute):
		t.Fatal("the load is not stored")
	}
}

func loadedError(i int, code errors.Code, begin time.Time) event.Error {
	return event.Error{
		JobID: "j" + strconv.Itoa(i), Run: 1, Queue: "default", AppID: "app-" + strconv.Itoa(i%5), AvatarID: "avatar-" + strconv.Itoa(i%40), Region: "us-west",
		Worker: "worker-7c9d", Attempt: 2, MaxAttempts: 5, Code: code, Class: code.Class(), Phase: errors.PhaseRuntime,
		Message: "the backend ended the session: Internal server error. Please try again later.", ServerTitle: "Internal error", ConnectionID: "0a1b2c3d-4e5f-6071-8293-" + strconv.Itoa(i),
		Time: begin,
	}
}

func loadedRecord(i, of int, begin time.Time) lifecycle.Record {
	id := "j" + strconv.Itoa(i)
	published := begin.Add(-time.Duration(of-i) * 5 * time.Second)
	r := lifecycle.Record{
		JobID: id, Run: 1, StreamSeq: uint64(i + 1), Session: 1, State: lifecycle.StateCompleted, Outcome: lifecycle.StateCompleted,
		Queue: []string{"default", "vip", "bulk"}[i%3], AppID: "app-" + strconv.Itoa(i%5), AvatarID: "avatar-" + strconv.Itoa(i%40), Region: "us-west",
		Attempt: 1, MaxAttempts: 5, WorkerID: "worker-7c9d-" + strconv.Itoa(i/1000), CreatedAt: published.Add(time.Second), UpdatedAt: published.Add(time.Minute),
		StartedAt: published.Add(time.Second), PublishedAt: published, ConnectionID: "0a1b2c3d-4e5f-6071-8293-" + id, ConnectionIDs: []string{"0a1b2c3d-4e5f-6071-8293-" + id},
		SessionTime: time.Duration(i%90) * time.Second, Labels: map[string]string{"customer": "c" + strconv.Itoa(i%200), "order": strconv.Itoa(i)},
		Utterances: []event.Utterance{{ReqID: "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9", Frames: 12, Bytes: 160_000, AudioMS: 12_000, FirstFrameMS: 420, DurationMS: 13_000}},
	}
	switch {
	case i%50 == 7:
		failed := loadedError(i, errors.CodeAvatarNotFound, r.UpdatedAt)
		r.State, r.Outcome, r.LastError, r.Reason = lifecycle.StateDeadLettered, lifecycle.StateDeadLettered, &failed, lifecycle.ReasonPermanent
	case i%100 == 9:
		failed, next := loadedError(i, errors.CodeServerError, r.UpdatedAt), begin.Add(time.Minute)
		r.State, r.Outcome, r.LastError, r.NextAttemptAt = lifecycle.StateRetrying, "", &failed, &next
	case i%100 == 11:
		r.State, r.Outcome = lifecycle.StateRunning, ""
	}
	return r
}

// What an operator asks for under load. With AVATAR_LONG it is 100,000 records, 20,000
// jobs that wait and 10,000 dead letters, and the answers have to come in time; without,
// a Model and a Store have to say the same.
func TestListsOfManyJobs(t *testing.T) {
	t.Parallel()
	load, full := chosenLoad()
	js, h := setup(t)
	begun := time.Now()
	fill(t, js, load)
	handBack(t, h, load.waiting/2) // all of one queue wait for a session limit
	t.Logf("the load was written in %s", time.Since(begun))
	store := status.NewStore(js, names, nil, time.Minute)
	before := heap()
	begun = time.Now()
	m := follow(t, js, names, time.Hour)
	refresh(t, m)
	loaded, memory := time.Since(begun), heap()-before
	t.Logf("the model was loaded in %s and takes %.1f MiB", loaded, float64(memory)/(1<<20))
	if full && memory > 100<<20 {
		t.Errorf("it takes %d MiB", memory>>20)
	}
	timed := func(what string, most time.Duration, f func() error) {
		t.Helper()
		begun := time.Now()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		took := time.Since(begun)
		t.Logf("%s: %s", what, took)
		if full && took > most {
			t.Errorf("%s took %s, more than %s", what, took, most)
		}
	}
	for name, q := range map[string]status.Query{
		"newest of a queue":   {Filter: status.Filter{Queues: []string{"default"}}, Limit: 50},
		"dead-lettered":       {Filter: status.Filter{States: []lifecycle.State{lifecycle.StateDeadLettered}}, Limit: 50},
		"all of an app":       {Filter: status.Filter{Apps: []string{"app-1"}}},
		"one by label":        {Filter: status.Filter{Labels: map[string]string{"order": "17"}}, Limit: 50},
		"longest running":     {Filter: status.Filter{States: []lifecycle.State{lifecycle.StateRunning}}, Order: status.ByRunning, Limit: 50},
		"most connected time": {Filter: status.Filter{Queues: []string{"vip"}}, Order: status.ByCost, Limit: 50},
		"waiting":             {Filter: status.Filter{States: []lifecycle.State{status.StateWaiting}, Labels: map[string]string{"customer": "c7"}}},
	} {
		var fromStore, fromModel status.List
		timed(name+" from the store", 2*time.Second, func() (err error) {
			fromStore, err = store.Jobs(t.Context(), q)
			return err
		})
		timed(name+" from the model", 300*time.Millisecond, func() (err error) {
			fromModel, err = m.Jobs(t.Context(), q)
			return err
		})
		if len(fromStore.Rows) == 0 || ids(fromStore.Rows) != ids(fromModel.Rows) || fromStore.More != fromModel.More {
			t.Errorf("%s: %d jobs from the store, %d from the model", name, len(fromStore.Rows), len(fromModel.Rows))
		}
	}
	timed("the overview from the store", 2*time.Second, func() error {
		f, err := store.Fleet(t.Context())
		if err == nil && f.Queues[0].Open() != uint64(load.waiting/2) {
			t.Errorf("%+v", f.Queues)
		}
		return err
	})
	timed("a look without a change", 300*time.Millisecond, func() error { return m.Refresh(t.Context()) })
	timed("the overview", 300*time.Millisecond, func() error {
		f, err := m.Fleet(t.Context())
		if err != nil {
			return err
		}
		if len(f.Queues) != 2 || f.Queues[0].Open() != uint64(load.waiting/2) || len(f.DeadLetters) != 3 {
			t.Errorf("%+v", f)
		}
		failures, err := m.Failures(t.Context())
		if err != nil || len(failures.Codes) != 3 || failures.Codes[0].Total+failures.Codes[1].Total+failures.Codes[2].Total != load.failures {
			t.Errorf("%+v, %v", failures, err)
		}
		return err
	})
}

// heap is the memory of all objects that are in use.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
