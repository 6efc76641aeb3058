package session

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

// readLoop reads from upgrade to close, so that pings are answered and a close by
// the backend is seen at once. It is the only reader.
func (s *Session) readLoop() {
	defer s.c.wg.Done()
	defer close(s.readDone)
	s.kill(s.read())
}

// read reads until something ends the session. A panic, for example in OnFrame,
// ends only this session.
func (s *Session) read() (err error) {
	defer errors.Recover(&err, errors.PhaseRuntime)
	for hint := classOf(0); err == nil; {
		// This may take as long as the session is open, so the stack is kept small
		// here: everything that needs more has returned.
		s.in.wait()
		hint, err = s.next(hint)
	}
	return err
}

// next reads and handles one message, a ping or a pong. It holds no buffer while
// it waits, and allocates nothing for a frame.
func (s *Session) next(hint int) (int, error) {
	confirmed, phase := !s.confirmedAt.IsZero(), errors.PhaseRuntime
	if !confirmed {
		phase = errors.PhaseHandshake
	}
	// A context that can't end costs nothing on each read.
	typ, r, err := s.conn.Reader(context.Background())
	switch {
	case err == nil && confirmed:
		return s.message(typ, r, hint)
	case err == nil:
		return hint, s.confirm(typ, r)
	case errors.Is(err, errIdle):
		return hint, nil
	}
	return hint, readFailed(phase, err)
}

// confirm handles the first message (docs/protocol.md, section 5).
func (s *Session) confirm(typ websocket.MessageType, r io.Reader) error {
	const phase = errors.PhaseHandshake
	if typ != websocket.MessageBinary {
		return errors.FromTextFrame(phase)
	}
	buf, n, err := s.c.bufs.readMessage(r, classOf(0))
	defer s.c.bufs.put(buf)
	if err != nil {
		return readFailed(phase, err)
	}
	e, err := decodeEnvelope(buf.b[:n])
	if err != nil {
		return errors.FromFrame(phase, err)
	}
	switch {
	case e.kind == avatarpb.MessageType_MESSAGE_TYPE_SERVER_ERROR:
		return serverError(phase, e)
	case e.kind != avatarpb.MessageType_MESSAGE_TYPE_SERVER_CONFIRM_SESSION:
		return errors.Newf(errors.CodeProtocolError, phase, "the backend answered the configuration with a message of type %d", e.kind)
	case len(e.connectionID) == 0:
		return errors.Newf(errors.CodeProtocolError, phase, "the backend confirmed the session without a connection id")
	}
	// The backend bills from its confirm, however late this process comes to read it.
	s.connectionID, s.confirmedAt = backendID(e.connectionID), time.Now().Add(-s.in.quietFor())
	close(s.confirmed)
	return nil
}

// message handles a message after the first one.
func (s *Session) message(typ websocket.MessageType, r io.Reader, hint int) (int, error) {
	buf, n, err := s.c.bufs.readMessage(r, hint)
	if err == nil && typ == websocket.MessageBinary {
		err = s.handle(buf.b[:n])
	} else if err != nil {
		err = readFailed(errors.PhaseRuntime, err)
	}
	s.c.bufs.put(buf)
	return classOf(n), err
}

// handle dispatches a message by its few fields. Unknown types are ignored.
func (s *Session) handle(b []byte) error {
	e, err := decodeEnvelope(b)
	if err != nil {
		return errors.FromFrame(errors.PhaseRuntime, err)
	}
	switch e.kind {
	case avatarpb.MessageType_MESSAGE_TYPE_SERVER_ERROR:
		return serverError(errors.PhaseRuntime, e)
	case avatarpb.MessageType_MESSAGE_TYPE_SERVER_RESPONSE_ANIMATION:
		return s.deliver(e, b)
	}
	return nil
}

func serverError(phase errors.Phase, e envelope) error {
	err := errors.FromServerError(phase, e.code, e.message)
	err.ConnectionID, err.ReqID = backendID(e.connectionID), backendID(e.reqID)
	return err
}

// maxID bounds the backend's IDs, in bytes; real ones have about 30. They are
// written into records, events and logs. One that did not fit there would fail a
// paid session again and again.
const maxID = 256

func backendID(id []byte) string {
	if len(id) > maxID {
		return strings.ToValidUTF8(string(id[:maxID]), "")
	}
	return string(id)
}

// deliver passes a frame to its utterance. Frames of other utterances, and frames
// after the end, are dropped.
func (s *Session) deliver(e envelope, b []byte) error {
	s.mu.Lock()
	u := s.cur
	s.mu.Unlock()
	if u == nil || u.ended || string(e.reqID) != u.reqID {
		return nil
	}
	s.delivering <- struct{}{}
	defer func() { <-s.delivering }()
	// Check with the lock held: after setting over and taking the lock, a caller
	// knows that OnFrame neither runs nor will run.
	if u.over.Load() {
		return nil
	}
	return s.callOnFrame(u, e, b)
}

func (s *Session) callOnFrame(u *utterance, e envelope, b []byte) error {
	now := time.Now()
	u.stall.frame(now)
	u.frames++
	u.bytes += int64(len(b))
	if u.frames == 1 {
		u.firstFrameAt = now
	}
	if u.onFrame != nil {
		s.handling.Store(int64(now.Sub(s.born)) + 1)
		err := u.onFrame(Frame{ReqID: u.reqID, End: e.end, Data: b})
		now = time.Now()
		s.handled.Add(int64(now.Sub(s.born)) + 1 - s.handling.Swap(0))
		if err != nil {
			return &ownError{err}
		}
	}
	u.stall.handled(now, e.end)
	if e.end && s.egress && u.finishing.Load() {
		u.endSeen.Store(true) // before allSent is looked at: play sets that before it looks here
	}
	if e.end && (!s.egress || u.allSent.Load()) {
		u.ended = true
		u.endedAt = now
		u.finish(endingComplete)
	}
	return nil
}

// handlerTime returns how long OnFrame has blocked the reader.
func (s *Session) handlerTime() time.Duration {
	d := s.handled.Load()
	if since := s.handling.Load(); since != 0 {
		d += int64(time.Since(s.born)) + 1 - since
	}
	return time.Duration(d)
}
