package usage_test

import (
	"math/rand/v2"
	"testing"

	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/jsontext"
	"avatarworker/internal/jsontext/jsontest"
)

func compare(t *testing.T, seed uint64) {
	t.Helper()
	var record usage.Record
	jsontest.Fill(rand.New(rand.NewPCG(seed, 1)), &record)
	jsontest.Compare(t, record, jsontext.EscapeHTML)
}

// A field that AppendJSON leaves out would be lost in every record. The sessions of
// a job's record are compared with that record.
func TestUsageIsWrittenAsByEncodingJSON(t *testing.T) {
	jsontest.Compare(t, usage.Record{}, jsontext.EscapeHTML)
	for seed := range uint64(3000) {
		compare(t, seed)
	}
}

func FuzzUsageAppendJSON(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(compare)
}
