package audio

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
)

func TestBrokenWAVsAreInvalidJobsThatNameWhatIsWrong(t *testing.T) {
	o := newOpener(t, Options{})
	samples := make([]byte, 320)
	change := func(do func(w *wavSpec)) []byte {
		w := plainWAV(samples)
		do(&w)
		return w.bytes()
	}
	good := plainWAV(samples).bytes()
	said := inline(good)
	said.SampleRate = 24000
	wantError(t, o.Check(said), errors.CodeInvalidJob, errors.PhaseJob, "16000 Hz", "24000 Hz", "sample_rate")
	for name, c := range map[string]struct {
		data  []byte
		words []string
	}{
		"stereo":          {change(func(w *wavSpec) { w.channels = 2 }), []string{"stereo (2 channels)", "audio.convert"}},
		"8-bit":           {change(func(w *wavSpec) { w.bits = 8 }), []string{"8-bit", "audio.convert"}},
		"24-bit":          {change(func(w *wavSpec) { w.bits, w.data = 24, samples[:300] }), []string{"24-bit"}},
		"float":           {change(func(w *wavSpec) { w.tag, w.bits = wavFloat, 32 }), []string{"32-bit float"}},
		"six channels":    {change(func(w *wavSpec) { w.channels = 6; w.data = samples[:300] }), []string{"6 channels"}},
		"mu-law":          {change(func(w *wavSpec) { w.tag, w.bits = wavMuLaw, 8 }), []string{"mu-law"}},
		"12-bit":          {change(func(w *wavSpec) { w.bits = 12 }), []string{"12-bit"}},
		"no channels":     {change(func(w *wavSpec) { w.channels = 0 }), []string{"0 channels"}},
		"rate 0":          {change(func(w *wavSpec) { w.rate = 0 }), []string{"0 Hz"}},
		"odd":             {change(func(w *wavSpec) { w.data = samples[:319] }), []string{"odd", "319"}},
		"empty":           {change(func(w *wavSpec) { w.data = nil }), []string{"no samples"}},
		"empty, LIST":     {change(func(w *wavSpec) { w.data, w.after = nil, chunkOf("LIST", "abcd") }), []string{"no samples"}},
		"truncated":       {good[:len(good)-100], []string{"cut short", "320", "220"}},
		"only header":     {good[:44], []string{"cut short", "320"}},
		"half a header":   {good[:30], []string{"cut short"}},
		"eight bytes":     {good[:8], []string{"cut short"}},
		"not a WAVE":      {append([]byte("RIFF\x04\x00\x00\x00AVI "), samples...), []string{"AVI"}},
		"no fmt":          {append([]byte("RIFF\x04\x00\x00\x00WAVE"), chunkOf("data", "abcd")...), []string{"fmt"}},
		"no data":         {append([]byte("RIFF\x04\x00\x00\x00WAVE"), chunkOf("LIST", "abcd")...), []string{"no data chunk"}},
		"short fmt":       {append([]byte("RIFF\x04\x00\x00\x00WAVE"), chunkOf("fmt ", "abcd")...), []string{"fmt"}},
		"huge chunk":      {change(func(w *wavSpec) { w.before = []byte("LIST\xf0\xff\xff\xff") }), []string{"cut short", "LIST"}},
		"wrong block":     {bytes.Replace(good, []byte("\x02\x00\x10\x00data"), []byte("\x04\x00\x10\x00data"), 1), []string{"contradicts"}},
		"open, odd":       {change(func(w *wavSpec) { w.data, w.dataSize = samples[:319], 0xFFFFFFFF }), []string{"odd"}},
		"open, no sample": {change(func(w *wavSpec) { w.data, w.dataSize = nil, 0xFFFFFFFF }), []string{"no samples"}},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, o.Check(inline(c.data)), errors.CodeInvalidJob, errors.PhaseJob, append(c.words, "audio.inline")...)
		})
	}
}

func TestWAVsAsWritersMakeThemAreUnderstood(t *testing.T) {
	o := newOpener(t, Options{})
	samples := clip.WAV[44 : 44+3200*3+200]
	for name, do := range map[string]func(w *wavSpec){
		"extensible":            func(w *wavSpec) { w.extensible = true },
		"LIST before fmt":       func(w *wavSpec) { w.before = chunkOf("LIST", "abcd") },
		"odd chunk, padded":     func(w *wavSpec) { w.before = append(chunkOf("LIST", "abc"), 0) },
		"odd chunk, unpadded":   func(w *wavSpec) { w.before = chunkOf("LIST", "abc") },
		"chunks after":          func(w *wavSpec) { w.after = chunkOf("LIST", "abcd") },
		"streamed, 0":           func(w *wavSpec) { w.dataSize, w.riffSize = 0, 0 },
		"streamed, 0, RIFF 36":  func(w *wavSpec) { w.dataSize, w.riffSize = 0, 36 },
		"streamed, RIFF closed": func(w *wavSpec) { w.dataSize = 0 },
		"streamed, ffmpeg":      func(w *wavSpec) { w.dataSize, w.riffSize = 0xFFFFFFFF, 0xFFFFFFFF },
		"streamed, espeak-ng":   func(w *wavSpec) { w.dataSize, w.riffSize = 0x7FFFF000, 0x7FFFF024 },
		"RIFF size too small":   func(w *wavSpec) { w.riffSize = 4 },
	} {
		t.Run(name, func(t *testing.T) {
			w := plainWAV(samples)
			do(&w)
			h, _ := mustHear(t, o, inline(w.bytes()))
			if !bytes.Equal(h.data, samples) {
				t.Errorf("%d bytes, want %d as they were", len(h.data), len(samples))
			}
		})
	}
}

func TestConvertBringsWAVsTo16BitMono(t *testing.T) {
	o := newOpener(t, Options{Convert: true})
	le := binary.LittleEndian
	float := func(values ...float64) (b []byte) {
		for _, v := range values {
			b = le.AppendUint32(b, math.Float32bits(float32(v)))
		}
		return b
	}
	double := func(values ...float64) (b []byte) {
		for _, v := range values {
			b = le.AppendUint64(b, math.Float64bits(v))
		}
		return b
	}
	for _, c := range []struct {
		name                string
		tag, channels, bits int
		data                []byte
		want                []int16
	}{
		{"stereo 16-bit to mono 16-bit", wavPCM, 2, 16, []byte{0x00, 0x10, 0x00, 0x20, 0xFF, 0x7F, 0xFF, 0x7F, 0x00, 0x80, 0x00, 0x80}, []int16{0x1800, 32767, -32768}},
		{"mono 8-bit to mono 16-bit", wavPCM, 1, 8, []byte{0, 128, 255}, []int16{-32768, 0, 32512}},
		{"mono 24-bit to mono 16-bit", wavPCM, 1, 24, []byte{0, 0, 0x80, 0xFF, 0xFF, 0x7F, 0x7F, 0x01, 0x00, 0x80, 0x01, 0x00}, []int16{-32768, 32767, 1, 2}},
		{"stereo 24-bit to mono 16-bit", wavPCM, 2, 24, []byte{0, 0, 0x10, 0, 0, 0x20}, []int16{0x1800}},
		{"mono 32-bit to mono 16-bit", wavPCM, 1, 32, []byte{0, 0, 0, 0x80, 0, 0, 1, 0}, []int16{-32768, 1}},
		{"mono 32-bit float to mono 16-bit", wavFloat, 1, 32, float(-1, 0, 0.5, 1, 7, -7, math.NaN(), math.Inf(1)), []int16{-32768, 0, 16384, 32767, 32767, -32768, 0, 32767}},
		{"stereo 32-bit float to mono 16-bit", wavFloat, 2, 32, float(0.5, -0.5, 1, 0), []int16{0, 16384}},
		{"mono 64-bit float to mono 16-bit", wavFloat, 1, 64, double(-0.5, 0.25), []int16{-16384, 8192}},
	} {
		for _, extensible := range []bool{false, true} {
			w := plainWAV(c.data)
			w.tag, w.channels, w.bits, w.extensible = c.tag, c.channels, c.bits, extensible
			h, s := mustHear(t, o, inline(w.bytes()))
			if s.Converted() != c.name {
				t.Errorf("Converted is %q, want %q", s.Converted(), c.name)
			}
			got := make([]int16, len(h.data)/2)
			for i := range got {
				got[i] = int16(le.Uint16(h.data[i*2:]))
			}
			if len(got) != len(c.want) {
				t.Fatalf("%s: got %v, want %v", c.name, got, c.want)
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Errorf("%s: got %v, want %v", c.name, got, c.want)
					break
				}
			}
		}
	}
	w := plainWAV(make([]byte, 120))
	w.channels = 6
	wantError(t, o.Check(inline(w.bytes())), errors.CodeInvalidJob, errors.PhaseJob, "6 channels")
	w.channels, w.bits, w.data = 2, 24, make([]byte, 100)
	wantError(t, o.Check(inline(w.bytes())), errors.CodeInvalidJob, errors.PhaseJob, "no multiple of 6")
}

// FuzzWAV: no input panics or yields more than it holds, and a valid WAV's
// samples come out as they went in, whatever the chunk's length.
func FuzzWAV(f *testing.F) {
	f.Add(clip.WAV[:4000], true)
	f.Add(plainWAV([]byte("abcdef")).bytes(), false)
	streamed := plainWAV([]byte("abcdef"))
	streamed.dataSize, streamed.riffSize = 0, 0
	f.Add(streamed.bytes(), true)
	stereo := plainWAV(make([]byte, 24))
	stereo.channels, stereo.bits, stereo.extensible = 2, 24, true
	f.Add(stereo.bytes(), true)
	listed := plainWAV(make([]byte, 24))
	listed.before = chunkOf("LIST", "abc")
	f.Add(listed.bytes(), true)
	f.Fuzz(func(t *testing.T, data []byte, convert bool) {
		o := New(Options{Convert: convert, Chunk: 1e6})
		defer o.Close()
		spec := inline(data)
		spec.Format = "wav"
		if s, err := o.Open(t.Context(), spec); err == nil {
			h, err := listen(t, s)
			if len(h.data) > 2*len(data) {
				t.Errorf("%d bytes became %d", len(data), len(h.data))
			}
			if s.Converted() == "" && !bytes.Contains(data, h.data) {
				t.Error("what came out is not a piece of what went in")
			}
			if checked := o.Check(spec); (checked == nil) != (err == nil) {
				t.Errorf("Check says %v, reading %v", checked, err)
			}
		}
		samples := data[:len(data)&^1]
		if len(samples) == 0 {
			return
		}
		h, _ := mustHear(t, o, inline(plainWAV(samples).bytes()))
		if !bytes.Equal(h.data, samples) {
			t.Error("the samples of a valid WAV were changed")
		}
	})
}
