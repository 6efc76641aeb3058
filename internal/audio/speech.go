package audio

import (
	"bytes"
	"context"
	"io"
	"time"

	"avatarworker/internal/audio/sniff"
)

// Speech is the speech of one utterance. Use it from one goroutine at a time.
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

// decoder divides a source into chunks for the backend.
type decoder interface {
	// next returns a chunk, valid until the following call, and the length of
	// the speech in it; io.EOF alone after the last.
	next() (data []byte, length time.Duration, err error)
}

// Format returns the encoding of the chunks.
func (s *Speech) Format() Format { return s.format }

// SampleRate returns the rate in Hz for the session's configuration. Opus has no
// rate of its own: see opusRate.
func (s *Speech) SampleRate() int { return s.rate }

// Converted returns what Options.Convert did, such as "stereo 24-bit to mono
// 16-bit", or "" if the speech is unchanged.
func (s *Speech) Converted() string { return s.converted }

// Total returns the length of the whole speech, if known: from the start if
// header or size give it, else after the last chunk.
func (s *Speech) Total() (time.Duration, bool) { return s.total, s.known }

// Next returns the next chunk: about Options.Chunk of PCM, or whole Ogg pages of
// about that length (the first chunk includes the stream's headers; a longer page
// is a chunk of its own). data is valid until the next call; length is its
// playing time. After the last chunk err is io.EOF.
//
// Other errors are as Open's and permanent, and so is the end of ctx while Next
// waits for an object or a URL.
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

// finish ends the speech and frees its buffers: thousands of sessions may wait
// for the backend's answer with the speech still open.
func (s *Speech) finish(err error) {
	s.err = err
	s.decoder = nil
	if err == io.EOF {
		s.total, s.known = s.src.spoken, true
	}
}

// Close releases the source. It may be called at any time, and twice.
func (s *Speech) Close() error {
	if s.err == nil {
		s.err = errClosed
	}
	return s.src.close()
}

// NewPCM returns raw 16-bit mono PCM at rate Hz, of any length, in chunks of 100
// ms. Close closes r if it is an io.Closer. Next blocks while r does, whatever
// its context.
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

// newSpeech detects the format and reads the header. It closes src if it fails.
func (o *Opener) newSpeech(in *input, src *source) (*Speech, error) {
	s, err := o.parse(in, src)
	if err != nil {
		if cerr := src.close(); cerr != nil {
			return nil, err // the first error matters
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
		head, err = r.Peek(min(sniff.Size, r.Size()))
	}
	if err != nil && !endOfFile(err) {
		return nil, err
	}
	format, err := in.detect(head, err != nil)
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

// detect returns the format of the bytes: the detected one if the job names none,
// and otherwise the job's, unless the bytes contradict it. They are the beginning of
// the file, or all of it.
func (in *input) detect(head []byte, all bool) (string, error) {
	if len(head) == 0 {
		return "", in.broken("is empty")
	}
	found := container(head)
	if found != "" && (in.Format == "" || in.Format == found) {
		return found, nil
	}
	kind, known := sniff.Detect(head)
	if !known && all {
		kind, known = sniff.Short(head)
	}
	if !known && in.Format == "" {
		kind, known = sniff.Guess(head)
	}
	raw := in.Format == "" || in.Format == formatPCM
	before, what := sniff.Before(head)
	switch {
	case before > 0:
		return "", in.broken("begins with %d bytes before its header (%s): send the file from there on", before, what)
	case known && in.Format == "":
		return "", in.broken("is %s; %s", kind.Name, kind.Hint(in.SampleRate))
	case known:
		return "", in.broken("is %s, but %s.format says %s; %s", kind.Name, in.Field, in.Format, kind.Hint(in.SampleRate))
	case !raw:
		return "", in.broken("is neither a WAV nor an Ogg file, but %s.format says %s", in.Field, in.Format)
	case in.SampleRate == 0 && in.Format == "":
		return "", in.needsRate(" (the bytes are neither a WAV nor an Ogg file)")
	case in.SampleRate == 0:
		return "", in.needsRate("")
	}
	return formatPCM, nil
}

// container returns the format of a speech file that starts with head, or "".
func container(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte("RIFF")):
		return formatWAV
	case bytes.HasPrefix(head, []byte("OggS")):
		return formatOpus
	}
	return ""
}
