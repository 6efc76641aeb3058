package status

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// Presence and circuits are written by every version of the worker, and by
// all who may write to the bucket.
func FuzzFleetEntryIsReadOrLeftOut(f *testing.F) {
	f.Add("worker.w-1", []byte(`{"worker_id":"w-1","worker":"w","queues":["default"],"running":1,"at":"2026-01-01T00:00:00Z"}`))
	f.Add("circuit.app.us-west", []byte(`{"app_id":"app","region":"us-west","state":"open","cooldown":10000000000}`))
	f.Add("worker.", []byte(`null`))
	f.Fuzz(func(t *testing.T, key string, data []byte) {
		fleet := Fleet{At: time.Unix(1_800_000_000, 0)}
		fleet.learn(key, data, time.Unix(1_800_000_000, 0))
		if len(fleet.Workers)+len(fleet.Circuits) > 1 {
			t.Fatalf("%+v", fleet)
		}
	})
}

// The quick way to read a record gives what encoding/json gives, or nothing.
func FuzzScannedRowIsWhatJSONDecodes(f *testing.F) {
	at := time.Date(2026, 11, 28, 12, 0, 0, 5, time.UTC)
	for _, r := range []lifecycle.Record{
		{JobID: "j", Run: 2, StreamSeq: 3, State: lifecycle.StateRetrying, Queue: "q", NextAttemptAt: &at, LastError: &event.Error{Code: errors.CodeServerError, Labels: map[string]string{"a": "b"}}},
		{JobID: "j", StreamSeq: 3, State: lifecycle.StateRunning, StartedAt: at, CreatedAt: at, Labels: map[string]string{"customer": "c<1>", "": "é"}, SessionTime: time.Hour},
	} {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, text := range []string{
		`{"job_id":"a","job_id":"b"}`, `{"Job_id":"a"}`, `{"run":1e2}`, `{"run":-0}`, `{"labels":null,"last_error":null}`, `{"last_error":{"code":"a","code":"b"}}`,
		`{"x":[1,2.5e-3,{"y":[]},"\u00e9\\"],"run":7}  `, `{"run":01}`, `{"x":tru}`, `{} {}`, `{"labels":{"a":"b","a":"c","A":"d"}}`, `{"created_at":"2026-13-01T00:00:00Z"}`, `{"x":"a` + "\n" + `"}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var scanned, decoded recordRow
		if !scanRow(data, &scanned) {
			return
		}
		if err := json.Unmarshal(data, &decoded); err != nil || !reflect.DeepEqual(scanned, decoded) {
			t.Fatalf("%q\nscanned %+v\ndecoded %+v\n%v", data, scanned, decoded, err)
		}
	})
}

func FuzzRecordIsCountedOnceOrNot(f *testing.F) {
	f.Add([]byte(`{"job_id":"j","queue":"default","state":"running","stream_seq":1}`))
	f.Add([]byte(`{"queue":"default","state":"held","stream_seq":-1}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		q := &Queue{Name: "default"}
		counted := (&tally{queues: map[string]*Queue{"default": q}}).count(data)
		if n := q.Running + q.Retrying + q.Held + q.Released; counted != (n == 1) || n > 1 {
			t.Fatalf("counted %v: %+v", counted, *q)
		}
		var r lifecycle.Record
		if json.Unmarshal(data, &r) == nil {
			_ = r.State.Final()
		}
	})
}
