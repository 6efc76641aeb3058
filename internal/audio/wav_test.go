package audio

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/audio/sniff"
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
			h, _ := mustRead(t, o, inline(w.bytes()))
			if !bytes.Equal(h.data, samples) {
				t.Errorf("%d bytes, want %d as they were", len(h.data), len(samples))
			}
		})
	}
}

// samplesLike are n bytes of speech of each kind that could be mistaken.
func samplesLike(n int) map[string][]byte {
	tone := make([]byte, 0, n)
	quiet := make([]byte, 0, n)
	square := make([]byte, 0, n)
	for i := range n / 2 {
		at := math.Sin(2 * math.Pi * float64(i) / 37)
		tone = binary.LittleEndian.AppendUint16(tone, uint16(int16(32767*at)))
		quiet = binary.LittleEndian.AppendUint16(quiet, uint16(int16(3*at)))
		square = binary.LittleEndian.AppendUint16(square, uint16(int16(math.Copysign(0x6161, at))))
	}
	return map[string][]byte{
		"noise": noise(n, uint64(n)), "loud": tone, "quiet": quiet, "square": square, "silence": make([]byte, n),
		"as loud as it goes": bytes.Repeat([]byte{0xff, 0x7f}, n/2), "full and empty": bytes.Repeat([]byte{0xff, 0xff, 0, 0x80}, n/4),
	}
}

func TestSpeechOfAnyKindIsTakenAtEachRate(t *testing.T) {
	o := newOpener(t, Options{Convert: true})
	for _, rate := range PCM.rates() {
		for _, n := range []int{8, 32, 128, 512, 9600, 40000} {
			for name, samples := range samplesLike(n) {
				spec := inline(samples)
				spec.SampleRate = rate
				if h, _ := mustRead(t, o, spec); !bytes.Equal(h.data, samples) {
					t.Errorf("%s, %d bytes raw at %d Hz: %d", name, n, rate, len(h.data))
				}
				for _, open := range []bool{false, true} {
					w := plainWAV(samples)
					w.rate = rate
					if open {
						w.dataSize, w.riffSize = 0xFFFFFFFF, 0xFFFFFFFF
					}
					if h, _ := mustRead(t, o, inline(w.bytes())); !bytes.Equal(h.data, samples) {
						t.Errorf("%s, %d bytes in a WAV at %d Hz, open %t: %d", name, n, rate, open, len(h.data))
					}
					w.bits = 8
					if h, _ := mustRead(t, o, inline(w.bytes())); len(h.data) != 2*len(samples) {
						t.Errorf("%s, %d bytes in an 8-bit WAV at %d Hz, open %t: %d", name, n, rate, open, len(h.data))
					}
				}
			}
		}
	}
}

// placeholders are headers whose writer could not know the length.
func placeholders() map[string]func(w *wavSpec) {
	said := func(n int64) func(w *wavSpec) {
		return func(w *wavSpec) { w.dataSize, w.riffSize = n, n+36 }
	}
	return map[string]func(w *wavSpec){
		"2,000,000,000":    said(2_000_000_000),
		"1,000,000,000":    said(1_000_000_000),
		"999,999,999":      said(999_999_999),
		"0x7FFFFF00":       said(0x7FFFFF00),
		"0x3FFFFFFF":       said(0x3FFFFFFF),
		"0x10000000":       said(0x10000000),
		"100,000,000":      said(100_000_000),
		"an hour":          said(3600 * 48000 * 2),
		"odd":              said(1_500_000_001),
		"RIFF not written": func(w *wavSpec) { w.dataSize, w.riffSize = 5_000_000, 0 },
		"RIFF unchanged":   func(w *wavSpec) { w.dataSize, w.riffSize = 5_000_000, 36 },
		"RIFF open":        func(w *wavSpec) { w.dataSize, w.riffSize = 10_000_000, 0xFFFFFFFF },
		"data alone":       func(w *wavSpec) { w.dataSize = 2_000_000_000 },
	}
}

// fromEverywhere opens data inline, as an object, and at URLs with and without a
// length.
func fromEverywhere(t *testing.T, data []byte, opts Options, do func(t *testing.T, o *Opener, spec Spec)) {
	t.Helper()
	js, store := objectStores(t, "SPEECH")
	put(t, store, "a.wav", data)
	net := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/chunked" {
			write(t, w, data[:10])
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			write(t, w, data[10:])
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		write(t, w, data)
	})
	opts.Objects, opts.DefaultBucket = JetStreamObjects(js), "SPEECH"
	o := net.opener(t, opts)
	for _, spec := range []Spec{inline(data), {Object: "a.wav", Field: "audio"}, at("http://example.com/a"), at("http://example.com/chunked")} {
		do(t, o, spec)
	}
}

func TestALengthThatItsWriterCouldNotKnowMeansTheEndOfTheFile(t *testing.T) {
	samples := clip.WAV[44 : 44+24000]
	for name, do := range placeholders() {
		t.Run(name, func(t *testing.T) {
			w := plainWAV(samples)
			w.rate = 48000
			do(&w)
			fromEverywhere(t, w.bytes(), Options{}, func(t *testing.T, o *Opener, spec Spec) {
				h, s := mustRead(t, o, spec)
				if total, known := s.Total(); !bytes.Equal(h.data, samples) || !known || total != 250*time.Millisecond {
					t.Errorf("%+v: %d bytes, %s %t", Spec{Object: spec.Object, URL: spec.URL}, len(h.data), total, known)
				}
			})
		})
	}
	h, s := mustRead(t, newOpener(t, Options{MaxBytes: 4 << 30}), inline(field(t, "pocket_2e9.wav")))
	if len(h.data) != 48000 || s.SampleRate() != 24000 {
		t.Errorf("%d bytes at %d Hz", len(h.data), s.SampleRate())
	}
}

// Some writers give the size of the file as that of its samples.
func TestALengthThatCountsTheHeaderTooMeansTheEndOfTheFile(t *testing.T) {
	samples := clip.WAV[44 : 44+24000]
	n := int64(len(samples))
	for name, sizes := range map[string][2]int64{ // of RIFF and data
		"RIFF right":     {n + 36, n + 36},
		"RIFF right, 44": {n + 36, n + 44},
		"both the file":  {n + 44, n + 44},
		"both less 8":    {n + 36 + 36, n + 36},
	} {
		t.Run(name, func(t *testing.T) {
			w := plainWAV(samples)
			w.rate, w.riffSize, w.dataSize = 48000, sizes[0], sizes[1]
			fromEverywhere(t, w.bytes(), Options{}, func(t *testing.T, o *Opener, spec Spec) {
				if h, _ := mustRead(t, o, spec); !bytes.Equal(h.data, samples) {
					t.Errorf("%+v: %d bytes", Spec{Object: spec.Object, URL: spec.URL}, len(h.data))
				}
			})
		})
	}
}

func TestAFileThatWasCutShortIsNotTakenForOneOfOpenLength(t *testing.T) {
	samples := make([]byte, 96000*10)
	for name, c := range map[string]struct {
		spec  func(w *wavSpec)
		there int
		opts  Options
	}{
		"the last sample":         {func(*wavSpec) {}, len(samples) - 2, Options{}},
		"half":                    {func(*wavSpec) {}, len(samples) / 2, Options{}},
		"nearly all":              {func(*wavSpec) {}, 100, Options{}},
		"ten minutes":             {func(w *wavSpec) { w.dataSize, w.riffSize = 600*96000, 600*96000+36 }, len(samples), Options{}},
		"small limit":             {func(*wavSpec) {}, 10000, Options{MaxBytes: 100_000}},
		"large limit":             {func(w *wavSpec) { w.dataSize, w.riffSize = 100<<20, 100<<20+36 }, len(samples), Options{MaxBytes: 200 << 20}},
		"large, half":             {func(w *wavSpec) { w.dataSize, w.riffSize = 66<<20, 66<<20+36 }, 33 << 20, Options{}},
		"RIFF not written, half":  {func(w *wavSpec) { w.riffSize = 0 }, len(samples) / 2, Options{}},
		"RIFF open, but the last": {func(w *wavSpec) { w.riffSize = 0xFFFFFFFF }, len(samples) - 2, Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := plainWAV(samples)
			w.rate = 48000
			c.spec(&w)
			if c.there > len(samples) {
				w.data = make([]byte, c.there)
			}
			data := w.bytes()[:44+c.there]
			spec := inline(data)
			e := wantError(t, openAndRead(t, newOpener(t, c.opts), spec), errors.CodeInvalidJob, errors.PhaseJob, "cut short")
			if !strings.Contains(e.Message, strconv.Itoa(c.there)) {
				t.Errorf("%s", e.Message)
			}
		})
	}
}

func TestAnOpenLengthIsBoundedByTheLimit(t *testing.T) {
	w := plainWAV(make([]byte, 200_000))
	w.dataSize, w.riffSize = 2_000_000_000, 2_000_000_036
	fromEverywhere(t, w.bytes(), Options{MaxBytes: 100_000}, func(t *testing.T, o *Opener, spec Spec) {
		code, phase := errors.CodeAudioUnavailable, errors.PhaseAudio
		if spec.HasInline {
			code, phase = errors.CodeInvalidJob, errors.PhaseJob
		}
		wantError(t, openAndRead(t, o, spec), code, phase, "100000")
	})
}

func TestASecondWAVInAFileIsRefused(t *testing.T) {
	one := plainWAV(clip.WAV[44 : 44+9600]).bytes()
	streamed := plainWAV(clip.WAV[44 : 44+9600])
	streamed.dataSize, streamed.riffSize = 0, 0
	listed := plainWAV(clip.WAV[44 : 44+9600])
	listed.after = chunkOf("LIST", "INFOabcd")
	for name, data := range map[string][]byte{
		"open":           field(t, "joined_open.wav"),
		"both streamed":  append(streamed.bytes(), streamed.bytes()...),
		"after a closed": append(slices.Clone(one), one...),
		"after a list":   slices.Concat(listed.bytes(), one),
		"inside":         plainWAV(slices.Concat(clip.WAV[44:44+9600], one, clip.WAV[44:44+9600])).bytes(),
		"wrapped":        plainWAV(one).bytes(),
	} {
		fromEverywhere(t, data, Options{}, func(t *testing.T, o *Opener, spec Spec) {
			if err := openAndRead(t, o, spec); err == nil && spec.URL == "http://example.com/chunked" && strings.HasPrefix(name, "after") {
				return // what follows is not waited for
			}
			phase := errors.PhaseAudio
			if spec.HasInline {
				phase = errors.PhaseJob
			}
			wantError(t, openAndRead(t, o, spec), errors.CodeInvalidJob, phase, "another WAV")
		})
	}
}

func TestASecondDataChunkIsRefused(t *testing.T) {
	samples := clip.WAV[44 : 44+9600]
	second := chunkOf("data", string(samples[:400]))
	for name, c := range map[string]struct {
		bits  int
		data  []byte
		after []byte
		taken bool
	}{
		"at once":                {16, samples, second, false},
		"behind a list":          {16, samples, slices.Concat(chunkOf("LIST", "INFOabcd"), second), false},
		"behind an odd list":     {16, samples, slices.Concat(chunkOf("LIST", "INFOabc"), []byte{0}, second), false},
		"of open length":         {16, samples, []byte("data\x00\x00\x00\x00\x01\x02\x03\x04"), false},
		"cut short":              {16, samples, second[:100], false},
		"odd samples, padded":    {8, samples[:9599], slices.Concat([]byte{0}, second), false},
		"odd samples, unpadded":  {8, samples[:9599], second, false},
		"empty":                  {16, samples, chunkOf("data", ""), true},
		"empty, with a list":     {16, samples, slices.Concat(chunkOf("data", ""), chunkOf("LIST", "INFOabcd")), true},
		"lists":                  {16, samples, slices.Concat(chunkOf("LIST", "INFOabcd"), chunkOf("id3 ", "ID3")), true},
		"a list that is cut off": {16, samples, chunkOf("LIST", "INFOabcd")[:14], true},
		"no chunk":               {16, samples, noise(5000, 1), true},
		"zeros":                  {16, samples, make([]byte, 5000), true},
		"a tag":                  {16, samples, tagOf(100), true},
		"another tag":            {16, samples, tag1(), true},
	} {
		w := plainWAV(c.data)
		w.bits, w.after = c.bits, c.after
		fromEverywhere(t, w.bytes(), Options{Convert: true}, func(t *testing.T, o *Opener, spec Spec) {
			err := openAndRead(t, o, spec)
			if c.taken || spec.URL == "http://example.com/chunked" { // there, what follows is not waited for
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				return
			}
			phase := errors.PhaseAudio
			if spec.HasInline {
				phase = errors.PhaseJob
			}
			wantError(t, err, errors.CodeInvalidJob, phase, "second data chunk")
		})
	}
}

// tagOf is an ID3v2 tag of n bytes.
func tagOf(n int) []byte {
	tag := append([]byte("ID3\x04\x00\x00\x00\x00\x00\x00TIT2\x00\x00\x00\x08\x00\x00\x03a title"), make([]byte, n)...)[:n]
	tag[9] = byte(n - 10)
	return tag
}

// tag1 is an ID3v1 tag.
func tag1() []byte { return append([]byte("TAGa title"), make([]byte, 118)...) }

func TestATagBehindAWAVOfOpenLengthIsNotPlayed(t *testing.T) {
	for _, n := range []int{9600, 3200, 3198, 3190, 3072, 2, 20000} {
		samples := clip.WAV[44 : 44+n]
		for name, tag := range map[string][]byte{
			"ID3v2":       tagOf(100),
			"ID3v1":       tag1(),
			"both":        append(tagOf(100), tag1()...),
			"a list":      chunkOf("LIST", "INFOINAM\x04\x00\x00\x00abcd"),
			"an ID3 list": chunkOf("id3 ", string(tagOf(100))),
			"APE":         append([]byte("APETAGEX\xd0\x07\x00\x00"), make([]byte, 20)...),
		} {
			w := plainWAV(append(slices.Clone(samples), tag...))
			w.rate, w.dataSize, w.riffSize = 16000, 0xFFFFFFFF, 0xFFFFFFFF
			fromEverywhere(t, w.bytes(), Options{}, func(t *testing.T, o *Opener, spec Spec) {
				h, s := mustRead(t, o, spec)
				if total, known := s.Total(); !bytes.Equal(h.data, samples) || !known || total != time.Duration(n/2)*time.Second/16000 {
					t.Errorf("%s behind %d bytes: %d bytes, %s", name, n, len(h.data), total)
				}
			})
		}
	}
	w := plainWAV(tag1())
	w.dataSize, w.riffSize = 0xFFFFFFFF, 0xFFFFFFFF
	wantError(t, newOpener(t, Options{}).Check(inline(w.bytes())), errors.CodeInvalidJob, errors.PhaseJob, "no samples")
}

func TestTheByteThatPadsAnOddChunkMayHaveAnyValue(t *testing.T) {
	h, s := mustRead(t, newOpener(t, Options{}), inline(field(t, "list_odd_pad_nonzero.wav")))
	if len(h.data) != 48000 || s.SampleRate() != 24000 {
		t.Errorf("%d bytes at %d Hz", len(h.data), s.SampleRate())
	}
	o := newOpener(t, Options{})
	samples := clip.WAV[44 : 44+6400]
	for pad := range 256 {
		for _, id := range []string{"LIST", "abcd"} {
			for _, next := range [][]byte{nil, chunkOf("efgh", "ij"), chunkOf("data", "")[:0]} {
				w := plainWAV(samples)
				w.before = slices.Concat(chunkOf(id, "odd"), []byte{byte(pad)}, next)
				h, _ := mustRead(t, o, inline(w.bytes()))
				if !bytes.Equal(h.data, samples) {
					t.Fatalf("pad %d after %s: %d bytes", pad, id, len(h.data))
				}
			}
		}
	}
	// Where it is missing, whatever length the next chunk has.
	for n := 0; n < 600; n += 2 {
		w := plainWAV(samples[:2+n])
		w.before = chunkOf("LIST", "odd")
		h, _ := mustRead(t, o, inline(w.bytes()))
		if !bytes.Equal(h.data, samples[:2+n]) {
			t.Fatalf("%d bytes of samples, without a pad: %d", 2+n, len(h.data))
		}
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
			h, s := mustRead(t, o, inline(w.bytes()))
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
	wantError(t, o.Check(inline(w.bytes())), errors.CodeInvalidJob, errors.PhaseJob, "not a multiple of 6")
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
		if len(samples) == 0 || sniff.WAVHeader(samples) >= 0 {
			return
		}
		h, _ := mustRead(t, o, inline(plainWAV(samples).bytes()))
		if !bytes.Equal(h.data, samples) {
			t.Error("the samples of a valid WAV were changed")
		}
	})
}
