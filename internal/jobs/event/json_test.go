package event

import (
	"math/rand/v2"
	"testing"

	"avatarworker/internal/jsontext"
	"avatarworker/internal/jsontext/jsontest"
)

func compareBodies(t *testing.T, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	var started Started
	jsontest.Fill(r, &started)
	jsontest.Compare(t, started, jsontext.EscapeNone)
	var completed Completed
	jsontest.Fill(r, &completed)
	jsontest.Compare(t, completed, jsontext.EscapeNone)
}

func TestBodiesAreWrittenAsByEncodingJSON(t *testing.T) {
	jsontest.Compare(t, Started{}, jsontext.EscapeNone)
	jsontest.Compare(t, Completed{}, jsontext.EscapeNone)
	jsontest.Compare(t, NewCompleted(JobFields{}, 0, nil, nil, 0, 0, ""), jsontext.EscapeNone)
	for seed := range uint64(2000) {
		compareBodies(t, seed)
	}
}

func FuzzBodyAppendJSON(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(compareBodies)
}
