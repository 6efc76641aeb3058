package audio

import (
	"bufio"
	"io"
	"math/bits"
	"time"

	"avatarworker/internal/audio/sniff"
)

// pcmDecoder divides samples into chunks and converts them.
type pcmDecoder struct {
	in      *input
	what    string // "WAV" or "PCM"
	r       *bufio.Reader
	left    int64                  // bytes still to come; -1: up to the end of the file
	size    int64                  // what left was at the start
	open    func(there int64) bool // reports whether the length was unknown to its writer, given how much there is; nil: no
	frame   int                    // bytes of one sample of all channels, as they come in
	convert func(out, in []byte)
	rate    int
	samples int64 // given out so far
	inside  sniff.WAVHeaders
	after   func() error // checks what follows the samples: io.EOF if nothing is wrong with it; nil: it is not known

	buf []byte // one chunk as it comes in
	out []byte // one chunk as it goes out; nil where nothing is converted
}

// pcmSpeech returns raw PCM up to the end of r.
func pcmSpeech(in *input, src *source, r *bufio.Reader, chunk time.Duration) (*Speech, error) {
	if err := in.checkRate(in.SampleRate, PCM); err != nil {
		return nil, err
	}
	if src.size >= 0 && src.size%2 != 0 {
		return nil, in.oddSize("PCM", r, src.size, 2)
	}
	d := &pcmDecoder{in: in, what: "PCM", r: r, left: -1, frame: 2, rate: in.SampleRate}
	d.allocate(chunk)
	s := &Speech{src: src, decoder: d, format: PCM, rate: in.SampleRate}
	if src.size >= 0 {
		s.total, s.known = pcmLength(src.size/2, d.rate), true
	}
	return s, nil
}

func (d *pcmDecoder) allocate(chunk time.Duration) {
	samples := max(1, int(chunk*time.Duration(d.rate)/time.Second))
	d.buf = make([]byte, samples*d.frame)
	if d.convert != nil {
		d.out = make([]byte, samples*2)
	}
}

func (d *pcmDecoder) next() ([]byte, time.Duration, error) {
	want := d.buf
	if d.left >= 0 {
		want = want[:min(int64(len(want)), d.left)]
	}
	if d.open != nil && (d.left < 0 || d.open(0)) {
		var err error
		if want, err = d.upToTag(want); err != nil {
			return nil, 0, err
		}
	}
	if len(want) == 0 {
		if d.after == nil {
			return nil, 0, io.EOF
		}
		return nil, 0, d.after()
	}
	n, err := io.ReadFull(d.r, want)
	if at := d.inside.Find(want[:n]); at >= 0 {
		return nil, 0, d.in.joined(d.what, at)
	}
	if err != nil {
		if err = d.end(n, err); err != nil {
			return nil, 0, err
		}
	}
	if d.left >= 0 {
		d.left -= int64(n)
	}
	return d.chunk(want[:n])
}

// upToTag shortens want to the samples before a tag, if one begins there. Where a
// header leaves the length open, the tag would be played.
func (d *pcmDecoder) upToTag(want []byte) ([]byte, error) {
	if most := d.r.Size() - sniff.TagSize; len(want) > most {
		want = want[:most/d.frame*d.frame]
	}
	ahead, err := d.r.Peek(len(want) + sniff.TagSize)
	if err != nil && !endOfFile(err) {
		return want, nil // reading meets the same error behind the last samples
	}
	at := sniff.Tag(ahead, err != nil)
	if at < 0 || at > len(want) {
		return want, nil
	}
	switch {
	case at == 0 && d.samples == 0:
		return nil, d.in.broken("%s has no samples, only a tag", d.what)
	case at%d.frame != 0:
		return nil, d.in.oddBytes(d.what, d.samples*int64(d.frame)+int64(at), d.frame)
	}
	d.open, d.left, d.after = nil, int64(at), nil
	return want[:at], nil
}

func (in *input) joined(what string, at int64) error {
	switch {
	case at == 0 && what == "WAV":
		return in.broken("WAV holds another WAV file in place of samples: send that one alone")
	case at == 0: // NewPCM does not look at the beginning
		return in.broken("%s is a WAV file: send its samples alone", what)
	}
	return in.broken("%s has the header of another WAV file in it, after %d bytes of samples: join the samples and not the files, or send each as its own utterance", what, at)
}

// oddSize is the error of a file whose size does not fit. It reads the file to its
// end to find out why.
func (in *input) oddSize(what string, r *bufio.Reader, size int64, frame int) error {
	for at := int64(0); ; {
		part, err := r.Peek(r.Size())
		if at == 0 && what != "WAV" {
			if kind, found := sniff.Text(part); found {
				return in.broken("is %s; %s", kind.Name, kind.Hint(in.SampleRate))
			}
		}
		if i := sniff.WAVHeader(part); i >= 0 {
			return in.joined(what, at+int64(i))
		}
		if i := sniff.Tag(part, err != nil); i >= 0 {
			return in.broken("%s has a tag behind %d bytes of samples: remove it, or send a WAV whose header says how long they are", what, at+int64(i))
		}
		if err != nil {
			return in.oddBytes(what, size, frame)
		}
		n, _ := r.Discard(len(part) - sniff.TagSize) // all of it is in the buffer
		at += int64(n)
	}
}

// end handles a file that ended after n more bytes. It returns nil if these are a
// last, shorter chunk.
func (d *pcmDecoder) end(n int, err error) error {
	switch {
	case !endOfFile(err):
		return err
	case d.left >= 0 && (d.open == nil || !d.open(d.size-d.left+int64(n))):
		return d.in.cutShort(d.size, d.size-d.left+int64(n))
	case n%d.frame != 0:
		return d.in.oddBytes(d.what, d.samples*int64(d.frame)+int64(n), d.frame)
	case n == 0:
		return io.EOF
	}
	return nil
}

func (d *pcmDecoder) chunk(data []byte) ([]byte, time.Duration, error) {
	samples := len(data) / d.frame
	if d.convert != nil {
		out := d.out[:samples*2]
		d.convert(out, data)
		data = out
	}
	// Use the difference of two positions, so that the lengths add up to the
	// total.
	before := pcmLength(d.samples, d.rate)
	d.samples += int64(samples)
	return data, pcmLength(d.samples, d.rate) - before, nil
}

// pcmLength returns how long that many samples take. It saturates, because a
// header may contain any number.
func pcmLength(samples int64, rate int) time.Duration {
	hi, lo := bits.Mul64(uint64(max(samples, 0)), uint64(time.Second))
	if hi >= uint64(rate) {
		return 1<<63 - 1
	}
	quotient, _ := bits.Div64(hi, lo, uint64(rate))
	return time.Duration(min(quotient, 1<<63-1))
}

func (in *input) oddBytes(what string, size int64, frame int) error {
	if frame == 2 {
		return in.broken("%s has an odd number of bytes (%d): 16-bit samples take two each", what, size)
	}
	return in.broken("%s has %d bytes of samples, which is not a multiple of %d, the size of one sample of all channels", what, size, frame)
}

func (in *input) cutShort(says, has int64) error {
	return in.broken("WAV is cut short: its header says %d bytes of samples, %d are there", says, has)
}
