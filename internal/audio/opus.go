package audio

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"time"

	"avatarworker/internal/audio/sniff"
)

const (
	opusClock    = 48000 // granule positions count at this rate, whatever the speech's
	opusHeadSize = 19

	// opusGroup is how many bytes of pages one chunk gathers before another
	// page has to wait, so that pages without a granule can't pile up.
	opusGroup = 64 << 10
)

// opusDecoder hands on the pages of one logical stream of Ogg Opus (RFC 7845)
// as they are. It checks pages, headers and order, and decodes nothing.
type opusDecoder struct {
	in    *input
	ogg   *oggReader
	chunk time.Duration

	serial   uint32
	number   uint32 // of the page before
	preSkip  int64
	tags     bool // the OpusTags packet is over, and speech has begun
	tagsSeen bool // its first page was seen
	open     bool // the last packet of the page before goes on
	begun    bool // the first page of speech was seen
	ended    bool // the last page was seen
	origin   int64
	position int64 // of the speech handed out or gathered, in samples at opusClock

	group []byte
	given time.Duration
}

func opusSpeech(in *input, src *source, r *bufio.Reader, chunk time.Duration) (*Speech, error) {
	d := &opusDecoder{in: in, ogg: newOggReader(in, r), chunk: chunk}
	page, err := d.ogg.next()
	if err != nil {
		return nil, err
	}
	head, err := d.head(page)
	if err != nil {
		return nil, err
	}
	original := int(binary.LittleEndian.Uint32(head[12:]))
	rate := opusRate(in.SampleRate, original)
	if err := in.checkRate(rate, OggOpus); err != nil {
		return nil, err
	}
	if original > 0 && rate != opusRate(0, original) {
		return nil, in.broken("Ogg Opus was made from speech at %d Hz, but %s.sample_rate says %d Hz", original, in.Field, in.SampleRate)
	}
	d.group = append(d.group, page.raw...)
	return &Speech{src: src, decoder: d, format: OggOpus, rate: rate}, nil
}

// opusRate is the rate to configure the session with: the job's; else the least
// rate of the backend's that loses nothing of the original, whose rate the header
// notes (RFC 7845, 5.1); else, for an original above 48 kHz or none, 48 kHz,
// which is all that Opus holds.
func opusRate(job, original int) int {
	if job != 0 {
		return job
	}
	rates := OggOpus.rates()
	if original > 0 {
		for _, r := range rates {
			if r >= original {
				return r
			}
		}
	}
	return rates[len(rates)-1]
}

// head checks the first page: it holds the OpusHead packet alone.
func (d *opusDecoder) head(page *oggPage) ([]byte, error) {
	head := page.body
	switch {
	case page.flags&oggFirst == 0:
		return nil, d.in.broken("Ogg does not begin with the first page of a stream")
	case !bytes.HasPrefix(head, []byte("OpusHead")):
		return nil, d.in.broken("is an Ogg file with %s: only Opus is taken; %s", codecName(head), sniff.Kind{}.Hint(d.in.SampleRate))
	case len(head) < opusHeadSize || len(page.segments) != 1:
		return nil, d.in.broken("Ogg Opus has a broken OpusHead (%d bytes)", len(head))
	case head[8]&0xF0 != 0:
		return nil, d.in.broken("Ogg Opus has version %d: only 0 to 15 are known", head[8])
	case head[9] != 1:
		return nil, d.in.broken("Ogg Opus has %d channels: the backend takes mono (audio.convert does not decode Opus)", head[9])
	case head[18] > 1:
		return nil, d.in.broken("Ogg Opus has channel mapping family %d: only 0 and 1 are speech", head[18])
	}
	d.serial, d.number = page.serial, page.number
	d.preSkip = int64(binary.LittleEndian.Uint16(head[10:]))
	return head, nil
}

func codecName(head []byte) string {
	for _, codec := range []struct{ magic, name string }{
		{"\x01vorbis", "Vorbis"}, {"\x7fFLAC", "FLAC"}, {"Speex   ", "Speex"}, {"\x80theora", "video"},
	} {
		if bytes.HasPrefix(head, []byte(codec.magic)) {
			return codec.name
		}
	}
	return "something that does not begin with OpusHead"
}

// next gathers whole pages until they make up a chunk's length. The page that
// reaches it is the last of its chunk.
func (d *opusDecoder) next() ([]byte, time.Duration, error) {
	for {
		page, err := d.ogg.next()
		if err == io.EOF {
			return d.last()
		}
		if err != nil {
			return nil, 0, err
		}
		if err := d.accept(page); err != nil {
			return nil, 0, err
		}
		d.group = append(d.group, page.raw...)
		if length := d.gathered(); length >= d.chunk || len(d.group) >= opusGroup {
			return d.give(length)
		}
	}
}

// last is the chunk at the end of the file. A missing end-of-stream flag is
// let pass where the last packet is whole, for some that stream never set it.
func (d *opusDecoder) last() ([]byte, time.Duration, error) {
	switch {
	case d.open:
		return nil, 0, d.in.broken("Ogg is cut short: its last packet is not finished")
	case !d.begun || d.length() == 0:
		return nil, 0, d.in.broken("Ogg Opus has no speech after its headers")
	case len(d.group) == 0:
		return nil, 0, io.EOF
	}
	return d.give(d.gathered())
}

// give hands out the group. It stays in place until the next call of accept,
// which begins by emptying it.
func (d *opusDecoder) give(length time.Duration) ([]byte, time.Duration, error) {
	d.given += length
	data := d.group
	d.group = d.group[:0]
	return data, length, nil
}

// accept checks that a page goes on where the one before stopped.
func (d *opusDecoder) accept(page *oggPage) error {
	switch {
	case page.flags&oggFirst != 0:
		return d.in.broken("Ogg holds more than one logical stream: send one")
	case d.ended:
		return d.in.broken("Ogg goes on after the end of its stream")
	case page.serial != d.serial:
		return d.in.broken("Ogg is corrupt: a page belongs to another logical stream")
	case page.number != d.number+1:
		return d.in.broken("Ogg is corrupt: page %d follows page %d", page.number, d.number)
	}
	d.number = page.number
	d.ended = page.flags&oggLast != 0
	if !d.tags {
		return d.acceptTags(page)
	}
	return d.acceptSpeech(page)
}

// acceptTags follows the OpusTags packet over its pages. Speech begins on a
// separate page.
func (d *opusDecoder) acceptTags(page *oggPage) error {
	if !d.tagsSeen && !bytes.HasPrefix(page.body, []byte("OpusTags")) {
		return d.in.broken("Ogg Opus has no OpusTags after its OpusHead")
	}
	begun := 0
	d.open = page.packets(d.tagsSeen, func([]byte) { begun++ })
	if d.tagsSeen && begun > 0 || begun > 1 {
		return d.in.broken("Ogg Opus has speech on the page of its OpusTags")
	}
	d.tagsSeen = true
	d.tags = !d.open
	return nil
}

func (d *opusDecoder) acceptSpeech(page *oggPage) error {
	var samples int64
	d.open = page.packets(d.open, func(part []byte) { samples += opusSamples(part) })
	if page.granule == oggNoGranule {
		return nil
	}
	if !d.begun {
		d.begun = true
		d.begin(page, samples)
	}
	position := page.granule - d.origin
	switch {
	case page.granule < 0 || position < d.position:
		return d.in.broken("Ogg is corrupt: the granule position runs back to %d", page.granule)
	case position > int64(maxSpeech/time.Second)*opusClock:
		return d.in.broken("Ogg is corrupt: the granule position %d means more than %s of speech", page.granule, maxSpeech)
	}
	d.position = position
	return nil
}

// begin finds the position at which the stream starts: 0, but for one that was
// recorded from the middle of a live stream (RFC 7845, 4.3). A short position
// on the only page trims the end instead (4.4).
func (d *opusDecoder) begin(page *oggPage, samples int64) {
	if page.flags&oggLast == 0 && page.granule > samples {
		d.origin = page.granule - samples
	}
}

// length is that of the speech up to position.
func (d *opusDecoder) length() time.Duration {
	return pcmLength(d.position-d.preSkip, opusClock)
}

func (d *opusDecoder) gathered() time.Duration { return d.length() - d.given }

// opusSamples is how many samples at opusClock a packet says it holds, by its
// first two bytes (RFC 6716, 3.1 and 3.2).
func opusSamples(packet []byte) int64 {
	if len(packet) == 0 {
		return 0
	}
	frames := int64(1)
	switch packet[0] & 3 {
	case 1, 2:
		frames = 2
	case 3:
		if len(packet) < 2 {
			return 0
		}
		frames = int64(packet[1] & 63)
	}
	return frames * opusFrame(packet[0]>>3)
}

// opusFrame is the length of a frame by the packet's configuration number.
func opusFrame(config byte) int64 {
	const ms = opusClock / 1000
	switch {
	case config < 12: // SILK
		return []int64{10 * ms, 20 * ms, 40 * ms, 60 * ms}[config&3]
	case config < 16: // hybrid
		return []int64{10 * ms, 20 * ms}[config&1]
	default: // CELT
		return []int64{ms * 5 / 2, 5 * ms, 10 * ms, 20 * ms}[config&3]
	}
}

var _ decoder = (*opusDecoder)(nil)
