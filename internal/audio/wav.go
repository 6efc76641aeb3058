package audio

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"avatarworker/internal/audio/sniff"
)

// What a WAV's fmt chunk can say.
const (
	wavPCM        = 0x0001
	wavFloat      = 0x0003
	wavALaw       = 0x0006
	wavMuLaw      = 0x0007
	wavExtensible = 0xFFFE

	// A length of this much or more is left open by a program that streams and
	// can't go back to fill it in: 0xFFFFFFFF (ffmpeg), 0x7FFFF000 (sox,
	// espeak-ng), 0x80000000 (arecord).
	wavOpenLength = 0x7FFF0000

	// Some write another length, which they can't know either. See openLength.
	wavTooMuch = defaultMaxBytes
	wavTooLong = 2 * time.Hour
	wavPart    = 4

	// wavAfter is how many bytes behind the samples are looked at.
	wavAfter = 1 << 20
)

// guidTail ends the GUIDs of WAVE_FORMAT_EXTENSIBLE whose first two bytes are a
// plain format tag.
const guidTail = "\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"

// wavHeader is what comes before a WAV's samples.
type wavHeader struct {
	tag      uint16 // wavPCM or wavFloat or one that is refused
	channels int
	rate     int
	frame    int // bytes of one sample of all channels
	bits     int
	data     int64 // bytes of samples; -1: up to the end of the file
}

// wavReader walks the chunks of a RIFF file up to the samples.
type wavReader struct {
	in   *input
	r    *bufio.Reader
	pos  int64
	end  int64 // where the RIFF header says that the file ends; -1: left open
	size int64 // where the file ends; -1: not known
	most int64 // bytes of a file that are accepted
}

func wavSpeech(in *input, src *source, r *bufio.Reader, opts Options) (*Speech, error) {
	w := &wavReader{in: in, r: r, size: src.size, most: opts.MaxBytes}
	h, err := w.header()
	if err != nil {
		return nil, err
	}
	if in.SampleRate != 0 && in.SampleRate != h.rate {
		return nil, in.broken("WAV is at %d Hz, but %s.sample_rate says %d Hz", h.rate, in.Field, in.SampleRate)
	}
	convert, converted, err := h.conversion(in, opts.Convert)
	if err != nil {
		return nil, err
	}
	if err := in.checkRate(h.rate, PCM); err != nil {
		return nil, err
	}
	open := w.openLength(h)
	if h.data > 0 && w.size >= 0 && open(w.size-w.pos) {
		h.data = -1
	}
	if err := w.checkSamples(h, open); err != nil {
		return nil, err
	}
	if h.data > src.max && !open(0) {
		return nil, in.tooLarge(src.name, src.max)
	}
	d := &pcmDecoder{in: in, what: "WAV", r: r, left: h.data, size: h.data, open: open, frame: h.frame, convert: convert, rate: h.rate}
	if h.data >= 0 && w.size >= 0 {
		d.after = func() error { return w.afterSamples(h.data) }
	}
	d.allocate(opts.Chunk)
	s := &Speech{src: src, decoder: d, format: PCM, rate: h.rate, converted: converted}
	if n := w.samples(h); n >= 0 && (w.size >= 0 || !open(0)) {
		// A tag behind samples of open length is not speech: see openInline.
		s.total, s.known = pcmLength(n/int64(h.frame), h.rate), h.data >= 0 || in.kind != kindInline
	}
	return s, nil
}

// openLength recognises a length of the samples that its writer could not know yet, as
// opposed to that of a file that was cut short: both reach beyond the end of the file.
// Two things have to come together. The length is not to be believed by itself: it is
// more than any speech that would be taken (wavTooMuch bytes and more than is accepted,
// or wavTooLong of speech), or the RIFF header around it is open as well. And the file
// holds a small part of it only, one of wavPart at most. What a broken transfer leaves
// says less or holds more. A file is also whole where it ends as its RIFF header says, or
// where the length counts the header too: some writers give the size of the file.
func (w *wavReader) openLength(h *wavHeader) func(there int64) bool {
	says := h.data
	// Open, or still that of a file without samples.
	unknown := w.end < 0 || w.end <= w.pos
	tooMuch := says > max(wavTooMuch, w.most) || pcmLength(says/int64(h.frame), h.rate) > wavTooLong
	return func(there int64) bool {
		return there <= says/wavPart && (unknown || tooMuch) ||
			there > 0 && there < says && (w.end == w.pos+there || says-there == w.pos || says-there == w.pos-8)
	}
}

// samples is how many bytes of them there are; -1: not known.
func (w *wavReader) samples(h *wavHeader) int64 {
	if h.data < 0 && w.size >= 0 {
		return w.size - w.pos
	}
	return h.data
}

// checkSamples refuses what can be known to be wrong before the samples are read.
func (w *wavReader) checkSamples(h *wavHeader, open func(there int64) bool) error {
	n := w.samples(h)
	if n < 0 || n > 0 && w.size < 0 && open(0) {
		if _, err := w.r.Peek(1); err == nil || !endOfFile(err) {
			return err
		}
		n = 0
	}
	switch {
	case n == 0:
		return w.in.broken("WAV has no samples")
	case w.size >= 0 && w.pos+n > w.size:
		return w.in.cutShort(n, w.size-w.pos)
	case n%int64(h.frame) != 0 && (w.size >= 0 || !open(0)):
		return w.in.oddSize("WAV", w.r, n, h.frame)
	}
	return nil
}

// afterSamples checks the chunks behind n bytes of samples. It returns io.EOF unless
// one of them is another WAV, or more samples: they would not be played. Other
// chunks, and bytes that are not a chunk, may follow.
func (w *wavReader) afterSamples(n int64) error {
	w.pos += n
	begin := w.pos
	skip := 0
	if n%2 != 0 && w.padded() {
		skip = 1
	}
	for {
		done, err := w.r.Discard(skip)
		w.pos += int64(done)
		if err != nil {
			return ignoreEnd(err)
		}
		head, err := w.r.Peek(sniff.WAVHeaderSize)
		if len(head) < 8 {
			return ignoreEnd(err)
		}
		size := int64(binary.LittleEndian.Uint32(head[4:]))
		end := w.pos + 8 + size
		switch {
		case sniff.WAVHeader(head) == 0:
			return w.in.joined("WAV", n)
		case string(head[:4]) == "data" && (size > 0 || len(head) > 8 && !sniff.Printable(head[8:min(len(head), 12)])):
			return w.in.broken("WAV has a second data chunk, after %d bytes of samples: write all samples into one", n)
		case !sniff.Printable(head[:4]), end > w.size, end > begin+wavAfter:
			return io.EOF
		}
		skip = int(8 + size)
		if size%2 != 0 && end < w.size {
			skip++ // some writers forget it: what follows is not a chunk then
		}
	}
}

// ignoreEnd turns the end of the file, wherever it is, into io.EOF.
func ignoreEnd(err error) error {
	if endOfFile(err) {
		return io.EOF
	}
	return err
}

// header leaves r at the first sample.
func (w *wavReader) header() (*wavHeader, error) {
	var riff [12]byte
	if err := w.read(riff[:], "its first header"); err != nil {
		return nil, err
	}
	if string(riff[8:]) != "WAVE" {
		return nil, w.in.broken("is a RIFF file of type %q: only WAVE is speech", riff[8:])
	}
	w.end = 8 + int64(binary.LittleEndian.Uint32(riff[4:]))
	if w.end == 8 || w.end >= wavOpenLength {
		w.end = -1
	}
	var h *wavHeader
	for {
		id, size, err := w.chunk()
		if err != nil {
			return nil, err
		}
		switch id {
		case "data":
			if h == nil {
				return nil, w.in.broken("WAV has no fmt chunk before its samples")
			}
			h.data = w.dataSize(size)
			return h, nil
		case "fmt ":
			h, err = w.format(size)
		default:
			err = w.skip(id, size)
		}
		if err != nil {
			return nil, err
		}
	}
}

func (w *wavReader) chunk() (id string, size int64, err error) {
	var head [8]byte
	if _, err := w.r.Peek(1); err != nil && endOfFile(err) {
		return "", 0, w.in.broken("WAV has no samples (no data chunk)")
	}
	if err := w.read(head[:], "a chunk's header"); err != nil {
		return "", 0, err
	}
	return string(head[:4]), int64(binary.LittleEndian.Uint32(head[4:])), nil
}

// dataSize is the length of the samples, -1 where the header leaves it open: by
// a size that no speech has, or by 0 with samples following. An empty data
// chunk followed by another chunk of a closed file is just empty.
func (w *wavReader) dataSize(size int64) int64 {
	if size >= wavOpenLength {
		return -1
	}
	if size > 0 {
		return size
	}
	if w.end >= 0 && w.chunkFollows() {
		return 0
	}
	return -1
}

func (w *wavReader) chunkFollows() bool {
	head, err := w.r.Peek(8)
	if err != nil {
		return false
	}
	for _, c := range head[:4] {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return w.pos+8+int64(binary.LittleEndian.Uint32(head[4:])) <= w.end
}

func (w *wavReader) format(size int64) (*wavHeader, error) {
	if size < 16 {
		return nil, w.in.broken("WAV's fmt chunk is %d bytes long: 16 are the least", size)
	}
	var b [40]byte
	known := b[:min(size, int64(len(b)))]
	if err := w.read(known, "its fmt chunk"); err != nil {
		return nil, err
	}
	if err := w.discard("fmt ", size-int64(len(known)), size); err != nil {
		return nil, err
	}
	h := &wavHeader{
		tag:      binary.LittleEndian.Uint16(b[0:]),
		channels: int(binary.LittleEndian.Uint16(b[2:])),
		rate:     int(binary.LittleEndian.Uint32(b[4:])),
		frame:    int(binary.LittleEndian.Uint16(b[12:])),
		bits:     int(binary.LittleEndian.Uint16(b[14:])),
	}
	if h.tag == wavExtensible && len(known) == len(b) && string(b[26:]) == guidTail {
		h.tag = binary.LittleEndian.Uint16(b[24:])
	}
	return h, h.check(w.in)
}

func (h *wavHeader) check(in *input) error {
	switch {
	case h.tag != wavPCM && h.tag != wavFloat:
		return in.broken("WAV holds %s: send 16-bit PCM", tagName(h.tag))
	case h.channels == 0:
		return in.broken("WAV says that it has 0 channels")
	case h.rate == 0:
		return in.broken("WAV says that its rate is 0 Hz")
	case h.tag == wavPCM && h.bits != 8 && h.bits != 16 && h.bits != 24 && h.bits != 32,
		h.tag == wavFloat && h.bits != 32 && h.bits != 64:
		return in.broken("WAV is %s: send 16-bit PCM", h.depth())
	case h.frame != h.channels*h.bits/8:
		return in.broken("WAV contradicts itself: %d channels of %d bits do not make a block of %d bytes", h.channels, h.bits, h.frame)
	}
	return nil
}

func tagName(tag uint16) string {
	switch tag {
	case wavALaw:
		return "A-law"
	case wavMuLaw:
		return "mu-law"
	case 0x0055:
		return "MP3"
	default:
		return fmt.Sprintf("a compressed format (0x%04x)", tag)
	}
}

// depth is "16-bit", "32-bit float".
func (h *wavHeader) depth() string {
	if h.tag == wavFloat {
		return fmt.Sprintf("%d-bit float", h.bits)
	}
	return fmt.Sprintf("%d-bit", h.bits)
}

// layout is "mono", "stereo", "6-channel".
func (h *wavHeader) layout() string {
	switch h.channels {
	case 1:
		return "mono"
	case 2:
		return "stereo"
	default:
		return fmt.Sprintf("%d-channel", h.channels)
	}
}

// conversion chooses how samples become 16-bit mono; nil where they are so.
func (h *wavHeader) conversion(in *input, allowed bool) (func(out, in []byte), string, error) {
	switch {
	case h.tag == wavPCM && h.bits == 16 && h.channels == 1:
		return nil, "", nil
	case h.channels > 2:
		return nil, "", in.broken("WAV has %d channels: the backend takes mono", h.channels)
	case !allowed && h.channels == 2:
		return nil, "", in.broken("WAV is stereo (2 channels): the backend takes mono; send mono or set audio.convert")
	case !allowed:
		return nil, "", in.broken("WAV is %s: the backend takes 16-bit; send 16-bit PCM or set audio.convert", h.depth())
	}
	return converter(h), fmt.Sprintf("%s %s to mono 16-bit", h.layout(), h.depth()), nil
}

// skip passes over a chunk and the byte that pads an odd one, which some
// writers forget.
func (w *wavReader) skip(id string, size int64) error {
	return w.discard(id, size, size)
}

func (w *wavReader) discard(id string, n, chunk int64) error {
	// In pieces, for bufio counts in int, which may have 32 bits.
	for n > 0 {
		step := int(min(n, 1<<20))
		done, err := w.r.Discard(step)
		w.pos += int64(done)
		n -= int64(done)
		if err != nil {
			return w.ended(err, fmt.Sprintf("its %q chunk of %d bytes", id, chunk))
		}
	}
	if chunk%2 == 0 || !w.padded() {
		return nil
	}
	w.pos++
	_, err := w.r.Discard(1)
	return err
}

// padded reports whether the byte after an odd chunk pads it. It may have any
// value, and some writers forget it: where the next chunk begins shows which.
func (w *wavReader) padded() bool {
	head, err := w.r.Peek(9)
	if err != nil && len(head) < 8 {
		return len(head) > 0 && head[0] == 0 // the next read meets the same end
	}
	without := head[:8]
	with := head[1:]
	switch {
	case isWAVChunk(without):
		return false
	case len(with) < 8:
		return without[0] == 0
	case isWAVChunk(with), w.mayBeChunk(with):
		return true
	default:
		return !w.mayBeChunk(without)
	}
}

// isWAVChunk reports whether a chunk's header is of one that WAVs have.
func isWAVChunk(head []byte) bool {
	switch string(head[:4]) {
	case "data", "fmt ", "fact", "LIST", "bext", "cue ", "smpl", "inst", "plst", "PEAK", "JUNK", "junk", "PAD ", "FLLR",
		"id3 ", "ID3 ", "iXML", "axml", "_PMX", "cart", "acid", "DISP", "levl", "afsp", "strc", "umid", "minf", "elm1", "regn", "MD5 ", "chna":
		return true
	}
	return false
}

// mayBeChunk reports whether a chunk could begin so, as far as its header and
// the file's length say.
func (w *wavReader) mayBeChunk(head []byte) bool {
	end := max(w.end, w.size)
	return sniff.Printable(head[:4]) && (end < 0 || w.pos+8+int64(binary.LittleEndian.Uint32(head[4:])) <= end+1)
}

func (w *wavReader) read(p []byte, what string) error {
	n, err := io.ReadFull(w.r, p)
	w.pos += int64(n)
	if err != nil {
		return w.ended(err, what)
	}
	return nil
}

func (w *wavReader) ended(err error, what string) error {
	if !endOfFile(err) {
		return err
	}
	return w.in.broken("WAV is cut short: it ends after %d bytes, in %s", w.pos, what)
}

var _ decoder = (*pcmDecoder)(nil)
