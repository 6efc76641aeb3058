package audio

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/header"
	"avatarworker/internal/leader"
)

// Headers of a live audio message: booleans, as internal/header reads them.
const (
	HeaderEnd   = "Avatar-End"   // the utterance ends with this message
	HeaderClose = "Avatar-Close" // the session ends with this message
)

// liveWindow is how many messages are fetched ahead: enough to hide a round
// trip, and a bounded amount of memory.
const liveWindow = 16

// liveForgotten is how long the server keeps a consumer that nobody reads from
// any more: a session may be over in seconds.
const liveForgotten = 30 * time.Second

// LiveSpec is the speech of a live job.
type LiveSpec struct {
	Stream     string // the stream that keeps it
	Subject    string
	From       uint64 // sequence of the first message wanted; 0: the first there is
	Begun      uint64 // the utterance in flight begins with this message; 0: not known
	Format     Format
	SampleRate int           // Hz
	MaxSilence time.Duration // ends the session
}

// Live is speech that is published while it is spoken. It is used from one
// goroutine at a time; its Next gives the chunks of one utterance.
type Live struct {
	js       jetstream.JetStream
	spec     LiveSpec
	messages jetstream.MessagesContext
	arrived  chan jetstream.Msg
	failed   error // why arrived was closed
	first    jetstream.Msg
	open     bool            // within an utterance
	closed   bool            // no more utterances
	last     uint64          // sequence of the last message taken
	begun    uint64          // of the first of this utterance
	meter    opusMeter       // of this utterance, where it is Ogg Opus
	life     context.Context // of the receiver
	end      context.CancelFunc
}

// OpenLive starts reading. The error is audioUnavailable where speech that the
// job still needs has aged out.
func OpenLive(ctx context.Context, js jetstream.JetStream, spec LiveSpec) (*Live, error) {
	if err := stillThere(ctx, js, spec); err != nil {
		return nil, err
	}
	config := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{spec.Subject}, DeliverPolicy: jetstream.DeliverAllPolicy, InactiveThreshold: liveForgotten,
	}
	if spec.From > 0 {
		config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, spec.From
	}
	var consumer jetstream.Consumer
	err := leader.Try(ctx, spec.Stream, func(ctx context.Context) (err error) {
		consumer, err = js.OrderedConsumer(ctx, spec.Stream, config)
		return err
	})
	if err != nil {
		return nil, liveFault(err, "read "+spec.Subject)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(liveWindow))
	if err != nil {
		return nil, liveFault(err, "read "+spec.Subject)
	}
	l := &Live{js: js, spec: spec, messages: messages, arrived: make(chan jetstream.Msg), last: max(spec.From, 1) - 1}
	l.life, l.end = context.WithCancel(context.WithoutCancel(ctx)) // Close ends it
	go l.receive()
	return l, nil
}

// stillThere checks that the utterance that a session before this one began is
// still kept from its beginning.
func stillThere(ctx context.Context, js jetstream.JetStream, spec LiveSpec) error {
	if spec.Begun == 0 {
		return nil
	}
	_, err := leader.Message(ctx, js, spec.Stream, spec.Begun)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return errors.Newf(errors.CodeAudioUnavailable, errors.PhaseAudio,
			"live: the speech from message %d of stream %s on has aged out; publish the job anew", spec.Begun, spec.Stream)
	}
	if err != nil {
		return liveFault(err, "read "+spec.Subject)
	}
	return nil
}

// Closes tells whether a live message ended the session. One that has aged out
// did not, as far as anybody knows.
func Closes(ctx context.Context, js jetstream.JetStream, stream string, seq uint64) (bool, error) {
	msg, err := leader.Message(ctx, js, stream, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, liveFault(err, "read stream "+stream)
	}
	closes, err := header.Flag(msg.Header, HeaderClose)
	return closes, liveHeaderFault(err, seq, msg.Subject)
}

// EndOfUtterance is the sequence of the last message of the utterance that
// begins with spec.Begun.
func EndOfUtterance(ctx context.Context, js jetstream.JetStream, spec LiveSpec) (uint64, error) {
	spec.From = spec.Begun
	l, err := OpenLive(ctx, js, spec)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	for {
		msg, err := l.take(ctx)
		if err != nil {
			return 0, err
		}
		if msg == nil || l.ends(msg) { // nil: silence ended it
			return l.last, nil
		}
	}
}

func liveFault(err error, what string) *errors.Error {
	e := errors.Wrap(errors.CodeAudioUnavailable, errors.PhaseAudio, err, "live: "+what)
	e.Network = true
	return e
}

// receive hands messages over one by one; what waits is bounded by liveWindow.
func (l *Live) receive() {
	defer close(l.arrived)
	for {
		msg, err := l.messages.Next(jetstream.NextContext(l.life))
		if err != nil {
			l.failed = err
			return
		}
		select {
		case l.arrived <- msg:
		case <-l.life.Done():
			return
		}
	}
}

// Close ends the reading.
func (l *Live) Close() {
	// Stop alone does not end a Next that is just making its consumer anew.
	l.end()
	l.messages.Stop()
	for range l.arrived { // until the receiver has ended
	}
}

// Begin waits for the next utterance; false: there is none, the publisher closed
// the session or said nothing for too long.
func (l *Live) Begin(ctx context.Context) (bool, error) {
	for l.first == nil && !l.closed {
		msg, err := l.take(ctx)
		if err != nil {
			return false, err
		}
		if msg == nil {
			l.closed = true
			break
		}
		if len(msg.Data()) == 0 {
			l.closed = flag(msg, HeaderClose)
			continue
		}
		l.first = msg
	}
	if l.first == nil {
		return false, nil
	}
	l.open, l.begun, l.meter = true, sequence(l.first), opusMeter{}
	return true, nil
}

// Begun is the sequence of the utterance's first message.
func (l *Live) Begun() uint64 { return l.begun }

// Last is the sequence of the last message taken.
func (l *Live) Last() uint64 { return l.last }

// Closed tells whether the utterance that just ended was the last.
func (l *Live) Closed() bool { return l.closed }

// Next gives the utterance's next chunk as it was published; io.EOF with or
// after the last. Silence ends the utterance too.
func (l *Live) Next(ctx context.Context) ([]byte, time.Duration, error) {
	if !l.open {
		return nil, 0, io.EOF
	}
	msg := l.first
	l.first = nil
	for msg == nil {
		next, err := l.take(ctx)
		if err != nil {
			return nil, 0, err
		}
		if next == nil { // silence
			l.open, l.closed = false, true
			return nil, 0, io.EOF
		}
		if len(next.Data()) > 0 || l.ends(next) {
			msg = next
		}
	}
	if len(msg.Data())%2 == 1 && l.spec.Format == PCM {
		return nil, 0, errors.Newf(errors.CodeInvalidJob, errors.PhaseAudio,
			"live: message %d on %s has %d bytes; 16-bit PCM has an even number in each", sequence(msg), l.spec.Subject, len(msg.Data()))
	}
	length := l.length(msg.Data())
	if l.ends(msg) {
		l.open, l.closed = false, flag(msg, HeaderClose)
		return msg.Data(), length, io.EOF
	}
	return msg.Data(), length, nil
}

func (l *Live) ends(msg jetstream.Msg) bool {
	return flag(msg, HeaderEnd) || flag(msg, HeaderClose)
}

// length is how long the bytes take to be spoken.
func (l *Live) length(data []byte) time.Duration {
	if l.spec.Format != PCM {
		return l.meter.measure(data)
	}
	return time.Duration(len(data)/2) * time.Second / time.Duration(l.spec.SampleRate)
}

// Skip passes over the rest of the utterance in flight, as far as it has been
// published: it was interrupted, and what is published from now on is new.
func (l *Live) Skip(ctx context.Context) error {
	if !l.open {
		return nil
	}
	l.open, l.first = false, nil
	last, err := l.published(ctx)
	if err != nil {
		return err
	}
	for l.last < last && !l.closed {
		msg, err := l.take(ctx)
		if err != nil {
			return err
		}
		if msg == nil || l.ends(msg) {
			l.closed = msg == nil || flag(msg, HeaderClose)
			return nil
		}
	}
	return nil
}

// published is the sequence of the subject's last message.
func (l *Live) published(ctx context.Context) (uint64, error) {
	msg, err := leader.Last(ctx, l.js, l.spec.Stream, l.spec.Subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, liveFault(err, "read "+l.spec.Subject)
	}
	return msg.Sequence, nil
}

// take waits for the next message; nil: none came within MaxSilence.
func (l *Live) take(ctx context.Context) (jetstream.Msg, error) {
	silence := time.NewTimer(l.spec.MaxSilence)
	defer silence.Stop()
	select {
	case msg, open := <-l.arrived:
		if !open {
			return nil, liveFault(fmt.Errorf("the subscription ended: %w", l.failed), "read "+l.spec.Subject)
		}
		l.last = sequence(msg)
		return msg, checkLiveHeaders(msg)
	case <-silence.C:
		return nil, nil //nolint:nilnil // nothing came, and that is no error
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// checkLiveHeaders refuses what is neither true nor false: taken for a no, it
// would leave a session open that is paid for.
func checkLiveHeaders(msg jetstream.Msg) error {
	for _, name := range []string{HeaderEnd, HeaderClose} {
		if _, err := header.Flag(msg.Headers(), name); err != nil {
			return liveHeaderFault(err, sequence(msg), msg.Subject())
		}
	}
	return nil
}

func liveHeaderFault(err error, seq uint64, subject string) error {
	if err == nil {
		return nil
	}
	return errors.Newf(errors.CodeInvalidJob, errors.PhaseAudio, "live: message %d on %s: %s", seq, subject, err)
}

// flag is a header that checkLiveHeaders has seen.
func flag(msg jetstream.Msg, name string) bool {
	on, _ := header.Flag(msg.Headers(), name)
	return on
}

func sequence(msg jetstream.Msg) uint64 {
	meta, err := msg.Metadata()
	if err != nil {
		return 0 // an ordered consumer's messages have it
	}
	return meta.Sequence.Stream
}
