package simulator

import (
	"context"
	"net"
	"time"

	"github.com/coder/websocket"
)

// utterance is one utterance and the progress of its answer.
type utterance struct {
	reqID       string
	meter       meter
	end         bool // all speech has been received
	abandoned   bool // the next one started before its end
	interrupted bool
	late        bool      // the last frame after an interrupt is sent
	start       time.Time // its first envelope was ready
	sent        int       // key frames
	pieces      int       // envelopes
}

// piece is one envelope to send.
type piece struct {
	first, n int // key frames
	end      bool
	late     bool
	bare     bool // without data
	replay   *replayFrame
	at       int // key frames played before it is due
}

// readiness is the state of an utterance's next piece.
type readiness int

const (
	ready readiness = iota
	needsSpeech
	finished
)

// next returns the utterance's next piece of motion. An envelope is held back
// until more speech than it covers has come, or all of it. So the last envelope
// is always the one that ends, and the division of the speech into messages has
// no effect.
func (u *utterance) next() (piece, readiness) {
	size := frameLen
	if u.pieces == 0 {
		size = firstFrameLen
	}
	rest := u.meter.keyFrames() - u.sent
	switch {
	case u.interrupted && u.late:
		return piece{}, finished
	case u.interrupted:
		return piece{first: u.sent, n: min(size, max(1, rest)), late: true}, ready
	case rest > size:
		return piece{first: u.sent, n: size, at: u.sent}, ready
	case u.end && u.meter.empty():
		return piece{end: true, bare: true, at: u.sent}, ready
	case u.end:
		return piece{first: u.sent, n: max(1, rest), end: true, at: u.sent}, ready
	case u.abandoned:
		return piece{}, finished
	}
	return piece{}, needsSpeech
}

// nextReplay returns the next recorded envelope, once all speech is there.
func (u *utterance) nextReplay(frames []replayFrame) (piece, readiness) {
	switch {
	case u.interrupted || (u.abandoned && !u.end):
		return piece{}, finished
	case !u.end:
		return piece{}, needsSpeech
	}
	f := &frames[u.pieces]
	return piece{n: f.keyFrames, end: f.end, replay: f, at: u.sent}, ready
}

// nextEgress returns the next envelope for speech that plays in a room: none,
// unless the avatar sends an envelope without data at its start and end.
func (u *utterance) nextEgress(signs bool) (piece, readiness) {
	switch {
	case u.interrupted || (u.abandoned && !u.end) || (u.end && !signs):
		return piece{}, finished
	case signs && u.pieces == 0:
		return piece{bare: true}, ready
	case u.end:
		return piece{bare: true, end: true, at: u.meter.keyFrames()}, ready
	}
	return piece{}, needsSpeech
}

// step is the pump's next action.
type step struct {
	fail     bool
	utter    *utterance
	piece    piece
	envelope []byte
}

// startPump starts the pump unless it runs. The caller holds mu. A session that
// is not done is counted by the server, so Stop waits for the pump.
func (c *session) startPump() {
	if c.pumping || c.done {
		return
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.pumping = true
	c.srv.wg.Add(1)
	go c.pump()
}

func (c *session) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.startPump()
}

// pump sends what is due, and returns when nothing is.
func (c *session) pump() {
	defer c.srv.wg.Done()
	buf := c.srv.envelopes.get()
	defer func() { c.srv.envelopes.put(buf) }()
	for {
		st, more := c.next(buf[:0])
		if !more {
			return
		}
		if st.fail {
			// pumping stays set, so that nothing more is sent.
			c.fail(*c.behaviour.fault, c.currentReq())
			return
		}
		if st.piece.replay == nil {
			buf = st.envelope
		}
		if err := c.send(st); err != nil {
			c.cutConn()
			return
		}
	}
}

// send writes an envelope and records it.
func (c *session) send(st step) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	if err := c.write(st.envelope); err != nil {
		return err
	}
	c.sent(st)
	return nil
}

// next returns the pump's next step, or false if there is none now and the pump
// ends.
func (c *session) next(buf []byte) (step, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failsNow() {
		return step{fail: true}, true
	}
	for len(c.queue) > 0 && !c.done {
		u := c.queue[0]
		p, state := c.nextPiece(u)
		if state == needsSpeech {
			break
		}
		if state == finished {
			c.queue = c.queue[1:]
			continue
		}
		if p.end && c.behaviour.withhold && c.failsAtRuntime() {
			return step{fail: true}, true
		}
		if wait := c.wait(u, p); wait > 0 {
			c.timer = time.AfterFunc(wait, c.wake)
			break
		}
		return step{utter: u, piece: p, envelope: c.build(buf, u, p)}, true
	}
	c.pumping = false
	return step{}, false
}

func (c *session) nextPiece(u *utterance) (piece, readiness) {
	switch {
	case c.egress:
		return u.nextEgress(c.behaviour.egressEnd)
	case c.srv.replay != nil:
		return u.nextReplay(c.srv.replay)
	}
	return u.next()
}

func (c *session) failsAtRuntime() bool {
	return c.behaviour.fault != nil && c.behaviour.fault.phase == phaseRuntime
}

// failsNow reports whether the session has reached its fault. In egress, where
// nothing is sent, that is at the first speech.
func (c *session) failsNow() bool {
	if !c.failsAtRuntime() || c.done || c.latest == nil {
		return false
	}
	return c.egress || c.frames >= c.behaviour.after
}

// wait returns the time until a piece is due.
func (c *session) wait(u *utterance, p piece) time.Duration {
	now := time.Now()
	if u.start.IsZero() {
		u.start = now
	}
	if p.late {
		return 0
	}
	due := u.start
	if speed := c.srv.opts.Speed; speed > 0 {
		due = due.Add(time.Duration(float64(p.at) / keyFrameRate / speed * float64(time.Second)))
	}
	if c.behaviour.slow > 0 {
		last := u.start
		if c.lastSent.After(last) {
			last = c.lastSent
		}
		if slow := last.Add(c.behaviour.slow); slow.After(due) {
			due = slow
		}
	}
	return due.Sub(now)
}

func (c *session) build(buf []byte, u *utterance, p piece) []byte {
	var data []byte
	switch {
	case p.replay != nil && !c.srv.opts.ReplayPatch:
		return p.replay.envelope
	case p.replay != nil:
		data = p.replay.data
	case !p.bare:
		data = c.srv.motion.slice(p.first, p.n)
	}
	return appendAnimation(buf, c.id, u.reqID, p.end, data)
}

// sent records an envelope that was sent.
func (c *session) sent(st step) {
	c.mu.Lock()
	u := st.utter
	u.sent += st.piece.n
	u.pieces++
	u.late = u.late || st.piece.late
	if st.piece.end && len(c.queue) > 0 && c.queue[0] == u {
		c.queue = c.queue[1:]
	}
	c.frames++
	c.lastSent = time.Now()
	c.mu.Unlock()
	c.srv.sessionLog.update(c.rec, func(rec *Session) {
		rec.Frames++
		if st.piece.end {
			rec.Ends++
		}
	})
}

func (c *session) currentReq() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) > 0 {
		return c.queue[0].reqID
	}
	return c.latest.reqID
}

func (c *session) write(b []byte) error {
	return c.conn.Write(context.Background(), websocket.MessageBinary, b)
}

// writeError sends a ServerError.
func (c *session) writeError(reqID string, code int32, text string) {
	b, err := encodeError(c.id, reqID, code, text)
	if err == nil {
		err = c.write(b)
	}
	if err != nil {
		c.srv.log.Debug().Err(err).Str("connection_id", c.id).Msg("simulator: ServerError not sent")
	}
}

// fail ends the session with a fault.
func (c *session) fail(f fault, reqID string) {
	c.srv.sessionLog.countFault(f.name)
	c.srv.sessionLog.update(c.rec, func(rec *Session) { rec.Fault = f.name })
	switch {
	case c.behaviour.cut && f.phase == phaseRuntime:
		c.cut()
	case f.kind == kindGarbage:
		c.stopSending()
		// Ignore the error: the client is gone.
		_ = c.write([]byte{0xff, 0xff, 0xff})
	case f.kind == kindClose:
		c.closeWith(f.closeCode, f.text)
	default:
		c.writeError(reqID, f.serverCode, f.text)
		code := f.closeCode
		if code == 0 {
			code = 1011
		}
		c.closeWith(code, "session ended")
	}
}

// closeWith closes the WebSocket, and cuts the connection if the client doesn't
// answer in time.
func (c *session) closeWith(code int, reason string) {
	c.noteClose(code)
	c.limitClose()
	// The reader records the answer; ignore it here.
	_ = c.conn.Close(websocket.StatusCode(code), reason)
}

// cut ends the TCP connection without a close frame. It shuts the sending side
// first, so that what was sent before still arrives.
func (c *session) cut() {
	c.noteClose(1006)
	c.limitClose()
	now := c.srv.now()
	c.cutAt.CompareAndSwap(nil, &now) // however long the client takes to notice
	if tcp, ok := c.net.(*net.TCPConn); ok && tcp.CloseWrite() == nil {
		return
	}
	c.cutConn()
}

func (c *session) noteClose(code int) {
	c.stopSending()
	c.srv.sessionLog.update(c.rec, func(rec *Session) {
		if rec.CloseCode == 0 {
			rec.CloseCode, rec.ClosedBy = code, "server"
		}
	})
}

func (c *session) limitClose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closeTimer == nil {
		c.closeTimer = time.AfterFunc(closeTimeout, c.cutConn)
	}
}

// cutConn closes the TCP connection now, which is when the session ends however
// late its reader notices.
func (c *session) cutConn() {
	now := c.srv.now()
	c.cutAt.CompareAndSwap(nil, &now)
	// It may be closed already.
	_ = c.net.Close()
}

func (c *session) stopSending() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = true
	if c.timer != nil {
		c.timer.Stop()
	}
}

// finish frees the session's resources when its reader has ended.
func (c *session) finish() {
	c.stopSending()
	c.mu.Lock()
	for _, t := range []*time.Timer{c.closeTimer, c.heartbeat} {
		if t != nil {
			t.Stop()
		}
	}
	c.mu.Unlock()
	// Usually the other side has closed it already.
	_ = c.conn.CloseNow()
	// What was sent last is recorded before the session's end is.
	c.sending.Lock()
	c.sending.Unlock() //nolint:staticcheck // empty: it waits for send
}
