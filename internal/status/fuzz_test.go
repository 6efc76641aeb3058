package status

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/lifecycle"
)

// entryOf is an entry of a bucket.
type entryOf struct {
	jetstream.KeyValueEntry
	key  string
	data []byte
}

func (s entryOf) Key() string        { return s.key }
func (s entryOf) Value() []byte      { return s.data }
func (s entryOf) Created() time.Time { return time.Unix(1_800_000_000, 0) }

// Presence and circuits are written by every version of the worker, and by
// all who may write to the bucket.
func FuzzFleetEntryIsReadOrLeftOut(f *testing.F) {
	f.Add("worker.w-1", []byte(`{"worker_id":"w-1","worker":"w","queues":["default"],"running":1,"at":"2026-01-01T00:00:00Z"}`))
	f.Add("circuit.app.us-west", []byte(`{"app_id":"app","region":"us-west","state":"open","cooldown":10000000000}`))
	f.Add("worker.", []byte(`null`))
	f.Fuzz(func(t *testing.T, key string, data []byte) {
		fleet := Fleet{At: time.Unix(1_800_000_000, 0)}
		fleet.learn(entryOf{key: key, data: data})
		if len(fleet.Workers)+len(fleet.Circuits) > 1 {
			t.Fatalf("%+v", fleet)
		}
	})
}

func FuzzRecordIsCountedOnceOrNot(f *testing.F) {
	f.Add([]byte(`{"job_id":"j","queue":"default","state":"running","stream_seq":1}`))
	f.Add([]byte(`{"queue":"default","state":"held","stream_seq":-1}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		q := &Queue{Name: "default"}
		counted := count(map[string]*Queue{"default": q}, data)
		if n := q.Running + q.Retrying + q.Held + q.Released; counted != (n == 1) || n > 1 {
			t.Fatalf("counted %v: %+v", counted, *q)
		}
		var r lifecycle.Record
		if json.Unmarshal(data, &r) == nil {
			_ = r.State.Final()
		}
	})
}
