package audio

import (
	"bytes"
	"context"
	"io"
	"time"
)

// Speech is one utterance's speech. It is used from one goroutine at a time.
type Speech struct {
	src       *source
	decoder   decoder
	format    Format
	rate      int
	converted string
	total     time.Duration
	known     bool
	err       error
}

// decoder cuts a source into chunks for the backend.
type decoder interface {
	// next returns a chunk, valid until the following call, and the length of
	// the speech in it; io.EOF alone after the last.
	next() (data []byte, length time.Duration, err error)
}

// Format is the encoding of the chunks.
func (s *Speech) Format() Format { return s.format }

// SampleRate is the rate in Hz to configure the session with. Opus has no rate
// of its own: see opusRate.
func (s *Speech) SampleRate() int { return s.rate }

// Converted says what Options.Convert did, as "stereo 24-bit to mono 16-bit";
// empty where the speech goes out as it came in.
func (s *Speech) Converted() string { return s.converted }

// Total is the length of the whole speech, where it is known: from the start
// where header or size tell it, else after the last chunk.
func (s *Speech) Total() (time.Duration, bool) { return s.total, s.known }

// Next returns the next chunk: about Options.Chunk of PCM, or as many whole Ogg
// pages as make up about as much (the first with the stream's headers; a page
// that is longer goes out by itself). data is valid until the next call; length
// is how long it takes to be spoken. After the last chunk err is io.EOF.
//
// Other errors are as Open's, and final; so is the end of ctx while Next waits
// for an object or a URL.
func (s *Speech) Next(ctx context.Context) (data []byte, length time.Duration, err error) {
	if s.err != nil {
		return nil, 0, s.err
	}
	if ctx.Err() != nil {
		return nil, 0, context.Cause(ctx)
	}
	stop := s.src.cancelWith(ctx)
	data, length, err = s.decoder.next()
	stop()
	if err != nil {
		s.finish(err)
		return nil, 0, err
	}
	s.src.spoken += length
	return data, length, nil
}

// finish ends the speech. Its buffers go: the session waits for the backend's
// answer with the speech still open, and thousands may do so at once.
func (s *Speech) finish(err error) {
	s.err = err
	s.decoder = nil
	if err == io.EOF {
		s.total, s.known = s.src.spoken, true
	}
}

// Close releases the source. It may be called at any time, also twice.
func (s *Speech) Close() error {
	if s.err == nil {
		s.err = errClosed
	}
	return s.src.close()
}

// NewPCM returns raw 16-bit mono PCM at rate Hz, of any length, in chunks of
// 100 ms. Close closes r where that is an io.Closer; Next waits as long as r
// does, whatever its context.
func NewPCM(r io.Reader, rate int) (*Speech, error) {
	body, ok := r.(io.ReadCloser)
	if !ok {
		body = io.NopCloser(r)
	}
	in := &input{Spec: Spec{Field: "audio", SampleRate: rate, Format: formatPCM}, kind: "stream"}
	if err := in.checkRate(rate, PCM); err != nil {
		return nil, err
	}
	src := &source{in: in, body: body, size: -1, max: noLimit, ctx: context.Background()}
	src.fault = func(err error) error { return in.unreachable(err, "reading failed") }
	return pcmSpeech(in, src, src.buffered(), defaultChunk)
}

// newSpeech looks at the first bytes and reads the header. It closes src where
// it fails.
func (o *Opener) newSpeech(in *input, src *source) (*Speech, error) {
	s, err := o.parse(in, src)
	if err != nil {
		if cerr := src.close(); cerr != nil {
			return nil, err // the first failure is the one to tell of
		}
		return nil, err
	}
	return s, nil
}

func (o *Opener) parse(in *input, src *source) (*Speech, error) {
	if src.size > src.max {
		return nil, in.tooLarge(src.name, src.max)
	}
	r := src.buffered()
	head, err := r.Peek(12)
	if found := container(head); err == nil && (found == "" || in.Format != "" && in.Format != found) {
		head, err = r.Peek(min(sniffed, r.Size()))
	}
	if err != nil && !endOfFile(err) {
		return nil, err
	}
	format, err := in.detect(head)
	if err != nil {
		return nil, err
	}
	switch format {
	case formatWAV:
		return wavSpeech(in, src, r, o.opts)
	case formatOpus:
		return opusSpeech(in, src, r, o.opts.Chunk)
	default:
		return pcmSpeech(in, src, r, o.opts.Chunk)
	}
}

// detect decides what the bytes are: by their beginning where the job does not
// say, and never against what their beginning says.
func (in *input) detect(head []byte) (string, error) {
	if len(head) == 0 {
		return "", in.broken("is empty")
	}
	found := container(head)
	if found != "" && (in.Format == "" || in.Format == found) {
		return found, nil
	}
	kind, known := detectKind(head)
	if !known && in.Format == "" {
		kind, known = guessKind(head)
	}
	raw := in.Format == "" || in.Format == formatPCM
	switch {
	case known && in.Format == "":
		return "", in.broken("is %s; %s", kind.name, kind.hint(in.SampleRate))
	case known:
		return "", in.broken("is %s, but %s.format says %s; %s", kind.name, in.Field, in.Format, kind.hint(in.SampleRate))
	case !raw:
		return "", in.broken("is neither a WAV nor an Ogg file, but %s.format says %s", in.Field, in.Format)
	case in.SampleRate == 0 && in.Format == "":
		return "", in.needsRate(" (the bytes are neither a WAV nor an Ogg file)")
	case in.SampleRate == 0:
		return "", in.needsRate("")
	}
	return formatPCM, nil
}

// container is the format of a file that begins so, of those that hold speech;
// "": none of them.
func container(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte("RIFF")):
		return formatWAV
	case bytes.HasPrefix(head, []byte("OggS")):
		return formatOpus
	}
	return ""
}
