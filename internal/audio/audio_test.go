package audio

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) {
	if os.Getenv(serverVariable) != "" {
		if err := serveTenMinutes(); err != nil {
			panic(err)
		}
		return
	}
	goleak.VerifyTestMain(m, natstest.LibraryLeaks()...)
}

// wavSpec describes a WAV to build; zero values give one of 16-bit mono.
type wavSpec struct {
	tag, channels, bits int
	rate                int
	data                []byte
	dataSize, riffSize  int64 // -1: as they should be
	before, after       []byte
	extensible          bool
}

func plainWAV(data []byte) wavSpec {
	return wavSpec{tag: wavPCM, channels: 1, bits: 16, rate: 16000, data: data, dataSize: -1, riffSize: -1}
}

func (w wavSpec) bytes() []byte {
	le := binary.LittleEndian
	frame := w.channels * w.bits / 8
	var fmtChunk []byte
	tag := w.tag
	if w.extensible {
		tag = wavExtensible
	}
	fmtChunk = le.AppendUint16(fmtChunk, uint16(tag))
	fmtChunk = le.AppendUint16(fmtChunk, uint16(w.channels))
	fmtChunk = le.AppendUint32(fmtChunk, uint32(w.rate))
	fmtChunk = le.AppendUint32(fmtChunk, uint32(w.rate*frame))
	fmtChunk = le.AppendUint16(fmtChunk, uint16(frame))
	fmtChunk = le.AppendUint16(fmtChunk, uint16(w.bits))
	if w.extensible {
		fmtChunk = le.AppendUint16(fmtChunk, 22)
		fmtChunk = le.AppendUint16(fmtChunk, uint16(w.bits))
		fmtChunk = le.AppendUint32(fmtChunk, 0)
		fmtChunk = le.AppendUint16(fmtChunk, uint16(w.tag))
		fmtChunk = append(fmtChunk, guidTail...)
	}
	size := w.dataSize
	if size < 0 {
		size = int64(len(w.data))
	}
	var body []byte
	body = append(body, "WAVE"...)
	body = append(body, w.before...)
	body = append(body, "fmt "...)
	body = le.AppendUint32(body, uint32(len(fmtChunk)))
	body = append(body, fmtChunk...)
	body = append(body, "data"...)
	body = le.AppendUint32(body, uint32(size))
	body = append(body, w.data...)
	body = append(body, w.after...)
	riff := w.riffSize
	if riff < 0 {
		riff = int64(len(body))
	}
	return append(le.AppendUint32([]byte("RIFF"), uint32(riff)), body...)
}

func chunkOf(id string, data string) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte(id), uint32(len(data))), data...)
}

func inline(data []byte) Spec {
	return Spec{Inline: data, HasInline: true, Field: "audio"}
}

func newOpener(t testing.TB, opts Options) *Opener {
	t.Helper()
	o := New(opts)
	t.Cleanup(o.Close)
	return o
}

// received is all that a speech gave.
type received struct {
	data   []byte
	length time.Duration
	chunks []int
}

func listen(t testing.TB, s *Speech) (received, error) {
	t.Helper()
	var h received
	for {
		data, length, err := s.Next(t.Context())
		if err == io.EOF {
			return h, nil
		}
		if err != nil {
			return h, err
		}
		h.data = append(h.data, data...)
		h.chunks = append(h.chunks, len(data))
		h.length += length
	}
}

func mustRead(t testing.TB, o *Opener, spec Spec) (received, *Speech) {
	t.Helper()
	s, err := o.Open(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := listen(t, s)
	if err != nil {
		t.Fatal(err)
	}
	total, known := s.Total()
	if !known || total != h.length {
		t.Errorf("Total is %s, %t after the end; Next gave %s", total, known, h.length)
	}
	return h, s
}

// openAndRead is the first error of a speech, wherever it shows.
func openAndRead(t testing.TB, o *Opener, spec Spec) error {
	t.Helper()
	s, err := o.Open(t.Context(), spec)
	if err != nil {
		return err
	}
	_, err = listen(t, s)
	if cerr := s.Close(); cerr != nil {
		t.Error(cerr)
	}
	return err
}

func wantError(t testing.TB, err error, code errors.Code, phase errors.Phase, words ...string) *errors.Error {
	t.Helper()
	var e *errors.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an *errors.Error of code %s", err, code)
	}
	if e.Code != code || e.Phase != phase {
		t.Errorf("got %s in phase %s, want %s in phase %s (%s)", e.Code, e.Phase, code, phase, e.Message)
	}
	for _, word := range words {
		if !strings.Contains(e.Message, word) {
			t.Errorf("message %q does not say %q", e.Message, word)
		}
	}
	return e
}

func TestClipIsHandedOutWholeInChunksOf100Milliseconds(t *testing.T) {
	h, s := mustRead(t, newOpener(t, Options{}), inline(clip.WAV))
	if s.Format() != PCM || s.SampleRate() != 16000 || s.Converted() != "" {
		t.Errorf("got %s at %d Hz, converted %q", s.Format(), s.SampleRate(), s.Converted())
	}
	if !bytes.Equal(h.data, clip.WAV[44:]) {
		t.Error("the samples are not the file's")
	}
	if h.length != 3354750*time.Microsecond {
		t.Errorf("length %s", h.length)
	}
	for i, n := range h.chunks {
		if n != 3200 && i != len(h.chunks)-1 {
			t.Errorf("chunk %d has %d bytes", i, n)
		}
	}
}

func TestTotalOfInlineSpeechIsKnownFromTheStart(t *testing.T) {
	o := newOpener(t, Options{})
	for name, data := range map[string][]byte{"wav": clip.WAV, "opus": clip.Opus} {
		s, err := o.Open(t.Context(), inline(data))
		if err != nil {
			t.Fatal(err)
		}
		total, known := s.Total()
		if !known || total < 3350*time.Millisecond || total > 3360*time.Millisecond {
			t.Errorf("%s: %s, %t", name, total, known)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRawPCMNeedsItsRate(t *testing.T) {
	o := newOpener(t, Options{})
	raw := make([]byte, 1000)
	spec := inline(raw)
	wantError(t, o.Check(spec), errors.CodeInvalidJob, errors.PhaseJob, "audio.sample_rate", "neither a WAV nor an Ogg file")
	spec.Format = "pcm_s16le"
	wantError(t, o.Check(spec), errors.CodeInvalidJob, errors.PhaseJob, "audio.sample_rate")
	wantError(t, o.Check(Spec{URL: "http://example.com/x", Format: "pcm_s16le"}), errors.CodeInvalidJob, errors.PhaseJob, "audio.sample_rate")
	spec.SampleRate = 24000
	h, s := mustRead(t, o, spec)
	if !bytes.Equal(h.data, raw) || s.SampleRate() != 24000 {
		t.Error("raw PCM was changed")
	}
}

func TestRatesThatTheBackendDoesNotTakeAreRefusedBeforeAnySession(t *testing.T) {
	o := newOpener(t, Options{})
	wav := plainWAV(make([]byte, 100))
	wav.rate = 11025
	raw := inline(make([]byte, 100))
	raw.SampleRate = 12000 // Opus only
	opus := inline(clip.Opus)
	opus.SampleRate = 44100 // PCM only
	remote := Spec{Object: "x", Format: "ogg_opus", SampleRate: 22050}
	for name, spec := range map[string]Spec{"11025": inline(wav.bytes()), "12000": raw, "44100": opus, "22050": remote} {
		wantError(t, o.Check(spec), errors.CodeUnsupportedSampleRate, errors.PhaseAudio, name+" Hz", "16000")
	}
}

func TestSpecOfWrongShapeIsRefusedByName(t *testing.T) {
	o := newOpener(t, Options{})
	both := inline(clip.WAV)
	both.URL = "https://example.com/a.wav"
	negative := inline(clip.WAV)
	negative.SampleRate = -1
	unknown := inline(clip.WAV)
	unknown.Format = "mp3"
	for _, c := range []struct {
		spec  Spec
		words []string
	}{
		{Spec{Field: "utterances[2]"}, []string{"utterances[2]", "inline", "object", "url"}},
		{both, []string{"inline and url", "exactly one"}},
		{negative, []string{"audio.sample_rate", "-1"}},
		{unknown, []string{"audio.format", "mp3"}},
		{inline(nil), []string{"audio.inline", "empty"}},
		{Spec{Object: "bucket/"}, []string{"audio.object"}},
		{Spec{Object: "/name"}, []string{"audio.object"}},
		{Spec{Object: "my.bucket/name"}, []string{"audio.object", "my.bucket"}},
		{Spec{URL: "ftp://example.com/a"}, []string{"audio.url", "http"}},
		{Spec{URL: "a.wav"}, []string{"audio.url", "http"}},
		{Spec{URL: "http:///a.wav"}, []string{"audio.url", "host"}},
		{Spec{URL: "http://host:0/a.wav"}, []string{"audio.url", "port"}},
		{Spec{URL: "http://user:sesame@host/a.wav"}, []string{"audio.url", "password"}},
		{Spec{URL: "http://user:ses/ame@host:x/%zz?sesame"}, []string{"audio.url"}},
	} {
		e := wantError(t, o.Check(c.spec), errors.CodeInvalidJob, errors.PhaseJob, c.words...)
		if strings.Contains(e.Error(), "sesame") || strings.Contains(e.Error(), "ses/ame") {
			t.Errorf("a secret shows: %s", e)
		}
	}
}

func TestFormatThatTheBytesContradictIsRefused(t *testing.T) {
	o := newOpener(t, Options{})
	for _, c := range []struct {
		data   []byte
		format string
		word   string
	}{
		{clip.WAV, "ogg_opus", "is a WAV file"},
		{clip.WAV, "pcm_s16le", "is a WAV file"},
		{clip.Opus, "wav", "is an Ogg file"},
		{make([]byte, 100), "wav", "neither"},
		{[]byte("fLaC0000"), "", "is a FLAC file"},
		{[]byte("ID3\x0300000"), "", "is an MP3 file"},
	} {
		spec := inline(c.data)
		spec.Format, spec.SampleRate = c.format, 16000
		wantError(t, o.Check(spec), errors.CodeInvalidJob, errors.PhaseJob, "audio.inline", c.word)
	}
	believed := inline([]byte("fLaC0000"))
	believed.Format, believed.SampleRate = "pcm_s16le", 16000
	if err := o.Check(believed); err != nil {
		t.Error(err)
	}
}

func TestInlineLargerThanTheLimitIsRefused(t *testing.T) {
	wantError(t, newOpener(t, Options{MaxBytes: 1000}).Check(inline(clip.WAV)), errors.CodeInvalidJob, errors.PhaseJob, "1000")
}

func TestNextAfterCloseOrCancelGivesNothing(t *testing.T) {
	o := newOpener(t, Options{})
	s, err := o.Open(t.Context(), inline(clip.WAV))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	drained := errors.New("drained")
	cancel(drained)
	if _, _, err := s.Next(ctx); !errors.Is(err, drained) {
		t.Errorf("got %v, want the context's cause", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Next(t.Context()); err == nil || err == io.EOF {
		t.Errorf("got %v after Close", err)
	}
}

func TestNewPCMChunksAnyReader(t *testing.T) {
	s, err := NewPCM(bytes.NewReader(clip.WAV[44:]), 16000)
	if err != nil {
		t.Fatal(err)
	}
	h, err := listen(t, s)
	if err != nil || !bytes.Equal(h.data, clip.WAV[44:]) {
		t.Errorf("got %d bytes, %v", len(h.data), err)
	}
	if _, err := NewPCM(strings.NewReader(""), 12345); err == nil {
		t.Error("12345 Hz was taken")
	}
}
