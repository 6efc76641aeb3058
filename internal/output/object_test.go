package output_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"pgregory.net/rapid"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
)

const chunkSize = 128 << 10

// film is the recording of one run of job.
func film(run int) output.Recording {
	return output.Recording{Name: "film", JobID: "job", Run: run, StreamSeq: uint64(run), Published: time.Unix(1_700_000_000, 5)}
}

// recorder is one session of a job that records.
type recorder struct {
	b    *bench
	r    output.Recording
	o    *output.Object
	next int // utterance
	at   *output.Checkpoint
}

// session takes the job over where at says that it is.
func (b *bench) session(r output.Recording, session int, at *output.Checkpoint) *recorder {
	b.t.Helper()
	done := 0
	if at != nil {
		done = at.Utterances
	}
	o := b.recordings().Sink(r, session, done, at)
	if err := o.Open(b.ctx); err != nil {
		b.t.Fatal(err)
	}
	return &recorder{b: b, r: r, o: o, next: done + 1, at: at}
}

// write takes an envelope of the utterance in flight.
func (s *recorder) write(data []byte) error {
	return s.o.Write(s.b.ctx, output.Envelope{Utterance: s.next, Data: data})
}

// finish ends the utterance in flight.
func (s *recorder) finish() error {
	if err := s.o.Finish(s.b.ctx, s.next); err != nil {
		return err
	}
	at, err := s.o.Checkpoint()
	if err != nil {
		return err
	}
	s.at = at
	s.next++
	return nil
}

// speak is a whole utterance, and returns what the recording holds of it.
func (s *recorder) speak(envelopes ...[]byte) []byte {
	s.b.t.Helper()
	for _, e := range envelopes {
		if err := s.write(e); err != nil {
			s.b.t.Fatal(err)
		}
	}
	if err := s.finish(); err != nil {
		s.b.t.Fatal(err)
	}
	return recording(envelopes...)
}

// publish makes the recording visible, as the run's session with that number.
func (s *recorder) publish(session int) error {
	return s.b.recordings().Publish(s.b.ctx, s.r, session, s.at.Utterances, *s.at)
}

// noise is an envelope of so many bytes that no other is equal to.
func noise(size int) []byte {
	data := make([]byte, size)
	random := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(noises.Add(1))})
	_, _ = random.Read(data)
	return data
}

var noises atomic.Int64

// check reads the recording as any client does.
func (b *bench) check(name string, want []byte) {
	b.t.Helper()
	if got := b.recording(name); got != string(want) {
		b.t.Errorf("%s: %d bytes that differ from the %d wanted", name, len(got), len(want))
	}
	old, err := b.js.Conn().JetStream()
	if err != nil {
		b.t.Fatal(err)
	}
	store, err := old.ObjectStore("R")
	if err != nil {
		b.t.Fatal(err)
	}
	if got, err := store.GetBytes(name); err != nil || !bytes.Equal(got, want) {
		b.t.Errorf("%s by the older client: %d bytes, %v", name, len(got), err)
	}
	info, err := leader.ObjectInfo(b.ctx, b.js, "R", name)
	if err != nil {
		b.t.Fatal(err)
	}
	if there := b.messages()["$O.R.C."+info.NUID]; info.Size != uint64(len(want)) || uint64(info.Chunks) != there {
		b.t.Errorf("%s: %d bytes in %d chunks, want %d in the %d that are there", name, info.Size, info.Chunks, len(want), there)
	}
	if len(want) == 0 {
		return
	}
	body, err := leader.OpenObject(b.ctx, b.js, info)
	if err != nil {
		b.t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := got.ReadFrom(body); err != nil || !bytes.Equal(got.Bytes(), want) {
		b.t.Errorf("%s by our own reader: %d bytes, %v", name, got.Len(), err)
	}
}

// messages counts what is in the bucket, by subject.
func (b *bench) messages() map[string]uint64 {
	b.t.Helper()
	stream, err := b.js.Stream(b.ctx, "OBJ_R")
	if err != nil {
		b.t.Fatal(err)
	}
	info, err := stream.Info(b.ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		b.t.Fatal(err)
	}
	return info.State.Subjects
}

// total counts the messages in the bucket.
func (b *bench) total() (n uint64) {
	for _, count := range b.messages() {
		n += count
	}
	return n
}

func (b *bench) nothingIsLeft() {
	b.t.Helper()
	if left := b.messages(); len(left) != 0 {
		b.t.Errorf("left in the bucket: %v", left)
	}
}

func TestARecordingIsReadBackByteForByteByAnyClient(t *testing.T) {
	t.Parallel()
	for name, sizes := range map[string][]int{
		"no frames":                  {},
		"one":                        {1},
		"empty envelopes":            {0, 0},
		"just a chunk":               {chunkSize - 3},
		"just a chunk, then more":    {chunkSize - 3, 1},
		"a length across two chunks": {chunkSize - 4, 300, 5},
		"larger than chunks":         {3*chunkSize + 17, 1, 2 * chunkSize},
		"as the backend's":           {24_968, 49_868, 49_868, 49_868, 49_868, 28_456},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			s := b.session(film(1), 1, nil)
			var want []byte
			for range 2 {
				var envelopes [][]byte
				for _, size := range sizes {
					envelopes = append(envelopes, noise(size))
				}
				want = append(want, s.speak(envelopes...)...)
			}
			if list, err := b.store.List(b.ctx); !errors.Is(err, jetstream.ErrNoObjectsFound) {
				t.Errorf("visible before it is published: %v %v", list, err)
			}
			for range 2 { // as the next delivery of a settled job does
				if err := s.publish(1); err != nil {
					t.Fatal(err)
				}
			}
			b.check("film", want)
			if info, _ := leader.ObjectInfo(b.ctx, b.js, "R", "film"); b.total() != uint64(info.Chunks)+1 {
				t.Errorf("in the bucket: %v", b.messages())
			}
		})
	}
}

func TestALaterSessionGoesOnBehindTheCheckpoint(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	want := first.speak(noise(200_000))
	at := first.at
	if err := first.write(noise(3 * chunkSize)); err != nil { // and its worker dies
		t.Fatal(err)
	}
	second := b.session(film(1), 2, at)
	if err := second.write(noise(2 * chunkSize)); err != nil { // it too
		t.Fatal(err)
	}
	third := b.session(film(1), 3, at)
	want = append(want, third.speak(noise(10), noise(chunkSize))...)
	if err := third.publish(3); err != nil {
		t.Fatal(err)
	}
	b.check("film", want)
}

func TestASessionThatBeginsAgainLeavesNothingOfTheOneBefore(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	first.speak(noise(2 * chunkSize))
	first.speak(noise(5))
	second := b.session(film(1), 2, nil) // on_redelivery: restart
	want := second.speak(noise(7))
	if err := second.publish(2); err != nil {
		t.Fatal(err)
	}
	b.check("film", want)
	if b.total() != 2 {
		t.Errorf("in the bucket: %v", b.messages())
	}
}

// wantReplaced lets a session go on that was frozen while others took its job.
func wantReplaced(t *testing.T, s *recorder) {
	t.Helper()
	before := s.b.total()
	err := s.write(noise(2 * chunkSize))
	if !errors.Is(err, output.ErrReplaced) || errors.Of(err).Code != errors.CodeInternal {
		t.Errorf("a session that was replaced: %v", err)
	}
	if after := s.b.total(); after != before {
		t.Errorf("it has added to the bucket: %d messages, %d before", after, before)
	}
}

func TestASessionThatWakesAfterItWasReplacedIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ before, after int }{ // sizes of what it wrote, and of what its successor does
		"before its first chunk":  {0, 10},
		"in its first utterance":  {2 * chunkSize, 10},
		"its successor is longer": {chunkSize, 4 * chunkSize},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			zero := b.session(film(1), 1, nil)
			want := zero.speak(noise(100))
			frozen := b.session(film(1), 2, zero.at)
			if err := frozen.write(noise(c.before)); err != nil {
				t.Fatal(err)
			}
			heir := b.session(film(1), 3, zero.at)
			want = append(want, heir.speak(noise(c.after))...)
			wantReplaced(t, frozen)
			if err := heir.publish(3); err != nil {
				t.Fatal(err)
			}
			wantReplaced(t, b.session(film(1), 2, zero.at))
			b.check("film", want)
		})
	}
}

// The session that takes the job over finds every utterance spoken: it stores no
// chunk, but the one before it may only be frozen.
func TestARecordingIsClosedToASessionWhoseSuccessorHadNothingToSay(t *testing.T) {
	t.Parallel()
	for _, behind := range []int{0, 2 * chunkSize} {
		t.Run(fmt.Sprint(behind), func(t *testing.T) {
			b := newBench(t)
			frozen := b.session(film(1), 1, nil)
			want := frozen.speak(noise(chunkSize), noise(9))
			at := *frozen.at
			if behind > 0 {
				if err := frozen.write(noise(behind)); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := b.recordings().Publish(b.ctx, film(1), 2, 1, at); err != nil {
					t.Fatal(err)
				}
				if err := frozen.write(noise(2 * chunkSize)); err == nil {
					t.Error("the session before has added a chunk")
				}
			}
			b.check("film", want)
		})
	}
}

// Whatever sessions die, freeze and wake in whatever order, the recording holds
// what the checkpoints say.
func TestAnyOrderOfSessionsMakesTheRecordingThatTheCheckpointsSay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		r := film(run)
		r.Name = fmt.Sprint("film", run)
		var (
			want     []byte
			at       *output.Checkpoint // as in the job's record
			sessions []*recorder
			inFlight [][]byte // of the newest session
		)
		takeOver := func(*rapid.T) {
			sessions = append(sessions, b.session(r, len(sessions)+1, at))
			inFlight = nil
		}
		takeOver(t)
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				data := noise(rapid.SampledFrom([]int{0, 7, 50_000, chunkSize, 2 * chunkSize}).Draw(t, "size"))
				if err := sessions[len(sessions)-1].write(data); err != nil {
					t.Fatal(err)
				}
				inFlight = append(inFlight, data)
			},
			"finish": func(t *rapid.T) {
				s := sessions[len(sessions)-1]
				if err := s.finish(); err != nil {
					t.Fatal(err)
				}
				at, want, inFlight = s.at, append(want, recording(inFlight...)...), nil
			},
			"finish and die before the checkpoint": func(t *rapid.T) {
				if err := sessions[len(sessions)-1].finish(); err != nil {
					t.Fatal(err)
				}
				takeOver(t)
			},
			"take over": takeOver,
			"restart": func(t *rapid.T) {
				at, want = nil, nil
				takeOver(t)
			},
			"an older one wakes": func(t *rapid.T) {
				s := sessions[rapid.IntRange(0, len(sessions)-1).Draw(t, "session")]
				if s == sessions[len(sessions)-1] {
					return
				}
				_ = s.write(noise(chunkSize)) // it may still be the last that stored one
			},
		})
		if at == nil {
			at = &output.Checkpoint{}
		}
		last := len(sessions)
		if err := b.recordings().Publish(b.ctx, r, last, at.Utterances, *at); err != nil {
			t.Fatal(err)
		}
		for _, s := range sessions[:last-1] {
			if at.Chunks == 0 {
				break // its chunks are gone, and it looks for them for a while
			}
			if err := s.write(noise(2 * chunkSize)); err == nil {
				t.Error("a session that was replaced has added a chunk to the finished recording")
			}
		}
		b.check(r.Name, want)
		if err := b.store.Delete(b.ctx, r.Name); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAFinishThatWasCutOffIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	want := first.speak(noise(chunkSize), noise(9))
	if err := first.write(noise(3 * chunkSize)); err != nil {
		t.Fatal(err)
	}
	// Each try gets a little further before its context ends.
	for n := 1; ; n++ {
		ctx, cancel := context.WithCancelCause(b.ctx)
		err := output.NewRecordings(cutting(t, b, n, cancel), "R").Publish(ctx, film(1), 2, 1, *first.at)
		cancel(nil)
		if err == nil {
			if n < 5 {
				t.Errorf("finished after %d requests", n)
			}
			break
		}
		if n > 50 {
			t.Fatal(err)
		}
	}
	b.check("film", want)
}

func TestOnlyTheSameJobReplacesARecording(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	old := first.speak(noise(chunkSize + 5))
	if err := first.publish(1); err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.PutBytes(b.ctx, "mine", []byte("x")); err != nil {
		t.Fatal(err)
	}
	other := film(1)
	other.JobID = "other"
	refused := func(r output.Recording, text string) {
		t.Helper()
		err := b.recordings().Sink(r, 1, 0, nil).Open(b.ctx)
		if e := errors.Of(err); err == nil || e.Code != errors.CodeInvalidJob || !strings.Contains(err.Error(), "output.object.name: "+text) {
			t.Errorf("%v", err)
		}
		var taken *output.TakenError
		if err := b.recordings().Publish(b.ctx, r, 1, 0, output.Checkpoint{}); !errors.As(err, &taken) {
			t.Errorf("published all the same: %v", err)
		}
		if err := b.recordings().Sweep(b.ctx, r); err != nil {
			t.Error(err)
		}
	}
	refused(other, `"film" is the recording of job job`)
	other.Name = "mine"
	refused(other, `there is an object "mine" that no job has recorded`)

	again := b.session(film(2), 1, nil) // a replay
	want := again.speak(noise(10))
	b.check("film", old) // until the new one is there
	for range 2 {
		if err := again.publish(1); err != nil {
			t.Fatal(err)
		}
	}
	b.check("film", want)
	if b.total() != 4 {
		t.Errorf("in the bucket: %v", b.messages())
	}
}

func TestOfTwoJobsThatRecordUnderOneNameTheFirstToBeginHasIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	other := film(1)
	other.JobID = "other"
	if err := b.recordings().Sink(other, 1, 0, nil).Open(b.ctx); errors.Of(err).Code != errors.CodeInvalidJob || !strings.Contains(err.Error(), `job job, which has no outcome yet, records "film" (reserved by message 1 of stream OBJ_R)`) {
		t.Errorf("%v", err)
	}
	if err := b.recordings().Sweep(b.ctx, other); err != nil { // its dead letter's
		t.Fatal(err)
	}
	first.speak(noise(10))
	b.session(film(1), 2, first.at) // the reservation is the job's, not a session's
	if err := b.recordings().Sweep(b.ctx, film(1)); err != nil {
		t.Fatal(err)
	}
	b.nothingIsLeft()
	s := b.session(other, 2, nil)
	want := s.speak(noise(11))
	if err := s.publish(2); err != nil {
		t.Fatal(err)
	}
	b.check("film", want)
	// The name of a recording that was removed is free.
	if err := b.store.Delete(b.ctx, "film"); err != nil {
		t.Fatal(err)
	}
	b.session(film(1), 3, nil)
}

func TestSweepRemovesEverythingOfARunAndNothingElse(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	first.speak(noise(2 * chunkSize))
	if err := first.write(noise(2 * chunkSize)); err != nil {
		t.Fatal(err)
	}
	second := b.session(film(1), 2, first.at)
	second.speak(noise(10))
	later := film(2)
	later.Name = "later"
	kept := b.session(later, 1, nil)
	want := kept.speak(noise(10))
	for range 2 {
		if err := b.recordings().Sweep(b.ctx, film(1)); err != nil {
			t.Fatal(err)
		}
	}
	wantReplaced := second.write(noise(2 * chunkSize)) // it slept meanwhile
	if wantReplaced == nil {
		t.Error("a session of a job that is over has stored a chunk")
	}
	if err := kept.publish(1); err != nil {
		t.Fatal(err)
	}
	b.check("later", want)
	if b.total() != 2 {
		t.Errorf("in the bucket: %v", b.messages())
	}
}

func TestARecordingWhoseChunksAreGoneIsNotMadeInPart(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(b *bench, s *recorder) error{
		"the last chunk": func(b *bench, s *recorder) error { return b.deleteMsg(s.at.LastSeq) },
		"the first chunk": func(b *bench, s *recorder) error {
			return b.deleteMsg(s.at.LastSeq - 1)
		},
		"an utterance of an older version": func(_ *bench, s *recorder) error { s.at.Utterances--; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			for session := 1; session <= 2; session++ {
				b := newBench(t)
				s := b.session(film(1), 1, nil)
				s.speak(noise(chunkSize + 5))
				if err := spoil(b, s); err != nil {
					t.Fatal(err)
				}
				err := b.recordings().Publish(b.ctx, film(1), session, 1, *s.at)
				if !errors.Is(err, output.ErrChunksMissing) || !strings.Contains(err.Error(), "recording film: ") {
					t.Errorf("%v", err)
				}
				if _, err := leader.ObjectInfo(b.ctx, b.js, "R", "film"); !errors.Is(err, jetstream.ErrObjectNotFound) {
					t.Errorf("visible: %v", err)
				}
			}
		})
	}
}

func (b *bench) deleteMsg(seq uint64) error {
	stream, err := b.js.Stream(b.ctx, "OBJ_R")
	if err != nil {
		return err
	}
	return stream.DeleteMsg(b.ctx, seq)
}

func TestARecordingThatWasRemovedIsNotMadeAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for run, envelopes := range [][][]byte{{}, {noise(5)}} {
		s := b.session(film(run+1), 1, nil)
		s.speak(envelopes...)
		if err := s.publish(1); err != nil {
			t.Fatal(err)
		}
		if err := b.store.Delete(b.ctx, "film"); err != nil {
			t.Fatal(err)
		}
		if err := s.publish(1); !errors.Is(err, output.ErrChunksMissing) {
			t.Errorf("%v", err)
		}
	}
}

func TestAJobThatAnOlderVersionRecordedIsRefusedBeforeItsSession(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	err := b.recordings().Sink(film(1), 3, 2, nil).Open(b.ctx)
	if errors.Of(err).Code != errors.CodeInternal || !strings.Contains(err.Error(), "counts 2 finished utterances, its recording 0") {
		t.Errorf("%v", err)
	}
	b.nothingIsLeft()
}

func TestAChunkWhoseAcknowledgementWasLostIsStoredOnce(t *testing.T) {
	t.Parallel() // it waits for the client
	b := newBench(t)
	first := b.session(film(1), 1, nil)
	want := first.speak(noise(10))
	if err := first.write(noise(chunkSize)); err != nil {
		t.Fatal(err)
	}
	second := b.session(film(1), 2, first.at)
	want = append(want, second.speak(noise(10))...)
	stream, err := b.js.Stream(b.ctx, "OBJ_R")
	if err != nil {
		t.Fatal(err)
	}
	config := stream.CachedInfo().Config
	silent := config
	silent.NoAck = true // what is stored now is not acknowledged
	for range 2 {
		if _, err := b.js.UpdateStream(b.ctx, silent); err != nil {
			t.Fatal(err)
		}
		before, err := stream.Info(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		written, data := make(chan error, 1), noise(chunkSize-3)
		go func() {
			err := second.write(data)
			if err == nil {
				err = second.finish()
			}
			written <- err
		}()
		for {
			if info, err := stream.Info(b.ctx); err != nil || info.State.LastSeq > before.State.LastSeq {
				break
			}
		}
		if _, err := b.js.UpdateStream(b.ctx, config); err != nil {
			t.Fatal(err)
		}
		if err := <-written; err != nil {
			t.Fatal(err)
		}
		want = append(want, recording(data)...)
	}
	if err := second.publish(2); err != nil {
		t.Fatal(err)
	}
	b.check("film", want)
}

// What one worker has left after some thousand recordings.
func TestRecordingsLeaveNoGoroutines(t *testing.T) {
	b := newBench(t)
	recordings := b.recordings()
	before := runtime.NumGoroutine()
	for i := range 2000 {
		r := film(1)
		r.Name, r.JobID = strconv.Itoa(i), strconv.Itoa(i)
		o := recordings.Sink(r, 1, 0, nil)
		err := o.Write(b.ctx, output.Envelope{Utterance: 1, End: true, Data: []byte("abc")})
		if err == nil {
			err = o.Finish(b.ctx, 1)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if after := runtime.NumGoroutine(); after > before+5 {
		t.Errorf("%d goroutines are left", after-before)
	}
}

func TestALeaderThatChangesLosesNoChunkAndDoublesNone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c := natstest.Cluster(t, 3)
	js, err := jetstream.New(natstest.ConnectURL(t, c.ClientURLs()))
	if err != nil {
		t.Fatal(err)
	}
	store, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "R", Replicas: 3, Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, ctx: ctx, js: js, store: store}
	var want []byte
	var at *output.Checkpoint
	for session := 1; session <= 2; session++ {
		s := b.session(film(1), session, at)
		for range 2 {
			stepped := make(chan error, 1)
			go func() {
				_, err := js.Conn().RequestWithContext(ctx, "$JS.API.STREAM.LEADER.STEPDOWN.OBJ_R", nil)
				stepped <- err
			}()
			want = append(want, s.speak(noise(3*chunkSize), noise(50_000))...)
			if err := <-stepped; err != nil {
				t.Fatal(err)
			}
		}
		at = s.at
		if err := s.write(noise(2 * chunkSize)); err != nil { // and its worker dies
			t.Fatal(err)
		}
	}
	if err := b.recordings().Publish(ctx, film(1), 3, 4, *at); err != nil {
		t.Fatal(err)
	}
	info, err := leader.ObjectInfo(ctx, js, "R", "film")
	if err != nil {
		t.Fatal(err)
	}
	body, err := leader.OpenObject(ctx, js, info)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := got.ReadFrom(body); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes of %d: %v", got.Len(), len(want), err)
	}
	stream, err := js.Stream(ctx, "OBJ_R")
	if err != nil {
		t.Fatal(err)
	}
	there, err := stream.Info(ctx, jetstream.WithSubjectFilter("$O.R.C.>"))
	if err != nil || there.State.Subjects["$O.R.C."+info.NUID] != uint64(info.Chunks) || len(there.State.Subjects) != 1 {
		t.Errorf("%d chunks, there are %v: %v", info.Chunks, there.State.Subjects, err)
	}
}

func TestRoom(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stream := func(name string, discard jetstream.DiscardPolicy, maxBytes int64) {
		t.Helper()
		_, err := b.js.CreateStream(b.ctx, jetstream.StreamConfig{
			Name: name, Subjects: []string{name}, Storage: jetstream.MemoryStorage, Discard: discard, MaxBytes: maxBytes,
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.js.Publish(b.ctx, name, noise(500_000)); err != nil {
			t.Fatal(err)
		}
	}
	stream("new", jetstream.DiscardNew, 1_000_000)
	stream("old", jetstream.DiscardOld, 1_000_000)
	stream("open", jetstream.DiscardNew, -1)
	for _, c := range []struct {
		stream string
		need   int64
		room   bool
		never  bool
	}{
		{"new", 400_000, true, false},
		{"new", 490_000, false, false}, // a sixteenth stays free
		{"new", 900_000, false, false},
		{"new", 950_000, false, true},
		{"old", 900_000, true, false},
		{"old", 950_000, false, true},
		{"open", 1 << 40, true, false},
	} {
		space, err := output.ReadSpace(b.ctx, b.js, c.stream)
		if err != nil {
			t.Fatal(err)
		}
		err = space.For(c.need)
		var room *output.NoSpaceError
		if c.room != (err == nil) || err != nil && (!errors.As(err, &room) || room.Never() != c.never || room.Stream != c.stream || room.Need != c.need) {
			t.Errorf("%d bytes in %s: %v", c.need, c.stream, err)
		}
	}
	var room *output.NoSpaceError
	for stream, object := range map[string]string{"none": "stream none", "OBJ_none": "bucket none"} {
		_, err := output.ReadSpace(b.ctx, b.js, stream)
		if err == nil || errors.As(err, &room) || !strings.HasPrefix(err.Error(), object+" is gone: ") || !strings.Contains(err.Error(), "avatarworker setup") {
			t.Errorf("a stream that is not there: %v", err)
		}
	}
	full := &output.NoSpaceError{Stream: "OBJ_AVATAR_RECORDINGS", Need: 2, Free: 1, Max: 100}
	if !strings.HasPrefix(full.Error(), "bucket AVATAR_RECORDINGS has 1 bytes left") {
		t.Error(full)
	}
}

// The one recorded exchange: 20.3 s of speech gave 252,896 bytes.
func TestTheEstimateCoversWhatIsStored(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	exchange := [][]byte{noise(24_968), noise(49_868), noise(49_868), noise(49_868), noise(49_868), noise(28_456)}
	s := b.session(film(1), 1, nil)
	for range 10 {
		s.speak(exchange...)
	}
	if err := s.publish(1); err != nil {
		t.Fatal(err)
	}
	stream, err := b.js.Stream(b.ctx, "OBJ_R")
	if err != nil {
		t.Fatal(err)
	}
	stored, estimate := int64(stream.CachedInfo().State.Bytes), output.EstimateBytes(203*time.Second)
	if estimate < stored || estimate > stored*11/10 {
		t.Errorf("estimated %d bytes, %d are stored", estimate, stored)
	}
	if got := output.EstimateBytes(1<<63 - 1); got < 1<<40 {
		t.Errorf("for ever: %d", got)
	}
	if !slices.IsSorted([]int64{0, output.EstimateBytes(-1), output.EstimateBytes(time.Second), output.EstimateBytes(time.Minute)}) {
		t.Error("not monotonic")
	}
}

// cutting connects a client whose nth request ends the work: as a worker's death
// does, between any two of its steps.
func cutting(t *testing.T, b *bench, n int, cancel context.CancelCauseFunc) jetstream.JetStream {
	t.Helper()
	nc, prefix := b.js.Conn(), fmt.Sprintf("cut%d.", n)
	requests := 0
	_, err := nc.Subscribe(prefix+">", func(m *nats.Msg) {
		if requests++; requests == n {
			cancel(errors.New("cut off"))
			return
		}
		onward := &nats.Msg{Subject: jetstream.DefaultAPIPrefix + strings.TrimPrefix(m.Subject, prefix), Reply: m.Reply, Header: m.Header, Data: m.Data}
		if err := nc.PublishMsg(onward); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return js
}
