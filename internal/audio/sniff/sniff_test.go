package sniff

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"avatarworker/internal/audio/clip"
)

// noise is n bytes that look like nothing.
func noise(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestEachSignatureIsLookedFor(t *testing.T) {
	for _, s := range signatures() {
		if !strings.Contains(signatureStarts, s.magic[:1]) {
			t.Errorf("%s: %q is not among the first bytes", s.Name, s.magic)
		}
	}
	for _, c := range signatureStarts {
		if !slices.ContainsFunc(signatures(), func(s signature) bool { return s.magic[0] == byte(c) }) && c != '\uFFFD' {
			t.Errorf("no signature begins with %q", c)
		}
	}
}

// samplesOf are raw PCM that a recogniser of files could trip over.
func samplesOf(r *rand.Rand) []byte {
	n := 1 + r.IntN(6000)
	if r.IntN(4) == 0 {
		n = 1 + r.IntN(40)
	}
	b := make([]byte, 0, 2*n)
	add := func(v float64) {
		b = binary.LittleEndian.AppendUint16(b, uint16(int16(max(-32768, min(32767, v)))))
	}
	loud := math.Exp2(15 * r.Float64())
	period := 2 + r.IntN(1000)
	kind := r.IntN(8)
	for i := range n {
		phase := float64(i%period) / float64(period)
		switch kind {
		case 0: // silence, or a constant
			add(math.Trunc(loud) * float64(n%2))
		case 1: // white noise
			add((2*r.Float64() - 1) * loud)
		case 2: // a square wave
			add(math.Copysign(loud, phase-0.5))
		case 3:
			add(loud * math.Sin(2*math.Pi*phase))
		case 4: // a saw
			add(loud * (2*phase - 1))
		case 5: // a square wave with steps: as many levels as text has letters
			add(loud * math.Round(8*math.Sin(2*math.Pi*phase)) / 8)
		case 6: // a tone with a little noise
			add(loud*math.Sin(2*math.Pi*phase) + r.NormFloat64()*3)
		case 7: // a pulse
			add(loud * float64(max(0, 1-i%period)))
		}
	}
	return b
}

func TestPCMIsNeverTakenForAnythingElse(t *testing.T) {
	rounds := 6000
	if os.Getenv("AVATAR_LONG") != "" {
		rounds = 400_000
	}
	unlucky := [][]byte{
		{0xff, 0xfb, 0x90, 0x64}, {0xff, 0xf3, 0x44, 0xc4}, {0xff, 0xf1, 0x50, 0x80}, {0x1f, 0x8b, 0x08, 0x00}, {0x47, 0x40},
		[]byte("RI"), []byte("Og"), []byte("ID"), []byte("{\""), []byte("<?"), []byte("BM"), []byte("PK\x03\x04"), {0x1a, 0x45, 0xdf, 0xa3},
		[]byte(".snd"), []byte("FORM"), []byte("FRM8"), []byte("HTTP"), []byte("--"), {0xff, 0xfe}, {0xfe, 0xff}, {0xff, 0xd8, 0xff}, {0x0b, 0x77}, {0x56, 0xe0}, []byte("\x00\x00\x00\x20ft"),
	}
	for seed := range uint64(rounds) {
		r := rand.New(rand.NewPCG(seed, 7))
		b := samplesOf(r)
		if r.IntN(2) == 0 {
			copy(b, unlucky[r.IntN(len(unlucky))])
		}
		if r.IntN(8) == 0 { // again and again: a wave with this period
			period := slices.Concat(unlucky[r.IntN(5)], noise(2*r.IntN(300), seed))
			for i := range b {
				b[i] = period[i%len(period)]
			}
		}
		head := b[:min(len(b), Size)]
		if kind, found := Detect(head); found {
			t.Fatalf("seed %d: %d bytes %x… are taken for %s", seed, len(b), b[:min(len(b), 24)], kind.Name)
		}
		if kind, found := Short(b); found {
			t.Fatalf("seed %d: %d bytes %x… are taken for %s as a whole", seed, len(b), b[:min(len(b), 24)], kind.Name)
		}
		if at := Tag(b, true); at >= 0 {
			t.Fatalf("seed %d: a tag at %d", seed, at)
		}
		if at, what := Before(head); at > 0 {
			t.Fatalf("seed %d: %s at %d", seed, what, at)
		}
		var w WAVHeaders
		for piece := range slices.Chunk(b, 1+r.IntN(3000)) {
			if at := w.Find(piece); at >= 0 {
				t.Fatalf("seed %d: a header at %d", seed, at)
			}
		}
	}
}

func TestAHeaderInsideIsFoundHoweverTheSamplesAreCut(t *testing.T) {
	data := slices.Concat(noise(100, 1), clip.WAV[:60], noise(100, 2))
	for size := 1; size < len(data); size++ {
		var w WAVHeaders
		found := int64(-1)
		for piece := range slices.Chunk(data, size) {
			if at := w.Find(piece); at >= 0 && found < 0 {
				found = at
			}
		}
		if found != 100 {
			t.Errorf("in pieces of %d bytes: %d", size, found)
		}
	}
}

// BenchmarkDetect is what each utterance of raw PCM, and each live message, costs.
func BenchmarkDetect(b *testing.B) {
	for name, head := range map[string][]byte{
		"speech": clip.WAV[44 : 44+Size], "noise": noise(Size, 1), "silence": make([]byte, Size), "short": clip.WAV[4000:4030],
		"text": []byte(strings.Repeat("upstream connect error or disconnect/reset before headers. ", 100)),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Detect(head)
			}
		})
	}
}
