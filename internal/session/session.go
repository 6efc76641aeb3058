package session

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

// Session is one confirmed connection. Start and Interrupt may be called from
// different goroutines. Only one utterance is in flight at a time.
type Session struct {
	c      *Client
	tc     traceContext // of utterances that have none of their own
	egress bool         // see Params.egress
	conn   *websocket.Conn
	in     *stream  // beneath conn
	raw    net.Conn // beneath in
	red    redactor

	replay       string        // req_id of every utterance; "": each has its own
	connectionID string        // set before confirmed is closed
	confirmedAt  time.Time     // likewise
	confirmed    chan struct{} // closed at the confirm

	ended    chan struct{} // closed once err is set
	closed   chan struct{} // closed once the connection is
	readDone chan struct{} // closed once the reader has returned

	endOnce  sync.Once
	closing  atomic.Bool
	err      error // why the session ended; read after ended
	closedAt time.Time

	ctx     context.Context // Open's
	unwatch func() bool     // stops watching it

	mu  sync.Mutex
	cur *utterance // being spoken; nil between utterances

	// sending and delivering are locks that can be waited for with a context. The
	// holder of sending may write speech; the holder of delivering may call
	// OnFrame.
	sending    chan struct{}
	delivering chan struct{}

	ping pingState
	// handling is the time at which OnFrame was called, in nanoseconds since
	// born, plus one; 0 while it is not running. handled is the total time that
	// it ran.
	born     time.Time
	handling atomic.Int64
	handled  atomic.Int64
}

func newSession(o *opening, region string, d dialled) *Session {
	// Not o.p itself: it leads to the job's speech, for as long as the session is open.
	s := &Session{
		c: o.c, tc: traceContext{o.p.TraceParent, o.p.TraceState}, egress: o.p.egress(),
		conn: d.conn, in: d.stream, raw: d.raw, replay: d.replay,
		red:       redactor{secrets: o.red.secrets, region: region},
		confirmed: make(chan struct{}), ended: make(chan struct{}), closed: make(chan struct{}), readDone: make(chan struct{}),
		sending: make(chan struct{}, 1), delivering: make(chan struct{}, 1),
		born: time.Now(),
	}
	return s
}

// ConnectionID returns the ID under which the backend bills the session.
func (s *Session) ConnectionID() string { return s.connectionID }

// Region returns the region that serves the session.
func (s *Session) Region() string { return s.red.region }

// Connected returns the time since the confirmation or, for a closed session,
// between confirmation and close. This time is billed.
func (s *Session) Connected() time.Duration {
	select {
	case <-s.closed:
		return max(0, s.closedAt.Sub(s.confirmedAt)) // the system tells both to the millisecond
	default:
		return time.Since(s.confirmedAt)
	}
}

// Close closes the session with code 1000 and waits for less than a second for
// the peer's answer before it cuts the connection. It ends an utterance in
// flight. It always returns nil, and may be called again.
func (s *Session) Close() error {
	s.kill(closedByOwner())
	// The reader is done unless OnFrame blocks it or called Close.
	t := time.NewTimer(closeWait / 8)
	defer t.Stop()
	select {
	case <-s.readDone:
	case <-t.C:
	}
	return nil
}

// end records why the session is over. The first call wins.
func (s *Session) end(err error) {
	s.endOnce.Do(func() {
		s.err = err
		close(s.ended)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.cur != nil {
			s.cur.stopSource()
			s.cur.finish(endingFailure)
		}
	})
}

// kill ends the session and closes its connection. It may be called several
// times.
func (s *Session) kill(err error) {
	s.end(err)
	if s.closing.CompareAndSwap(false, true) {
		s.closeConn()
	}
	<-s.closed
}

// cancel ends a session that its owner does not want any more. A confirmation that is
// on its way is waited for: the backend bills the session, and a closing connection
// drops what it reads.
func (s *Session) cancel(err error) {
	s.crossed()
	s.kill(err)
}

// crossed waits a moment for a confirmation that may be on its way, and reports
// whether it has come.
func (s *Session) crossed() bool {
	t := time.NewTimer(crossingWait)
	defer t.Stop()
	select {
	case <-s.confirmed:
		return true
	case <-s.ended:
	case <-t.C:
	}
	return false
}

// force cuts the connection.
func (s *Session) force() {
	s.in.closedFor()  // it notes when the peer closed
	_ = s.raw.Close() // it may be closed already
}

// closeConn closes the connection with a close frame, or cuts it after closeWait.
func (s *Session) closeConn() {
	defer close(s.closed)
	cut := time.AfterFunc(closeWait, s.force)
	s.in.block()
	// An error means that the peer was gone or silent; the connection is closed
	// anyway.
	_ = s.conn.Close(websocket.StatusNormalClosure, "")
	cut.Stop()
	s.force()
	// While OnFrame blocked the reader, or the process was frozen, the peer may have
	// closed the connection unnoticed: the backend bills no more than that.
	s.closedAt = time.Now().Add(-s.in.closedFor())
	s.mu.Lock()
	unwatch := s.unwatch
	s.mu.Unlock()
	if unwatch != nil {
		unwatch()
	}
	s.c.unregister(s)
}

// watch closes the session when ctx ends.
func (s *Session) watch(ctx context.Context) {
	s.mu.Lock() // the function may run before unwatch is set
	defer s.mu.Unlock()
	s.ctx = ctx
	s.unwatch = context.AfterFunc(ctx, func() { s.cancel(cancelled(ctx, "the session was cancelled")) })
}

// failure returns why the session ended, without secrets, or nil while it is open.
func (s *Session) failure(reqID string) error {
	select {
	case <-s.ended:
		return s.red.clean(s.err, s.connectionIDIfConfirmed(), reqID)
	default:
		return nil
	}
}

func (s *Session) connectionIDIfConfirmed() string {
	select {
	case <-s.confirmed:
		return s.connectionID
	default:
		return ""
	}
}

// sendFailed ends the session after a failed write. It first waits for the
// reader, whose error says more, for example the backend's own words before it
// closed.
func (s *Session) sendFailed(phase errors.Phase, err error) {
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-s.ended:
	case <-t.C:
	}
	s.kill(errors.FromCut(phase, err))
}
