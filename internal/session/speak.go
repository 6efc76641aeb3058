package session

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/errors"
)

// Speech provides an utterance's speech, chunk by chunk.
type Speech interface {
	// Next returns the next chunk and its playing time (0: not known). It returns
	// io.EOF after the last chunk, alone or with the last chunk. data is valid
	// until the next call. Next returns when ctx ends.
	Next(ctx context.Context) (data []byte, length time.Duration, err error)
}

// Utterance is one piece of speech.
type Utterance struct {
	Speech Speech
	// OnFrame is called with each envelope, in order, by the session's reader:
	// nothing is read while it runs, and Wait does not return before it does. If
	// it returns an error, the session ends and Wait returns that error. It must
	// not call Start, Wait, Interrupt or Close. nil: frames are only counted.
	OnFrame func(Frame) error
	// OnInterrupt is called by Interrupt when it has stopped this utterance,
	// before Wait returns. It must not block. nil: nothing is called.
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

// Spoken is the result of an utterance.
type Spoken struct {
	ReqID       string        // "" if there was no speech at all
	Frames      int           // handed to OnFrame
	Bytes       int64         // of those frames
	Audio       time.Duration // length of the speech that was sent
	FirstFrame  time.Duration // from the first chunk to the first frame; 0 in egress, and without frames
	Duration    time.Duration // from the first chunk to the end
	Interrupted bool
}

// Speak sends an utterance and waits for the backend's answer: Start, then Wait.
func (s *Session) Speak(ctx context.Context, in Utterance) (Spoken, error) {
	return s.Start(ctx, in).Wait()
}

// Call is an utterance in flight.
type Call struct {
	s *Session
	u *utterance
}

// Start sends an utterance's speech. It returns when all of it is sent, or when
// the utterance is over earlier. If ctx ends before Wait returns, the session is
// closed.
//
// It is separate from Wait because thousands of goroutines may wait for the
// backend for a long time: waiting on Done needs almost no stack.
func (s *Session) Start(ctx context.Context, in Utterance) Call {
	u := s.newUtterance(in)
	u.ctx = ctx
	source, span := s.startSpan(ctx, u)
	u.span = span
	source, cancel := context.WithCancel(source)
	u.cancel.Store(&cancel)
	u.begun, u.err = s.begin(u)
	if u.begun {
		u.unwatch = s.watchUtterance(u)
		u.sent, u.err = s.send(source, u)
	}
	u.stopSource()
	u.speech = nil
	switch {
	case u.err != nil:
		u.finish(endingFailure)
	case u.sent && !u.started:
		u.finish(endingComplete)
	case u.sent && s.egress:
		s.play(u)
	}
	return Call{s, u}
}

// play lets speech in a room, all of which is sent, be played. An end that came while
// its last message was written may be the answer to that, or say that playback had run
// dry just before: then the speech is played, and no answer is waited for.
func (s *Session) play(u *utterance) {
	u.allSent.Store(true)
	margin := s.c.o.EgressMargin
	if u.endSeen.Load() {
		margin = 0
	}
	u.playback = time.AfterFunc(time.Until(u.playedUntil)+margin, func() { u.finish(endingComplete) })
}

// Done is closed when the backend has answered all of the speech: at `end` or, in
// egress, where no answer may come, when the speech has had time to be played. It
// is also closed when there is nothing more to wait for.
func (x Call) Done() <-chan struct{} { return x.u.done }

// Wait waits for the answer and returns the result of the utterance. Call it
// once. An error ends the session. It is an *errors.Error, the source's,
// OnFrame's, or has context.Cause(ctx) in its chain; Spoken then says how far the
// utterance got. Speech without any chunk sends nothing.
func (x Call) Wait() (spoken Spoken, err error) {
	s, u := x.s, x.u
	if err = u.err; u.begun {
		how := s.waitEnding(u)
		s.clearCurrent(u)
		u.unwatch()
		spoken, err = s.result(u, how)
	}
	endUtterance(u.span, &spoken, err)
	return spoken, err
}

// startSpan starts the span of an utterance.
func (s *Session) startSpan(ctx context.Context, u *utterance) (context.Context, trace.Span) {
	spanCtx, span := s.c.span(remoteParent(ctx, u.tc.parent, u.tc.state), spanUtterance, s.red.region)
	span.SetAttributes(attribute.String("avatar.connection_id", s.connectionID), attribute.String("avatar.req_id", u.reqID))
	return spanCtx, span
}

func endUtterance(span trace.Span, spoken *Spoken, err error) {
	span.SetAttributes(
		attribute.Int("avatar.frames", spoken.Frames), attribute.Int64("avatar.bytes", spoken.Bytes),
		attribute.Int64("avatar.audio_ms", spoken.Audio.Milliseconds()), attribute.Bool("avatar.interrupted", spoken.Interrupted))
	endSpan(span, err)
}

// begin makes u the utterance in flight. It returns false if it can't.
func (s *Session) begin(u *utterance) (bool, error) {
	s.mu.Lock()
	if s.cur != nil {
		s.mu.Unlock()
		return false, errors.Newf(errors.CodeInternal, errors.PhaseSend, "an utterance is in flight already")
	}
	s.cur = u
	s.mu.Unlock()
	// Check after setting cur: if the session ends now, end finds u and cancels
	// it.
	if err := s.failure(u.reqID); err != nil {
		s.clearCurrent(u)
		s.kill(err)
		return false, err
	}
	return true, nil
}

// clearCurrent ends the utterance in flight. OnFrame is not running when it
// returns.
func (s *Session) clearCurrent(u *utterance) {
	u.over.Store(true)
	s.mu.Lock()
	s.cur = nil
	s.mu.Unlock()
	s.delivering <- struct{}{}
	<-s.delivering
}

// watchUtterance closes the session when its context ends or when no frame comes
// for too long. The returned function stops that.
func (s *Session) watchUtterance(u *utterance) func() {
	stop := func() bool { return u.ctx.Err() == nil } // Open's context is watched already
	if u.ctx != s.ctx {
		stop = context.AfterFunc(u.ctx, func() { s.kill(cancelled(u.ctx, "the utterance was cancelled")) })
	}
	if limit := s.c.o.StallTimeout; !s.egress { // in egress no frames come back
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

// waitEnding waits for the end of the utterance.
func (s *Session) waitEnding(u *utterance) ending {
	<-u.done
	if u.playback != nil {
		u.playback.Stop()
	}
	switch {
	case u.how != endingComplete:
		return u.how
	case u.err != nil: // the backend was done before the source failed
		return endingFailure
	}
	if u.sent && !u.over.Swap(true) {
		return endingComplete
	}
	// The backend was done before it had received everything, or while Interrupt
	// stopped it: what stopped the speech decides how it ended.
	select {
	case <-u.interrupted:
		return endingInterrupt
	case <-s.ended:
		return endingFailure
	}
}

// result returns the result of the utterance.
func (s *Session) result(u *utterance, how ending) (Spoken, error) {
	out := u.spoken(s.egress)
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
