package audio

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"strconv"
	"testing"
	"time"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/errors"
)

// pages takes a good file apart.
func pages(t testing.TB, file []byte) [][]byte {
	t.Helper()
	r := newOggReader(&input{}, bufio.NewReader(bytes.NewReader(file)))
	var all [][]byte
	for {
		p, err := r.next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, slices.Clone(p.raw))
	}
}

// seal recomputes a page's checksum.
func seal(page []byte) []byte {
	o := &oggReader{buf: page, crc: crcTable()}
	binary.LittleEndian.PutUint32(page[22:], o.checksum())
	return page
}

// edited is the clip with one page changed and sealed again.
func edited(t testing.TB, page int, do func(page []byte)) []byte {
	t.Helper()
	all := pages(t, clip.Opus)
	do(all[page])
	seal(all[page])
	return slices.Concat(all...)
}

func TestOpusIsPassedThroughInGroupsOfPages(t *testing.T) {
	for _, c := range []struct {
		chunk  time.Duration
		chunks int
	}{{100 * time.Millisecond, 34}, {time.Second, 4}} {
		h, s := mustRead(t, newOpener(t, Options{Chunk: c.chunk}), inline(clip.Opus))
		if s.Format() != OggOpus || s.SampleRate() != 24000 || s.Converted() != "" {
			t.Errorf("got %s at %d Hz", s.Format(), s.SampleRate())
		}
		if !bytes.Equal(h.data, clip.Opus) {
			t.Error("the file's bytes were changed")
		}
		// opusinfo says 3.354 s.
		if h.length < 3354*time.Millisecond || h.length > 3355*time.Millisecond {
			t.Errorf("length %s", h.length)
		}
		if n := len(h.chunks); n < c.chunks-1 || n > c.chunks+1 {
			t.Errorf("%d chunks of %s, want about %d", n, c.chunk, c.chunks)
		}
	}
}

func TestOpusRateIsTheJobsOrTheLeastThatLosesNothing(t *testing.T) {
	for _, c := range []struct{ job, original, want int }{
		{0, 24000, 24000}, {16000, 24000, 16000}, {0, 0, 48000}, {0, 22050, 24000},
		{0, 44100, 48000}, {0, 96000, 48000}, {0, 4000, 8000}, {0, -5, 48000},
	} {
		if got := opusRate(c.job, c.original); got != c.want {
			t.Errorf("job %d, original %d: %d Hz, want %d", c.job, c.original, got, c.want)
		}
	}
	unknown := inline(edited(t, 0, func(p []byte) { binary.LittleEndian.PutUint32(p[28+12:], 0) }))
	unknown.SampleRate = 16000
	if _, s := mustRead(t, newOpener(t, Options{}), unknown); s.SampleRate() != 16000 {
		t.Errorf("got %d Hz", s.SampleRate())
	}
	cd := inline(edited(t, 0, func(p []byte) { binary.LittleEndian.PutUint32(p[28+12:], 44100) }))
	cd.SampleRate = 48000 // the least that holds it
	if _, s := mustRead(t, newOpener(t, Options{}), cd); s.SampleRate() != 48000 {
		t.Errorf("got %d Hz", s.SampleRate())
	}
}

func TestOpusThatWasMadeAtAnotherRateThanTheJobSaysIsRefused(t *testing.T) {
	spec := inline(clip.Opus)
	for _, rate := range []int{8000, 16000, 48000} {
		spec.SampleRate = rate
		wantError(t, newOpener(t, Options{}).Check(spec), errors.CodeInvalidJob, errors.PhaseJob, "24000 Hz", strconv.Itoa(rate)+" Hz", "audio.sample_rate")
	}
	spec.SampleRate = 24000
	mustRead(t, newOpener(t, Options{}), spec)
}

func TestBrokenOggIsAnInvalidJobThatNamesWhatIsWrong(t *testing.T) {
	all := pages(t, clip.Opus)
	head := len(all[0])
	flip := slices.Clone(clip.Opus)
	flip[5000] ^= 1
	missing := slices.Concat(slices.Concat(all[:5]...), slices.Concat(all[6:]...))
	for name, c := range map[string]struct {
		data []byte
		word string
	}{
		"cut in a page":       {clip.Opus[:len(clip.Opus)/2], "cut short"},
		"cut in a header":     {clip.Opus[:head+10], "cut short"},
		"bit flipped":         {flip, "checksum"},
		"junk after":          {append(slices.Clone(clip.Opus), "junk that is longer than a header"...), "no page begins"},
		"page missing":        {missing, "follows page"},
		"chained":             {slices.Concat(clip.Opus, clip.Opus), "more than one logical stream"},
		"headers only":        {slices.Concat(all[:2]...), "no speech"},
		"no tags":             {slices.Concat(all[0], seal(renumbered(all[2], 1))), "OpusTags"},
		"starts in the midst": {slices.Concat(all[2:]...), "first page"},
		"stereo":              {edited(t, 0, func(p []byte) { p[28+9] = 2 }), "2 channels"},
		"Opus version 16":     {edited(t, 0, func(p []byte) { p[28+8] = 16 }), "version 16"},
		"Vorbis":              {edited(t, 0, func(p []byte) { copy(p[28:], "\x01vorbis") }), "Vorbis"},
		"Ogg version 1":       {edited(t, 3, func(p []byte) { p[4] = 1 }), "version 1"},
		"other stream":        {edited(t, 3, func(p []byte) { p[14] ^= 1 }), "another logical stream"},
		"granule runs back":   {edited(t, 6, func(p []byte) { binary.LittleEndian.PutUint64(p[6:], 1) }), "runs back"},
		"granule negative":    {edited(t, 6, func(p []byte) { binary.LittleEndian.PutUint64(p[6:], 1<<63) }), "runs back"},
		"granule of years":    {edited(t, 6, func(p []byte) { binary.LittleEndian.PutUint64(p[6:], 1<<60) }), "24h"},
		"packet unfinished":   {edited(t, len(all)-1, func(p []byte) { unfinish(p) }), ""},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, newOpener(t, Options{}).Check(inline(c.data)), errors.CodeInvalidJob, errors.PhaseJob, c.word, "audio.inline")
		})
	}
}

func renumbered(page []byte, number uint32) []byte {
	page = slices.Clone(page)
	binary.LittleEndian.PutUint32(page[18:], number)
	return page
}

// unfinish lets the page's last packet go on on a page that never comes.
func unfinish(page []byte) { page[27+int(page[26])-1] = 255 }

func TestStreamWithoutItsLastFlagIsTaken(t *testing.T) {
	last := len(pages(t, clip.Opus)) - 1
	h, _ := mustRead(t, newOpener(t, Options{}), inline(edited(t, last, func(p []byte) { p[5] &^= oggLast })))
	if h.length < 3300*time.Millisecond {
		t.Errorf("length %s", h.length)
	}
}

func TestStreamRecordedFromTheMiddleIsAsLongAsItsOwnSpeech(t *testing.T) {
	all := pages(t, clip.Opus)
	for _, p := range all[2:] {
		granule := binary.LittleEndian.Uint64(p[6:])
		binary.LittleEndian.PutUint64(p[6:], granule+48000*3600)
		seal(p)
	}
	h, _ := mustRead(t, newOpener(t, Options{}), inline(slices.Concat(all...)))
	if h.length < 3354*time.Millisecond || h.length > 3355*time.Millisecond {
		t.Errorf("length %s", h.length)
	}
}

func TestTagsOverSeveralPagesAreFollowed(t *testing.T) {
	all := pages(t, clip.Opus)
	tags := append([]byte("OpusTags"), make([]byte, 255*300)...)
	serial := all[0][14:18]
	first := oggPageOf(serial, 1, 0, tags[:255*255], slices.Repeat([]byte{255}, 255))
	rest := tags[255*255:]
	segments := append(slices.Repeat([]byte{255}, len(rest)/255), byte(len(rest)%255))
	second := oggPageOf(serial, 2, 0x01, rest, segments)
	file := slices.Concat(all[0], first, second)
	for i, p := range all[2:] {
		file = append(file, seal(renumbered(p, uint32(3+i)))...)
	}
	h, _ := mustRead(t, newOpener(t, Options{}), inline(file))
	if !bytes.Equal(h.data, file) {
		t.Error("the file's bytes were changed")
	}
	if biggest := slices.Max(h.chunks); biggest > opusGroup+oggMaxPage {
		t.Errorf("a chunk has %d bytes", biggest)
	}
	if h.length < 3354*time.Millisecond || h.length > 3355*time.Millisecond {
		t.Errorf("length %s", h.length)
	}
}

func oggPageOf(serial []byte, number uint32, flags byte, body, segments []byte) []byte {
	p := append([]byte("OggS\x00"), flags)
	granule := uint64(0)
	if segments[len(segments)-1] == 255 {
		granule = 1<<64 - 1
	}
	p = binary.LittleEndian.AppendUint64(p, granule)
	p = append(p, serial...)
	p = binary.LittleEndian.AppendUint32(p, number)
	p = append(p, 0, 0, 0, 0, byte(len(segments)))
	return seal(slices.Concat(p, segments, body))
}

func TestPacketLengthsAreThoseOfTheRFC(t *testing.T) {
	for _, c := range []struct {
		packet []byte
		want   time.Duration
	}{
		{[]byte{0}, 10 * time.Millisecond},
		{[]byte{3 << 3}, 60 * time.Millisecond},
		{[]byte{12 << 3}, 10 * time.Millisecond},
		{[]byte{13<<3 | 1}, 40 * time.Millisecond},
		{[]byte{16 << 3}, 2500 * time.Microsecond},
		{[]byte{31<<3 | 3, 3}, 60 * time.Millisecond},
		{[]byte{31<<3 | 3}, 0},
		{nil, 0},
	} {
		if got := pcmLength(opusSamples(c.packet), opusClock); got != c.want {
			t.Errorf("%v: %s, want %s", c.packet, got, c.want)
		}
	}
}

// FuzzOgg: no input panics, a stream that is taken comes out as it went in, and
// no chunk is larger than its bound. Checksums are recomputed first: a fuzzer
// does not find them.
func FuzzOgg(f *testing.F) {
	f.Add(clip.Opus)
	all := pages(f, clip.Opus)
	f.Add(slices.Concat(all[:3]...))
	f.Add(slices.Concat(all[0], all[1], all[len(all)-1]))
	f.Fuzz(func(t *testing.T, data []byte) {
		data = resealed(data)
		o := New(Options{})
		defer o.Close()
		spec := inline(data)
		spec.Format = "ogg_opus"
		s, err := o.Open(t.Context(), spec)
		if err != nil {
			return
		}
		h, err := listen(t, s)
		if err != nil {
			t.Fatalf("Open read all of it, but Next says %v", err)
		}
		if !bytes.Equal(h.data, data) {
			t.Error("what came out is not what went in")
		}
		if len(h.chunks) > 0 && slices.Max(h.chunks) > opusGroup+oggMaxPage {
			t.Errorf("a chunk has %d bytes", slices.Max(h.chunks))
		}
		if h.length < 0 || h.length > maxSpeech {
			t.Errorf("length %s", h.length)
		}
	})
}

// resealed sets the checksums of all pages that can be found.
func resealed(data []byte) []byte {
	data = slices.Clone(data)
	for at := 0; at+oggHeaderSize <= len(data); {
		size := oggHeaderSize + int(data[at+26])
		if at+size > len(data) {
			break
		}
		for _, s := range data[at+oggHeaderSize : at+size] {
			size += int(s)
		}
		if at+size > len(data) {
			break
		}
		seal(data[at : at+size])
		at += size
	}
	return data
}
