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
	// is read while it runs, and Speak does not return before it does. Its
	// error ends the session and is Speak's. It must not call Speak, Interrupt
	// or Close. nil: frames are counted only.
	OnFrame func(Frame) error

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

// Speak sends an utterance's speech and returns when the backend has answered
// all of it: at `end`; in egress, where none may come, when the speech has had
// time to be heard. An error ends the session. It is an *errors.Error, the
// source's, OnFrame's, or has context.Cause(ctx) in its chain; Spoken says how
// far the utterance got. Speech without any chunk sends nothing.
func (s *Session) Speak(ctx context.Context, in Utterance) (spoken Spoken, err error) {
	u := s.newUtterance(in)
	spanCtx, span := s.startSpan(ctx, u)
	err = s.speak(ctx, spanCtx, u, &spoken)
	endUtterance(span, &spoken, err)
	return spoken, err
}

// startSpan begins the span of an utterance. It is apart from Speak, whose stack
// is kept while the backend is waited for.
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

func (s *Session) speak(ctx, spanCtx context.Context, u *utterance, out *Spoken) error {
	source, cancel := context.WithCancel(spanCtx)
	defer cancel()
	u.cancel = cancel
	if err := s.begin(u); err != nil {
		return err
	}
	unwatch := s.watchUtterance(ctx, u)
	sent, err := s.send(source, u)
	how := s.await(u, sent, err)
	s.finish(u)
	unwatch()
	return s.verdict(ctx, u, how, err, out)
}

// begin makes u the utterance in flight.
func (s *Session) begin(u *utterance) error {
	s.mu.Lock()
	if s.cur != nil {
		s.mu.Unlock()
		return errors.Newf(errors.CodeInternal, errors.PhaseSend, "an utterance is in flight already")
	}
	s.cur = u
	s.mu.Unlock()
	// After cur is set: an end that comes now finds u there to cancel.
	if err := s.failure(u.reqID); err != nil {
		s.finish(u)
		s.kill(err)
		return err
	}
	return nil
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

// watchUtterance closes the session when ctx ends or no frame comes for too
// long, whatever Speak is waiting for then. The function returned ends that.
func (s *Session) watchUtterance(ctx context.Context, u *utterance) func() {
	killed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		s.kill(cancelled(ctx, "the utterance was cancelled"))
	})
	if limit := s.c.o.StallTimeout; !s.p.egress() { // in egress nothing is promised to come back
		u.stall.watch(limit, func() {
			s.kill(errors.Newf(errors.CodeConnectionClosed, errors.PhaseRuntime, "no frame for %s while speech is owed", limit))
		})
	}
	return func() {
		u.stall.stop()
		if !stop() {
			<-killed
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

// await waits for the backend to answer what was sent. Speech that was not sent
// to its end waits for what stopped it.
func (s *Session) await(u *utterance, sent bool, err error) ending {
	var done, heard <-chan struct{}
	switch {
	case err != nil:
		return endingFailure
	case sent && !u.started:
		return endingComplete
	case sent:
		done = u.done
		if s.p.egress() {
			var stop func() bool
			heard, stop = s.whenHeard(u)
			defer stop()
		}
	}
	select {
	case <-done:
		return endingComplete
	case <-heard:
		return endingComplete
	case <-u.interrupted:
		return endingInterrupt
	case <-s.ended:
	}
	select {
	case <-done: // what the backend had finished is finished, whatever came after
		return endingComplete
	default:
		return endingFailure
	}
}

// whenHeard is closed when the speech has had time to be heard.
func (s *Session) whenHeard(u *utterance) (heard <-chan struct{}, stop func() bool) {
	closed := make(chan struct{})
	t := time.AfterFunc(time.Until(u.heard)+s.c.o.EgressMargin, func() { close(closed) })
	return closed, t.Stop
}

// verdict says how the utterance went.
func (s *Session) verdict(ctx context.Context, u *utterance, how ending, err error, out *Spoken) error {
	*out = u.spoken(s.p.egress())
	out.Interrupted = how == endingInterrupt
	if how != endingFailure {
		return nil
	}
	if err != nil {
		s.end(err)
	}
	err = s.failure(u.reqID)
	s.kill(err)
	if ctx.Err() != nil {
		return cancelled(ctx, "the utterance was cancelled")
	}
	return err
}
