package session

import (
	"context"
	"io"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

// envelopeRoom is more than an envelope adds to its speech.
const envelopeRoom = 512

// send sends the speech up to its end. It is false where an interrupt or the
// end of the session stopped it; its error is the source's.
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
		if (len(data) > 0 || last) && !s.write(u, data, length, last) {
			return false, nil
		}
		if last {
			return true, nil
		}
	}
}

// paced waits, at the pace of speech, for the next chunk's turn. The end of
// speech has none to wait for.
func (s *Session) paced(ctx context.Context, u *utterance) bool {
	if s.c.o.Pace != PaceRealtime || !u.started {
		return true
	}
	t := time.NewTimer(time.Until(u.heard))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// write writes one chunk; false if the utterance or the session is over.
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
	// A source slower than speech leaves gaps that are heard as such.
	if now.After(u.heard) {
		u.heard = now
	}
	u.heard = u.heard.Add(length)

	buf := s.c.bufs.get(classOf(len(data) + envelopeRoom))
	defer s.c.bufs.put(buf)
	msg := appendAudio(buf.b[:0], u.reqID, last, data, u.tc)
	u.tc = traceContext{} // only the first message of an id carries it
	// Without ctx: the library would cut the connection when it ends, and the
	// promise is to close it.
	if err := s.conn.Write(context.Background(), websocket.MessageBinary, msg); err != nil {
		s.sendFailed(errors.PhaseSend, err)
		return false
	}
	u.stall.sent(time.Now(), length, last)
	return true
}

// Interrupt tells the backend to stop the utterance in flight, and gives its
// req_id. When it returns, no further frame of the utterance is or will be
// handed out, and its Speak returns with Interrupted. The session goes on. It
// is ErrNoUtterance if there is none. When ctx ends before the message could be
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
	// One frame may be in OnFrame's hands.
	select {
	case s.delivering <- struct{}{}:
		<-s.delivering
		return u.reqID, nil
	case <-ctx.Done():
		return u.reqID, cancelled(ctx, "waiting for the last frame's handler")
	}
}

// writeInterrupt stops u; the caller holds sending, so that no speech of u
// follows the message.
func (s *Session) writeInterrupt(u *utterance) error {
	if u.over.Swap(true) {
		return ErrNoUtterance // it has just ended, or been interrupted
	}
	defer u.cancel()
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
	u.answer(endingInterrupt)
	return nil
}
