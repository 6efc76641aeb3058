package session

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/errors"
)

// Speech gives an utterance's speech, chunk by chunk.
type Speech interface {
	// Next gives the next chunk and the time it takes to be heard (0: not
	// known). It is io.EOF after the last, alone or with the last chunk. data is
	// valid until the next call. Next returns when ctx ends.
	Next(ctx context.Context) (data []byte, length time.Duration, err error)
}

// Utterance is one piece of speech.
type Utterance struct {
	Speech Speech
	// OnFrame gets each envelope, in order, from the session's reader: nothing
	// is read while it runs, and End does not return before it does. Its error
	// ends the session and is End's. It must not call Say, End, Interrupt or
	// Close. nil: frames are counted only.
	OnFrame func(Frame) error
	// OnInterrupt is called by Interrupt when it has stopped this utterance,
	// before End returns. It must not block. nil: nothing is called.
	OnInterrupt func()

	// W3C, used where the context carries no trace; empty: those of Params.
	TraceParent, TraceState string
}

// Frame is one envelope of the backend.
type Frame struct {
	ReqID string
	End   bool   // the utterance's last
	Data  []byte // as received; valid only during the call
}

// Spoken says how an utterance went.
type Spoken struct {
	ReqID       string        // "" if there was no speech at all
	Frames      int           // handed to OnFrame
	Bytes       int64         // of those frames
	Audio       time.Duration // length of the speech that was sent
	FirstFrame  time.Duration // from the first chunk to the first frame; 0 in egress, and without frames
	Duration    time.Duration // from the first chunk to the end
	Interrupted bool
}

// Speak says an utterance and waits for its answer: Say, then End.
func (s *Session) Speak(ctx context.Context, in Utterance) (Spoken, error) {
	return s.Say(ctx, in).End()
}

// Saying is an utterance under way.
type Saying struct {
	s *Session
	u *utterance
}

// Say sends an utterance's speech. It returns when all of it is sent, or the
// utterance is over before. When ctx ends before End, the session is closed.
//
// It is apart from End because whoever waits for the backend waits long, in
// thousands of goroutines: on Answered that needs next to no stack.
func (s *Session) Say(ctx context.Context, in Utterance) Saying {
	u := s.newUtterance(in)
	u.ctx = ctx
	var source context.Context
	source, u.span = s.startSpan(ctx, u)
	source, u.cancel = context.WithCancel(source)
	u.begun, u.err = s.begin(u)
	if u.begun {
		u.unwatch = s.watchUtterance(u)
		u.sent, u.err = s.send(source, u)
	}
	u.cancel()
	u.speech = nil
	switch {
	case u.err != nil:
		u.answer(endingFailure)
	case u.sent && !u.started:
		u.answer(endingComplete)
	case u.sent && s.p.egress():
		u.audible = time.AfterFunc(time.Until(u.heard)+s.c.o.EgressMargin, func() { u.answer(endingComplete) })
	}
	return Saying{s, u}
}

// Answered is closed when the backend has answered all of the speech: at `end`;
// in egress, where none may come, when the speech has had time to be heard. It
// is closed, too, when there is nothing more to wait for.
func (x Saying) Answered() <-chan struct{} { return x.u.answered }

// End waits for the answer and says how the utterance went. It is to be called
// once. An error ends the session. It is an *errors.Error, the source's,
// OnFrame's, or has context.Cause(ctx) in its chain; Spoken says how far the
// utterance got. Speech without any chunk sends nothing.
func (x Saying) End() (spoken Spoken, err error) {
	s, u := x.s, x.u
	if err = u.err; u.begun {
		how := s.ending(u)
		s.finish(u)
		u.unwatch()
		spoken, err = s.verdict(u, how)
	}
	endUtterance(u.span, &spoken, err)
	return spoken, err
}

// startSpan begins the span of an utterance.
func (s *Session) startSpan(ctx context.Context, u *utterance) (context.Context, trace.Span) {
	spanCtx, span := s.c.span(remoteParent(ctx, u.tc.parent, u.tc.state), spanUtterance, s.region)
	span.SetAttributes(attribute.String("avatar.connection_id", s.connectionID), attribute.String("avatar.req_id", u.reqID))
	return spanCtx, span
}

func endUtterance(span trace.Span, spoken *Spoken, err error) {
	span.SetAttributes(
		attribute.Int("avatar.frames", spoken.Frames), attribute.Int64("avatar.bytes", spoken.Bytes),
		attribute.Int64("avatar.audio_ms", spoken.Audio.Milliseconds()), attribute.Bool("avatar.interrupted", spoken.Interrupted))
	endSpan(span, err)
}

// begin makes u the utterance in flight; false: it is not.
func (s *Session) begin(u *utterance) (bool, error) {
	s.mu.Lock()
	if s.cur != nil {
		s.mu.Unlock()
		return false, errors.Newf(errors.CodeInternal, errors.PhaseSend, "an utterance is in flight already")
	}
	s.cur = u
	s.mu.Unlock()
	// After cur is set: an end that comes now finds u there to cancel.
	if err := s.failure(u.reqID); err != nil {
		s.finish(u)
		s.kill(err)
		return false, err
	}
	return true, nil
}

// finish leaves no utterance in flight, and OnFrame not running.
func (s *Session) finish(u *utterance) {
	u.over.Store(true)
	s.mu.Lock()
	s.cur = nil
	s.mu.Unlock()
	s.delivering <- struct{}{}
	<-s.delivering
}

// watchUtterance closes the session when its context ends or no frame comes for
// too long, whatever is waited for then. The function returned ends that.
func (s *Session) watchUtterance(u *utterance) func() {
	stop := context.AfterFunc(u.ctx, func() { s.kill(cancelled(u.ctx, "the utterance was cancelled")) })
	if limit := s.c.o.StallTimeout; !s.p.egress() { // in egress nothing is promised to come back
		u.stall.watch(limit, func() {
			s.kill(errors.Newf(errors.CodeConnectionClosed, errors.PhaseRuntime, "no frame for %s while speech is owed", limit))
		})
	}
	return func() {
		u.stall.stop()
		if !stop() {
			<-s.closed
		}
	}
}

// ending is what ended the wait for an utterance.
type ending int

const (
	endingFailure ending = iota
	endingComplete
	endingInterrupt
)

// ending waits for what ends the utterance.
func (s *Session) ending(u *utterance) ending {
	<-u.answered
	if u.audible != nil {
		u.audible.Stop()
	}
	if u.sent || u.err != nil || u.how != endingComplete {
		return u.how
	}
	// The backend was done before it had heard everything: what stopped the
	// speech says how it ended.
	select {
	case <-u.interrupted:
		return endingInterrupt
	case <-s.ended:
		return endingFailure
	}
}

// verdict says how the utterance went.
func (s *Session) verdict(u *utterance, how ending) (Spoken, error) {
	out := u.spoken(s.p.egress())
	out.Interrupted = how == endingInterrupt
	if how != endingFailure {
		return out, nil
	}
	if u.err != nil {
		s.end(u.err)
	}
	err := s.failure(u.reqID)
	s.kill(err)
	if u.ctx.Err() != nil {
		err = cancelled(u.ctx, "the utterance was cancelled")
	}
	return out, err
}
