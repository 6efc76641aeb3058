package lifecycle

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
)

func TestTheRecordKeepsHowFarTheRecordingIsStoredAsLongAsItsUtterancesCount(t *testing.T) {
	r := &Record{JobID: "j", Run: 1, StreamSeq: 1}
	r.Delivered(event.Utterance{Recorded: &event.Recorded{Utterances: 1, Size: 5, Chunks: 1, LastSeq: 7, Session: 1, Digest: []byte{1, 2}}}, true)
	stored := &event.Recorded{Utterances: 2, Size: 9, Chunks: 2, LastSeq: 8, Session: 1, Digest: []byte{3}}
	r.Delivered(event.Utterance{Recorded: stored}, true)
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var read Record
	if err := json.Unmarshal(data, &read); err != nil || !reflect.DeepEqual(read.Recorded, stored) {
		t.Errorf("read back %+v: %v", read.Recorded, err)
	}
	for resume, want := range map[string]*event.Recorded{jobspec.OnRedeliveryResume: stored, jobspec.OnRedeliveryRestart: nil} {
		job := &jobspec.Job{Job: &jobpb.Job{OnRedelivery: resume}, ID: "j", Run: 1}
		if got := Start(&read, job, "w", Defaults{MaxAttempts: 1}, time.Now()); !reflect.DeepEqual(got.Recorded, want) || (want == nil) != (got.Checkpoint == 0) {
			t.Errorf("%s: %+v at %d", resume, got.Recorded, got.Checkpoint)
		}
	}
	if ContinueFrom(&read, jobspec.Identity{ID: "j", Run: 2, StreamSeq: 2}, false, time.Now()) != nil {
		t.Error("a replay goes on with the recording of the run before")
	}
}
