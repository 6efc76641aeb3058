// Package audio opens speech from its source (inline, object, URL or live
// messages), detects its format (WAV, raw PCM, Ogg Opus), and returns it in
// chunks for the backend. It owns formats, conversion, and the checks that keep
// wrong speech from being billed. It must not know about sessions, queues or
// retries.
//
// Speech from an object or a URL is streamed: a Speech holds one read buffer and
// one chunk, whatever its length. docs/protocol.md, section 6, says what the
// backend accepts.
package audio

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/errors"
)

// Format is an encoding that the backend accepts. The numbers are those of its
// wire format (avatar.proto, AudioFormat).
type Format int

// The backend's formats.
const (
	PCM     Format = 0 // signed 16-bit little-endian, mono
	OggOpus Format = 1 // one logical stream, mono
)

// String names the format as a job does.
func (f Format) String() string {
	if f == OggOpus {
		return formatOpus
	}
	return formatPCM
}

// The formats that a job can name.
const (
	formatWAV  = "wav"
	formatPCM  = "pcm_s16le"
	formatOpus = "ogg_opus"
)

// rates returns the sample rates that the backend accepts for a format, in Hz,
// ascending (docs/protocol.md, section 6).
func (f Format) rates() []int {
	if f == OggOpus {
		return []int{8000, 12000, 16000, 24000, 48000}
	}
	return []int{8000, 16000, 22050, 24000, 32000, 44100, 48000}
}

// Spec is one utterance's speech as a job describes it: exactly one of Inline,
// Object and URL.
type Spec struct {
	Inline     []byte
	HasInline  bool   // distinguishes an empty inline from none
	Object     string // "name" in Options.DefaultBucket, or "bucket/name"
	URL        string // http or https
	Format     string // "wav", "pcm_s16le", "ogg_opus"; empty: by content
	SampleRate int    // Hz; 0: read from the file, which raw PCM does not allow
	Field      string // "audio", "utterances[2]": how errors name it
}

// Options configure an Opener. The zero value of a field means its default.
type Options struct {
	// MaxBytes is the most that one utterance's source may hold. Default 64 MiB.
	MaxBytes int64
	// FetchTimeout limits the time spent waiting for an object or a URL: each
	// wait by itself, and all waits together by FetchTimeout plus the length of
	// the speech already returned. Time between calls of Next does not count, so
	// that a session at real-time pace is never cut. Default 30 s.
	FetchTimeout time.Duration
	// AllowPrivateURLs lets URLs reach private, loopback and link-local
	// addresses.
	AllowPrivateURLs bool
	// Convert converts stereo and 8, 24, 32-bit and float WAVs to 16-bit mono
	// instead of refusing them.
	Convert bool
	// Chunk is the length of speech that Next aims at. Default 100 ms.
	Chunk time.Duration
	// Objects opens objects; if nil, a job that names one is refused. See
	// JetStreamObjects.
	Objects ObjectOpener
	// DefaultBucket holds the objects that are named without a bucket.
	DefaultBucket string

	// Resolver looks up host names; nil: the system's.
	Resolver Resolver
	// Dial connects to an address ("ip:port") that has passed the check of
	// addresses; nil: a net.Dialer.
	Dial DialFunc
	// TLS is the configuration for https; nil: the system's roots.
	TLS *tls.Config
}

const (
	defaultMaxBytes     = 64 << 20
	defaultFetchTimeout = 30 * time.Second
	defaultChunk        = 100 * time.Millisecond

	// maxSpeech is longer than any session. Longer speech comes from a broken
	// header.
	maxSpeech = 24 * time.Hour
	// noLimit is the most bytes of a source that another limit bounds.
	noLimit = 1 << 62
	// readBuffer is the size of the buffer between a source and its parser.
	readBuffer = 16 << 10
)

// Opener opens speech. It is safe for concurrent use.
type Opener struct {
	opts      Options
	client    *http.Client
	transport *http.Transport
}

// New returns an Opener. Close it after its speeches are closed.
func New(opts Options) *Opener {
	if opts.MaxBytes <= 0 {
		opts.MaxBytes = defaultMaxBytes
	}
	if opts.FetchTimeout <= 0 {
		opts.FetchTimeout = defaultFetchTimeout
	}
	if opts.Chunk <= 0 {
		opts.Chunk = defaultChunk
	}
	o := &Opener{opts: opts}
	o.transport = newTransport(opts)
	o.client = newClient(o.transport)
	return o
}

// Close closes the idle connections of past fetches.
func (o *Opener) Close() {
	o.transport.CloseIdleConnections()
}

// Check validates a spec without reading anything from outside: it reads inline
// speech to its end and parses an object's name or a URL. The error is an
// *errors.Error: invalidJob in phase job, or unsupportedSampleRate.
func (o *Opener) Check(spec Spec) error {
	in, err := o.input(spec)
	if err != nil {
		return err
	}
	if in.kind != kindInline {
		return checkGivenRate(in)
	}
	speech, err := o.openInline(context.Background(), in)
	if err != nil {
		return err
	}
	return drain(speech)
}

// Open reads the header, so that format and rate are known, and leaves the rest
// to Next. ctx governs the whole speech, not only Open. The caller closes the
// speech.
//
// The error is an *errors.Error, or the cause of ctx when that ended: invalidJob
// for speech that is broken (phase job for inline, else audio),
// unsupportedSampleRate, and audioUnavailable (phase audio) for a source that
// can't be read, with Network or HTTPStatus set where trying again may help.
func (o *Opener) Open(ctx context.Context, spec Spec) (*Speech, error) {
	in, err := o.input(spec)
	if err != nil {
		return nil, err
	}
	if in.kind == kindInline {
		return o.openInline(ctx, in)
	}
	if err := checkGivenRate(in); err != nil {
		return nil, err
	}
	if in.kind == kindObject {
		return o.openObject(ctx, in)
	}
	return o.openURL(ctx, in)
}

// kind is the source of speech, as the job names it.
type kind string

const (
	kindInline kind = "inline"
	kindObject kind = "object"
	kindURL    kind = "url"
)

// input is a spec whose shape has been checked.
type input struct {
	Spec
	kind kind
}

func (o *Opener) input(spec Spec) (*input, error) {
	if spec.Field == "" {
		spec.Field = "audio"
	}
	in := &input{Spec: spec}
	var given []kind
	for _, source := range []struct {
		kind kind
		set  bool
	}{{kindInline, spec.HasInline}, {kindObject, spec.Object != ""}, {kindURL, spec.URL != ""}} {
		if source.set {
			given = append(given, source.kind)
		}
	}
	switch {
	case len(given) == 0:
		return nil, invalid("%s: no speech: give one of inline, object and url", spec.Field)
	case len(given) > 1:
		return nil, invalid("%s: %s and %s are both set: give exactly one", spec.Field, given[0], given[1])
	}
	in.kind = given[0]
	if err := in.checkShape(); err != nil {
		return nil, err
	}
	return in, nil
}

func (in *input) checkShape() error {
	switch in.Format {
	case "", formatWAV, formatPCM, formatOpus:
	default:
		return invalid("%s.format: unknown format %q: give wav, pcm_s16le or ogg_opus, or leave it out", in.Field, shorten(in.Format))
	}
	if in.SampleRate < 0 {
		return invalid("%s.sample_rate: %d is not a rate in Hz", in.Field, in.SampleRate)
	}
	switch in.kind {
	case kindObject:
		return checkObjectName(in)
	case kindURL:
		_, err := parseURL(in)
		return err
	default:
		return nil
	}
}

// checkGivenRate refuses rates that are known to be wrong before anything is
// fetched.
func checkGivenRate(in *input) error {
	switch {
	case in.SampleRate == 0 && in.Format == formatPCM:
		return in.needsRate("")
	case in.SampleRate == 0:
		return nil
	case in.Format == formatOpus, in.Format == "" && slices.Contains(OggOpus.rates(), in.SampleRate):
		return in.checkRate(in.SampleRate, OggOpus)
	default:
		return in.checkRate(in.SampleRate, PCM)
	}
}

func (in *input) needsRate(hint string) error {
	return invalid("%s.sample_rate: raw PCM needs its rate in Hz%s", in.Field, hint)
}

func (in *input) checkRate(rate int, format Format) error {
	return CheckRate(in.Field+"."+string(in.kind), format, rate)
}

// CheckRate returns unsupportedSampleRate, naming the field, if the backend does
// not accept the rate.
func CheckRate(field string, format Format, rate int) error {
	rates := format.rates()
	if slices.Contains(rates, rate) {
		return nil
	}
	names := make([]string, len(rates))
	for i, r := range rates {
		names[i] = strconv.Itoa(r)
	}
	return errors.Newf(errors.CodeUnsupportedSampleRate, errors.PhaseAudio,
		"%s: %d Hz: for %s the backend takes %s Hz", field, rate, format, strings.Join(names, ", "))
}

// broken is the error of speech that no retry can help. Inline speech is part of
// the job.
func (in *input) broken(format string, args ...any) error {
	phase := errors.PhaseAudio
	if in.kind == kindInline {
		phase = errors.PhaseJob
	}
	return errors.Newf(errors.CodeInvalidJob, phase, "%s.%s: "+format, slices.Concat([]any{in.Field, in.kind}, args)...)
}

// unavailable is the error of a source that can't be read, now or later.
func (in *input) unavailable(format string, args ...any) *errors.Error {
	return errors.Newf(errors.CodeAudioUnavailable, errors.PhaseAudio, "%s.%s: "+format, slices.Concat([]any{in.Field, in.kind}, args)...)
}

// unreachable is the error of a fault between the worker and the source, which
// may be temporary.
func (in *input) unreachable(cause error, format string, args ...any) *errors.Error {
	e := in.unavailable(format, args...)
	e.Network = true
	e.Err = cause
	return e
}

func invalid(format string, args ...any) error {
	return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, format, args...)
}

// shorten bounds foreign text in errors.
func shorten(s string) string { return errors.Cut(strings.ToValidUTF8(s, ""), 123) }

func (o *Opener) openInline(ctx context.Context, in *input) (*Speech, error) {
	if len(in.Inline) == 0 {
		return nil, in.broken("is empty")
	}
	if size := int64(len(in.Inline)); size > o.opts.MaxBytes {
		return nil, in.broken("is %d bytes long: at most %d are accepted", size, o.opts.MaxBytes)
	}
	speech, err := o.newSpeech(in, inlineSource(ctx, in))
	if err != nil || speech.known {
		return speech, err
	}
	// The length of Ogg is known only at its end, which is in memory here.
	ahead, err := o.newSpeech(in, inlineSource(ctx, in))
	if err != nil {
		return nil, err
	}
	if err := drain(ahead); err != nil {
		return nil, err
	}
	speech.total, speech.known = ahead.Total()
	return speech, nil
}

func inlineSource(ctx context.Context, in *input) *source {
	size := int64(len(in.Inline))
	return &source{in: in, name: "inline", body: io.NopCloser(bytes.NewReader(in.Inline)), ctx: ctx, max: noLimit, size: size}
}

func drain(s *Speech) error {
	for {
		_, _, err := s.Next(context.Background())
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
