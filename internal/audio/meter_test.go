package audio

import (
	"context"
	"slices"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
)

// measured is the length of speech that comes in pieces of that many bytes.
func measured(data []byte, piece int) (m opusMeter, length time.Duration) {
	for part := range slices.Chunk(data, max(piece, 1)) {
		length += m.measure(part)
	}
	return m, length
}

func TestLiveOpusIsAsLongAsItsFileHoweverItIsCut(t *testing.T) {
	o := New(Options{})
	defer o.Close()
	speech, err := o.Open(context.Background(), Spec{Inline: clip.Opus, HasInline: true})
	if err != nil {
		t.Fatal(err)
	}
	want, _ := speech.Total()
	const packet = 60 * time.Millisecond // the file may say that its last is cut
	for _, piece := range []int{1, 7, 26, 27, 28, 1000, 4096, len(clip.Opus)} {
		m, got := measured(clip.Opus, piece)
		if got < want || got > want+packet || len(m.rest) != 0 {
			t.Errorf("in pieces of %d: %s, want %s; %d bytes left", piece, got, want, len(m.rest))
		}
	}
	// Speech that is taken up in its middle, and another stream after it.
	half, _ := measured(clip.Opus[len(clip.Opus)/2:], 512)
	_, got := measured(slices.Concat(clip.Opus[len(clip.Opus)/2:], clip.Opus), 512)
	if got < want || len(half.rest) != 0 || got > 2*want {
		t.Errorf("half of it and all of it: %s", got)
	}
}

func FuzzOpusMeter(f *testing.F) {
	f.Add(clip.Opus, 100)
	f.Add([]byte("OggS and nothing else, but for this and that, and more of it"), 3)
	f.Add(slices.Concat([]byte("noise"), clip.Opus[:300], []byte("OggOgg"), clip.Opus), 13)
	f.Fuzz(func(t *testing.T, data []byte, piece int) {
		m, length := measured(data, piece)
		_, whole := measured(data, len(data))
		// Each piece's length is rounded down.
		if off := whole - length; off < 0 || off > time.Duration(len(data)) || len(m.rest) > oggMaxPage {
			t.Errorf("%s in pieces of %d, %s as a whole; %d bytes kept", length, piece, whole, len(m.rest))
		}
		if most := time.Duration(len(data)) * 120 * time.Millisecond; whole < 0 || whole > most {
			t.Errorf("%d bytes are %s", len(data), whole)
		}
	})
}
