package lifecycle

import (
	"math/rand/v2"
	"testing"
	"time"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jsontext"
	"avatarworker/internal/jsontext/jsontest"
)

func compareRecord(t *testing.T, seed uint64) {
	t.Helper()
	var record Record
	jsontest.Fill(rand.New(rand.NewPCG(seed, 1)), &record)
	jsontest.Compare(t, &record, jsontext.EscapeHTML)
}

// A field that AppendJSON leaves out would be lost in every record.
func TestARecordIsWrittenAsByEncodingJSON(t *testing.T) {
	jsontest.Compare(t, &Record{}, jsontext.EscapeHTML)
	for seed := range uint64(3000) {
		compareRecord(t, seed)
	}
}

func FuzzRecordAppendJSON(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(compareRecord)
}

// A live job writes its record twice for each utterance, with up to 256 of them.
func TestARecordOfManyUtterancesTakesFewAllocations(t *testing.T) {
	r := &Record{JobID: "J", CreatedAt: time.Now(), UpdatedAt: time.Now()}
	for range event.MaxUtterances {
		r.Delivered(event.Utterance{ReqID: "20260101120000_abcdefghijkl", Frames: 2, Bytes: 4096}, true)
	}
	b, err := r.AppendJSON(nil)
	if err != nil {
		t.Fatal(err)
	}
	allocs := testing.AllocsPerRun(10, func() {
		next := r.Clone()
		next.Delivered(event.Utterance{ReqID: "20260101120000_abcdefghijkl", Frames: 2, Bytes: 4096}, true)
		if b, err = next.AppendJSON(b[:0]); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 6 {
		t.Errorf("%v allocations for a clone, an utterance and its JSON", allocs)
	}
}

func TestAnUtteranceIsAddedToOneCloneOnly(t *testing.T) {
	r := &Record{}
	r.Delivered(event.Utterance{ReqID: "1"}, true)
	first, second := r.Clone(), r.Clone()
	first.Delivered(event.Utterance{ReqID: "2"}, true)
	second.Delivered(event.Utterance{ReqID: "3"}, true)
	for want, u := range map[string][]event.Utterance{"1": r.Utterances, "2": first.Utterances, "3": second.Utterances} {
		if got := u[len(u)-1].ReqID; got != want {
			t.Errorf("the last utterance is %s, want %s", got, want)
		}
	}
}
