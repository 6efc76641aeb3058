package session

import (
	"context"
	"io"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

// envelopeRoom is more than the envelope adds to its speech.
const envelopeRoom = 512

// send sends the speech to its end. It returns false if an interrupt or the end
// of the session stopped it. Its error is the source's.
func (s *Session) send(ctx context.Context, u *utterance) (bool, error) {
	u.tc = traceOf(ctx, u.tc)
	for {
		data, length, err := u.speech.Next(ctx)
		last := err == io.EOF
		switch {
		case ctx.Err() != nil:
			return false, nil
		case err != nil && !last:
			return false, &ownError{err}
		case last && len(data) == 0 && !u.started:
			return true, nil
		}
		u.stall.flowing(time.Now())
		if len(data) > 0 && !s.paced(ctx, u) {
			return false, nil
		}
		u.finishing.Store(last)
		if (len(data) > 0 || last) && !s.write(u, data, length, last) {
			return false, nil
		}
		if last {
			return true, nil
		}
	}
}

// paced waits until the next chunk is due if speech is sent at its own pace. The
// end of speech is sent at once.
func (s *Session) paced(ctx context.Context, u *utterance) bool {
	if s.c.o.Pace != PaceRealtime || !u.started {
		return true
	}
	t := time.NewTimer(time.Until(u.playedUntil))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// write writes one chunk. It returns false if the utterance or the session is
// over.
func (s *Session) write(u *utterance, data []byte, length time.Duration, last bool) bool {
	select {
	case s.sending <- struct{}{}:
	case <-s.ended:
		return false
	}
	defer func() { <-s.sending }()
	if u.over.Load() {
		return false
	}
	now := time.Now()
	if !u.started {
		u.started, u.startedAt = true, now
	}
	u.audio += length
	// A source slower than speech leaves gaps that listeners hear.
	if now.After(u.playedUntil) {
		u.playedUntil = now
	}
	u.playedUntil = u.playedUntil.Add(length)

	buf := s.c.bufs.get(classOf(len(data) + envelopeRoom))
	defer s.c.bufs.put(buf)
	msg := appendAudio(buf.b[:0], u.reqID, last, data, u.tc)
	u.tc = traceContext{} // only the first message of an id carries it
	// Without ctx: the library would cut the connection when ctx ends, but Start
	// promises to close it.
	if err := s.conn.Write(context.Background(), websocket.MessageBinary, msg); err != nil {
		s.sendFailed(errors.PhaseSend, err)
		return false
	}
	u.stall.sent(time.Now(), length, last)
	return true
}

// Interrupt tells the backend to stop the utterance in flight and returns its
// req_id. When it returns, no further frame of the utterance is passed to
// OnFrame, and its Wait returns with Interrupted. The session goes on. It returns
// ErrNoUtterance if there is none. If ctx ends before the message could be
// written, nothing was interrupted.
func (s *Session) Interrupt(ctx context.Context) (string, error) {
	s.mu.Lock()
	u := s.cur
	s.mu.Unlock()
	if u == nil {
		return "", ErrNoUtterance
	}
	select {
	case s.sending <- struct{}{}:
	case <-s.ended:
		return "", s.failure(u.reqID)
	case <-ctx.Done():
		return "", cancelled(ctx, "interrupting the utterance")
	}
	err := s.writeInterrupt(u)
	<-s.sending
	if err != nil {
		return "", err
	}
	// OnFrame may still be handling one frame.
	select {
	case s.delivering <- struct{}{}:
		<-s.delivering
		return u.reqID, nil
	case <-ctx.Done():
		return u.reqID, cancelled(ctx, "waiting for the last frame's handler")
	}
}

// writeInterrupt stops u. The caller holds sending, so that no speech of u
// follows the message.
func (s *Session) writeInterrupt(u *utterance) error {
	if u.over.Swap(true) {
		return ErrNoUtterance // it has just ended, or been interrupted
	}
	defer u.stopSource()
	if u.started { // else the backend knows nothing of it
		msg := appendInterrupt(make([]byte, 0, 64), u.reqID)
		if err := s.conn.Write(context.Background(), websocket.MessageBinary, msg); err != nil {
			s.sendFailed(errors.PhaseSend, err)
			return s.failure(u.reqID)
		}
	}
	if u.onInterrupt != nil {
		u.onInterrupt()
	}
	close(u.interrupted)
	u.finish(endingInterrupt)
	return nil
}
