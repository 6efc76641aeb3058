package output

import (
	"context"
	"fmt"
	"runtime"
	"testing"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/natsserver/natstest"
)

// kept takes chunks and keeps none: what a server in the same process allocates
// is not the worker's.
type kept struct{}

func (kept) put(context.Context, []byte, nats.Header) (uint64, error) { return 1, nil }

// An utterance is held in memory as one chunk, however long it is.
func TestAnUtteranceTakesNoMoreMemoryTheLongerItIs(t *testing.T) {
	const limit = 256 << 10
	js := natstest.JetStream(t)
	sink := func() *Object {
		o := NewRecordings(js, "R").Sink(Recording{Name: "film", JobID: "job", Run: 1}, 1, 0, nil)
		o.chunks = kept{}
		return o
	}
	frame := make([]byte, 49_868) // 4 s of speech
	write := func(o *Object, frames int) uint64 {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range frames {
			if err := o.Write(t.Context(), Envelope{Utterance: 1, Data: frame}); err != nil {
				t.Fatal(err)
			}
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	for _, frames := range []int{1, 900, 9_000} { // 4 s, an hour, ten hours
		t.Run(fmt.Sprint(frames), func(t *testing.T) {
			o := sink()
			if got := write(o, frames); got > limit {
				t.Errorf("%d frames allocate %d bytes, want at most %d", frames, got, limit)
			}
			if err := o.Finish(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
			if o.chunk != nil {
				t.Error("a buffer is held while nothing is spoken")
			}
		})
	}
}
