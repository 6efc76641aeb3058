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
	stop := s.src.follow(ctx)
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
	found := ""
	switch {
	case bytes.HasPrefix(head, []byte("RIFF")):
		found = formatWAV
	case bytes.HasPrefix(head, []byte("OggS")):
		found = formatOpus
	}
	switch {
	case found == "" && (in.Format == "" || in.Format == formatPCM):
		return formatPCM, in.checkRaw(head)
	case in.Format == "" || in.Format == found:
		return found, nil
	}
	return "", in.broken("is %s, but %s.format says %s", describe(head), in.Field, in.Format)
}

// checkRaw keeps a compressed file from being spoken as noise. Where the job
// says pcm_s16le in so many words, it is believed.
func (in *input) checkRaw(head []byte) error {
	other := describe(head)
	switch {
	case other != unknownBytes && in.Format == "":
		return in.broken("is %s: send a WAV, raw PCM or Ogg Opus", other)
	case in.SampleRate == 0 && in.Format == "":
		return in.needsRate(" (the bytes are neither a WAV nor an Ogg file)")
	case in.SampleRate == 0:
		return in.needsRate("")
	}
	return nil
}

const unknownBytes = "neither a WAV nor an Ogg file"

// describe names what the first bytes of a file give away.
func describe(head []byte) string {
	for _, known := range []struct{ magic, name string }{
		{"RIFF", "a WAV file"},
		{"OggS", "an Ogg file"},
		{"fLaC", "a FLAC file"},
		{"ID3\x02", "an MP3 file"},
		{"ID3\x03", "an MP3 file"},
		{"ID3\x04", "an MP3 file"},
		{"RF64", "an RF64 file"},
		{"RIFX", "a big-endian WAV file"},
		{"\x1aE\xdf\xa3", "a WebM or Matroska file"},
		{"{\"err", "JSON"},
		{"<!DOCTYPE", "a web page"},
		{"<html", "a web page"},
	} {
		if bytes.HasPrefix(head, []byte(known.magic)) {
			return known.name
		}
	}
	return unknownBytes
}
