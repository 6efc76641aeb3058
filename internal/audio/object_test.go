package audio

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

// objectStores runs NATS in the process, with one empty bucket.
func objectStores(t testing.TB, bucket string) (jetstream.JetStream, jetstream.ObjectStore) {
	t.Helper()
	js := natstest.JetStream(t)
	store, err := js.CreateObjectStore(t.Context(), jetstream.ObjectStoreConfig{Bucket: bucket})
	if err != nil {
		t.Fatal(err)
	}
	return js, store
}

func put(t testing.TB, store jetstream.ObjectStore, name string, data []byte) {
	t.Helper()
	if _, err := store.PutBytes(t.Context(), name, data); err != nil {
		t.Fatal(err)
	}
}

func object(name string) Spec { return Spec{Object: name, Field: "utterances[2]"} }

func TestObjectIsStreamedFromItsBucket(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	long := make([]byte, 1_000_000) // several chunks
	if _, err := rand.Read(long); err != nil {
		t.Fatal(err)
	}
	put(t, store, "hello.wav", clip.WAV)
	put(t, store, "dir/long.wav", plainWAV(long).bytes())
	info, err := store.GetInfo(t.Context(), "hello.wav")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.AddLink(t.Context(), "link.wav", info); err != nil {
		t.Fatal(err)
	}
	o := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"})
	for name, want := range map[string][]byte{
		"hello.wav": clip.WAV[44:], "SPEECH/hello.wav": clip.WAV[44:], "SPEECH/dir/long.wav": long, "link.wav": clip.WAV[44:],
	} {
		h, _ := mustRead(t, o, object(name))
		if !bytes.Equal(h.data, want) {
			t.Errorf("%s: %d bytes, want %d", name, len(h.data), len(want))
		}
	}
}

func TestObjectThatIsNotThereIsNotTriedAgain(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	put(t, store, "deleted", clip.WAV)
	if err := store.Delete(t.Context(), "deleted"); err != nil {
		t.Fatal(err)
	}
	o := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"})
	for _, name := range []string{"none", "OTHER/none", "deleted"} {
		e := wantError(t, openAndRead(t, o, object(name)), errors.CodeAudioUnavailable, errors.PhaseAudio, "utterances[2].object", "no such object")
		if e.Network {
			t.Errorf("%s would be tried again", name)
		}
	}
	wantError(t, openAndRead(t, o, object("dir/x.wav")), errors.CodeAudioUnavailable, errors.PhaseAudio, "looked for x.wav in bucket dir")
	e := wantError(t, openAndRead(t, newOpener(t, Options{}), object("x")), errors.CodeAudioUnavailable, errors.PhaseAudio, "no object store")
	if e.Network {
		t.Error("it would be tried again")
	}
}

func TestBrokenObjectIsAnInvalidJobInPhaseAudio(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	put(t, store, "empty", nil)
	put(t, store, "cut.wav", clip.WAV[:len(clip.WAV)/2])
	put(t, store, "odd.pcm", make([]byte, 1001))
	o := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"})
	odd := object("odd.pcm")
	odd.SampleRate = 16000
	for _, c := range []struct {
		spec Spec
		word string
	}{{object("empty"), "empty"}, {object("cut.wav"), "cut short"}, {odd, "odd number of bytes"}} {
		// What the size shows is refused before any session starts.
		_, err := o.Open(t.Context(), c.spec)
		wantError(t, err, errors.CodeInvalidJob, errors.PhaseAudio, "utterances[2].object", c.word)
	}
}

func TestObjectLargerThanTheLimitIsRefusedBeforeItIsRead(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	put(t, store, "hello.wav", clip.WAV)
	_, err := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH", MaxBytes: 1000}).Open(t.Context(), object("hello.wav"))
	wantError(t, err, errors.CodeAudioUnavailable, errors.PhaseAudio, "1000 bytes")
}

func TestObjectDeletedMeanwhileIsANetworkFault(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	put(t, store, "long.wav", plainWAV(make([]byte, 1_000_000)).bytes())
	s, err := newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"}).Open(t.Context(), object("long.wav"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "long.wav"); err != nil {
		t.Fatal(err)
	}
	_, err = listen(t, s)
	if e := wantError(t, err, errors.CodeAudioUnavailable, errors.PhaseAudio, "long.wav", "deleted"); !e.Network {
		t.Error("it would not be tried again")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestObjectStoreThatDoesNotAnswerIsANetworkFault(t *testing.T) {
	js, store := objectStores(t, "SPEECH")
	put(t, store, "hello.wav", clip.WAV)
	js.Conn().Close()
	e := wantError(t, openAndRead(t, newOpener(t, Options{Objects: JetStreamObjects(js), DefaultBucket: "SPEECH"}), object("hello.wav")),
		errors.CodeAudioUnavailable, errors.PhaseAudio, "the object store failed")
	if !e.Network {
		t.Error("it would not be tried again")
	}
	silent := func(ctx context.Context, _, _ string) (io.ReadCloser, int64, error) {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	o := newOpener(t, Options{Objects: silent, FetchTimeout: 20 * time.Millisecond})
	if e := wantError(t, openAndRead(t, o, object("x")), errors.CodeAudioUnavailable, errors.PhaseAudio, "too slow"); !e.Network {
		t.Error("it would not be tried again")
	}
}
