package jobspec

import (
	"bytes"
	"encoding/base64"
	"testing"
)

// A job with 15 s of speech in it, as large as a message may be.
func largeJob() []byte {
	speech := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1, 2, 3, 4}, 120_000))
	return []byte(`{"avatar_id":"a","audio":{"inline":"` + speech + `","format":"pcm_s16le","sample_rate":16000},"id":"J"}`)
}

func BenchmarkDecodeLargeJob(b *testing.B) {
	data := largeJob()
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Decode(nil, data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeSmallJob(b *testing.B) {
	data := []byte(`{"id":"J","avatar_id":"a","audio":{"object":"o"},"labels":{"tier":"gold"}}`)
	for b.Loop() {
		if _, err := Decode(nil, data); err != nil {
			b.Fatal(err)
		}
	}
}
