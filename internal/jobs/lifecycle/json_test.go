package lifecycle

import (
	"math/rand/v2"
	"testing"

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
