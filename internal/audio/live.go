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

// liveWindow is how many messages are fetched ahead: enough to hide a round trip,
// with bounded memory.
const liveWindow = 16

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

// Live is speech that is published while it is played. Use it from one goroutine
// at a time. Its Next returns the chunks of one utterance.
type Live struct {
	js       jetstream.JetStream
	spec     LiveSpec
	feed     *leader.Feed
	first    *jetstream.RawStreamMsg
	open     bool      // within an utterance
	closed   bool      // the publisher ended the session
	silent   bool      // silence ended it
	last     uint64    // sequence of the last message taken or skipped
	skipUpTo uint64    // messages up to this sequence are skipped
	begun    uint64    // of the first of this utterance
	meter    opusMeter // of this utterance, where it is Ogg Opus
	check    liveCheck // of this utterance
}

// OpenLive starts reading. The error is audioUnavailable if speech that the job
// still needs has aged out.
func OpenLive(ctx context.Context, js jetstream.JetStream, spec LiveSpec) (*Live, error) {
	if err := checkBegun(ctx, js, spec); err != nil {
		return nil, err
	}
	feed, err := leader.OpenFeed(ctx, js, leader.FeedConfig{
		Stream: spec.Stream, Subject: spec.Subject, From: spec.From, Window: liveWindow,
	})
	if err != nil {
		return nil, liveFault(err, "read "+spec.Subject)
	}
	return &Live{js: js, spec: spec, feed: feed, last: max(spec.From, 1) - 1}, nil
}

// checkBegun checks that the utterance that an earlier session started is still
// stored from its beginning.
func checkBegun(ctx context.Context, js jetstream.JetStream, spec LiveSpec) error {
	if spec.Begun == 0 {
		return nil
	}
	_, err := leader.Message(ctx, js, spec.Stream, spec.Begun)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return errors.Newf(errors.CodeAudioUnavailable, errors.PhaseAudio,
			"live: the speech from message %d of stream %s on has aged out; publish the job again", spec.Begun, spec.Stream)
	}
	if err != nil {
		return liveFault(err, "read "+spec.Subject)
	}
	return nil
}

// Closes reports whether a live message ended the session. It returns false for a
// message that has aged out.
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

// EndOfUtterance returns the sequence of the last message of the utterance that
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

// Close stops reading.
func (l *Live) Close() { l.feed.Close() }

// Begin waits for the next utterance. It returns false if there is none because
// the publisher closed the session or was silent for too long.
func (l *Live) Begin(ctx context.Context) (bool, error) {
	for l.first == nil && !l.Closed() {
		msg, err := l.take(ctx)
		switch {
		case err != nil:
			return false, err
		case msg == nil:
			l.silent = true
		case len(msg.Data) == 0:
			l.closed = flag(msg, HeaderClose)
		default:
			l.first = msg
		}
	}
	if l.first == nil {
		return false, nil
	}
	l.last = l.first.Sequence
	l.open, l.begun, l.meter, l.check = true, l.first.Sequence, opusMeter{}, liveCheck{}
	return true, nil
}

// Begun returns the sequence of the utterance's first message.
func (l *Live) Begun() uint64 { return l.begun }

// Last returns the sequence of the last message taken or skipped.
func (l *Live) Last() uint64 { return l.last }

// Closed reports whether no utterance follows the one that just ended.
func (l *Live) Closed() bool { return l.closed || l.silent }

// Next returns the utterance's next chunk as it was published, and io.EOF with or
// after the last one. Silence also ends the utterance.
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
		if next == nil {
			l.open, l.silent = false, true
			return nil, 0, io.EOF
		}
		if len(next.Data) > 0 || l.ends(next) {
			msg = next
		}
	}
	if err := l.check.chunk(l.spec, msg); err != nil {
		return nil, 0, err
	}
	length := l.length(msg.Data)
	if l.ends(msg) {
		l.open, l.closed = false, flag(msg, HeaderClose)
		return msg.Data, length, io.EOF
	}
	return msg.Data, length, nil
}

func (l *Live) ends(msg *jetstream.RawStreamMsg) bool {
	return flag(msg, HeaderEnd) || flag(msg, HeaderClose)
}

// length returns how long the bytes take to be played.
func (l *Live) length(data []byte) time.Duration {
	if l.spec.Format != PCM {
		return l.meter.measure(data)
	}
	return time.Duration(len(data)/2) * time.Second / time.Duration(l.spec.SampleRate)
}

// Skip skips the rest of the utterance in flight, which was interrupted:
// everything that is stored at some moment during the call. Speech stored after
// Skip has returned is new.
func (l *Live) Skip(ctx context.Context) error {
	// After an interrupt new speech is expected, so only later silence ends the
	// session.
	l.silent = false
	if !l.open {
		return nil
	}
	l.open, l.first = false, nil
	last, err := l.published(ctx)
	if err != nil {
		return err
	}
	if last == 0 {
		return l.skipRemoved(ctx)
	}
	for l.last < last {
		msg, err := l.take(ctx)
		switch {
		case err != nil:
			return err
		case msg == nil || msg.Sequence > last: // the last messages were removed meanwhile
			l.first, l.last = msg, last
		case l.ends(msg):
			l.closed = flag(msg, HeaderClose)
			return nil
		}
	}
	return nil
}

// skipRemoved skips an utterance that is no longer in the stream; its publisher
// may have removed it. Some of it may have been fetched before.
func (l *Live) skipRemoved(ctx context.Context) error {
	var stream jetstream.Stream
	err := leader.Try(ctx, l.spec.Stream, func(ctx context.Context) (err error) {
		stream, err = l.js.Stream(ctx, l.spec.Stream)
		return err
	})
	if err != nil {
		return liveFault(err, "query stream "+l.spec.Stream)
	}
	l.skipUpTo = stream.CachedInfo().State.LastSeq
	l.last = max(l.last, l.skipUpTo)
	return nil
}

// published returns the sequence of the subject's last message, or 0 if there is
// none.
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

// take waits for the next message. It returns nil if none was stored for
// MaxSilence.
func (l *Live) take(ctx context.Context) (*jetstream.RawStreamMsg, error) {
	silence := time.NewTimer(l.spec.MaxSilence)
	defer silence.Stop()
	for {
		select {
		case msg, open := <-l.feed.Messages():
			if !open {
				return nil, liveFault(fmt.Errorf("the subscription ended: %w", l.feed.Err()), "read "+l.spec.Subject)
			}
			if msg.Sequence <= l.skipUpTo {
				continue
			}
			l.last = msg.Sequence
			return msg, checkLiveHeaders(msg)
		case <-silence.C:
			// Nothing arrived, but a message may be stored and delayed by a lost
			// connection.
			stored, err := l.published(ctx)
			if err != nil || stored <= l.last {
				return nil, err
			}
			silence.Reset(l.spec.MaxSilence)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// checkLiveHeaders refuses values that are neither true nor false: treated as
// false, they would leave a paid session open.
func checkLiveHeaders(msg *jetstream.RawStreamMsg) error {
	for _, name := range []string{HeaderEnd, HeaderClose} {
		if _, err := header.Flag(msg.Header, name); err != nil {
			return liveHeaderFault(err, msg.Sequence, msg.Subject)
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

// flag returns a header that checkLiveHeaders has checked.
func flag(msg *jetstream.RawStreamMsg, name string) bool {
	on, _ := header.Flag(msg.Header, name)
	return on
}
