package output_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
)

func TestMain(m *testing.M) { natstest.Main(m) }

type bench struct {
	t     *testing.T
	ctx   context.Context
	js    jetstream.JetStream
	store jetstream.ObjectStore
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, js: natstest.JetStream(t)}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	b.ctx = ctx
	store, err := b.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "R", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	b.store = store
	return b
}

func (b *bench) recordings() *output.Recordings { return output.NewRecordings(b.js, "R") }

func (b *bench) recording(name string) string {
	b.t.Helper()
	data, err := b.store.GetBytes(b.ctx, name)
	if err != nil {
		b.t.Fatalf("%s: %v", name, err)
	}
	return string(data)
}

func TestAStoreThatIsAwayIsWaitedForNoLongerThanTheSessionLives(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if err := b.js.DeleteObjectStore(b.ctx, "R"); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("the lease is lost")
	ctx, cancel := context.WithCancelCause(b.ctx)
	o := b.recordings().Sink(film(1), 1, 0, nil)
	if err := o.Write(ctx, output.Envelope{Utterance: 1, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- o.Finish(ctx, 1) }()
	cancel(gone)
	if err := <-ended; err == nil {
		t.Error("stored in a bucket that is gone")
	}

	frames := output.NewFrames(b.js, "nobody.listens", output.SessionID{JobID: "job", Run: 1, Session: 1})
	ctx, cancel = context.WithCancelCause(b.ctx)
	go func() { ended <- frames.Write(ctx, output.Envelope{Utterance: 1, Data: []byte("x")}) }()
	cancel(gone)
	if err := <-ended; !errors.Is(err, gone) || frames.LastSeq() != 0 {
		t.Errorf("%v, last seq %d", err, frames.LastSeq())
	}
}

func TestAFrameIsPublishedOnceHoweverOftenItIsTried(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stream, err := b.js.CreateStream(b.ctx, jetstream.StreamConfig{Name: "F", Subjects: []string{"f.*"}, Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	id := output.SessionID{JobID: "job", Run: 2, Session: 3, Attempt: 4}
	for range 2 { // as after an acknowledgement that was lost
		f := output.NewFrames(b.js, "f.job", id)
		for i := range 3 {
			if err := f.Write(b.ctx, output.Envelope{Utterance: 5, ReqID: "r", End: i == 2, Data: []byte(fmt.Sprint(i))}); err != nil {
				t.Fatal(err)
			}
		}
		if f.LastSeq() != 3 {
			t.Errorf("last seq %d", f.LastSeq())
		}
	}
	info, err := stream.Info(b.ctx)
	if err != nil || info.State.Msgs != 3 {
		t.Errorf("%+v %v", info, err)
	}
	last, found, err := output.Last(b.ctx, b.js, "F", "f.job")
	if err != nil || !found || last.Run != 2 || last.Session != 3 || last.Utterance != 5 || last.ReqID != "r" || !last.End {
		t.Errorf("%+v %t %v", last, found, err)
	}
	if _, found, err := output.Last(b.ctx, b.js, "F", "f.other"); found || err != nil {
		t.Errorf("frames of a job without: %t %v", found, err)
	}
}

// envelope is an animation of key frames in one utterance.
func envelope(req string, end bool, frames int) []byte {
	data := bytes.Repeat([]byte{0x0a, 1, 'k'}, frames)
	inner := append([]byte{0x12, byte(len(req))}, req...)
	if end {
		inner = append(inner, 0x18, 1)
	}
	inner = append(inner, 0x22, byte(len(data)))
	inner = append(inner, data...)
	return append([]byte{0x08, 5, 0x32, byte(len(inner))}, inner...)
}

func recording(list ...[]byte) []byte {
	var b bytes.Buffer
	for _, e := range list {
		output.AppendEnvelope(&b, e)
	}
	return b.Bytes()
}

func TestARecordingShowsWhatItHoldsAndWhereItIsBroken(t *testing.T) {
	t.Parallel()
	whole := recording(envelope("a", false, 5), envelope("a", true, 20), envelope("b", true, 10))
	info, err := output.ReadRecording(bytes.NewReader(whole))
	if err != nil || !info.Whole || info.KeyFrames != 35 || info.Seconds != 1.4 || info.Envelopes != 3 || len(info.Utterances) != 2 {
		t.Errorf("%+v %v", info, err)
	}
	if a := info.Utterances[0]; a.ReqID != "a" || a.Envelopes != 2 || a.KeyFrames != 25 || a.Seconds != 1 || !a.Whole {
		t.Errorf("%+v", a)
	}
	for name, c := range map[string]struct {
		data []byte
		text string
	}{
		"cut in an envelope": {whole[:len(whole)-1], "envelope 3: the recording ends after"},
		"cut in a length":    {append(slices.Clone(whole), 0x80), "envelope 4: the recording ends within a length"},
		"no recording":       {[]byte("\xff\xff\xff\xff\x7fx"), "envelope 1: an envelope length of"},
		"something else":     {recording([]byte("hello")), "envelope 1: not an animation"},
	} {
		info, err := output.ReadRecording(bytes.NewReader(c.data))
		if err == nil || !strings.Contains(err.Error(), c.text) || info.Whole {
			t.Errorf("%s: %v, whole %t", name, err, info.Whole)
		}
	}
	if info, err := output.ReadRecording(bytes.NewReader(nil)); err != nil || info.Whole {
		t.Errorf("empty: %+v %v", info, err)
	}
	if info, err := output.ReadRecording(bytes.NewReader(recording(envelope("a", false, 5)))); err != nil || info.Whole {
		t.Errorf("an utterance without its end: %+v %v", info, err)
	}
}

func FuzzReadRecording(f *testing.F) {
	f.Add(recording(envelope("a", false, 5), envelope("a", true, 20)))
	f.Add([]byte{})
	f.Add([]byte{0x80, 0x80, 0x80, 0x08})
	f.Add(recording([]byte{0x08, 5, 0x32, 0}))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := output.ReadRecording(bytes.NewReader(data))
		if info.Whole && err != nil {
			t.Errorf("broken and whole: %v", err)
		}
		envelopes, frames, size := 0, 0, int64(0)
		for _, u := range info.Utterances {
			envelopes, frames, size = envelopes+u.Envelopes, frames+u.KeyFrames, size+u.Bytes
		}
		if envelopes != info.Envelopes || frames != info.KeyFrames || size != info.Bytes || size > int64(len(data)) {
			t.Errorf("the sums are wrong: %+v", info)
		}
	})
}
