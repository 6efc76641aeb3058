package session

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

// Session is one confirmed connection. Speak and Interrupt may be called from
// different goroutines; utterances follow one another.
type Session struct {
	c     *Client
	p     *Params
	conn  *websocket.Conn
	force func() // cuts the connection
	red   redactor

	readCtx context.Context

	replay       string // req_id of every utterance; "": each has its own
	region       string
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

	unwatch func() bool // stops watching Open's context

	mu  sync.Mutex
	cur *utterance // being spoken; nil between utterances

	// sending and delivering are locks that can be waited for with a context.
	// Whoever holds sending may write speech; whoever holds delivering may call
	// OnFrame.
	sending    chan struct{}
	delivering chan struct{}

	ping pingState
	// handling is since when OnFrame is running, in nanoseconds since born,
	// plus one; 0 while it is not. handled is for how long it ran in all.
	born     time.Time
	handling atomic.Int64
	handled  atomic.Int64
}

func newSession(o *opening, region string, d dialled) *Session {
	s := &Session{
		c: o.c, p: o.p, conn: d.conn, replay: d.replay, region: region,
		red:       redactor{secrets: o.red.secrets, region: region},
		confirmed: make(chan struct{}), ended: make(chan struct{}), closed: make(chan struct{}), readDone: make(chan struct{}),
		sending: make(chan struct{}, 1), delivering: make(chan struct{}, 1),
		born: time.Now(),
		// A context that can't end costs nothing for each read.
		readCtx: context.Background(),
		force:   func() { _ = d.raw.Close() }, // it may be closed already
	}
	return s
}

// ConnectionID is the id under which the backend bills the session.
func (s *Session) ConnectionID() string { return s.connectionID }

// Region is the one that serves.
func (s *Session) Region() string { return s.region }

// Connected is the time since the confirm; for a closed session, until it was
// closed. It is what is billed.
func (s *Session) Connected() time.Duration {
	select {
	case <-s.closed:
		return s.closedAt.Sub(s.confirmedAt)
	default:
		return time.Since(s.confirmedAt)
	}
}

// Close closes with code 1000 and waits for the peer's answer for less than a
// second; then it cuts the connection. It ends a Speak under way. It always
// returns nil, and may be called again.
func (s *Session) Close() error {
	s.kill(closedByOwner())
	// The reader is done unless OnFrame holds it, or is our caller.
	t := time.NewTimer(closeWait / 8)
	defer t.Stop()
	select {
	case <-s.readDone:
	case <-t.C:
	}
	return nil
}

// end says why the session is over; the first to say so is right.
func (s *Session) end(err error) {
	s.endOnce.Do(func() {
		s.err = err
		close(s.ended)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.cur != nil {
			s.cur.cancel() // the wait for its speech
			s.cur.answer(endingFailure)
		}
	})
}

// kill ends the session and closes its connection, whoever came first.
func (s *Session) kill(err error) {
	s.end(err)
	if s.closing.CompareAndSwap(false, true) {
		s.shut()
	}
	<-s.closed
}

// shut closes the connection: politely, and in time.
func (s *Session) shut() {
	defer close(s.closed)
	cut := time.AfterFunc(closeWait, s.force)
	// Its error says that the peer was gone or silent: the connection is closed
	// all the same.
	_ = s.conn.Close(websocket.StatusNormalClosure, "")
	cut.Stop()
	s.force()
	s.closedAt = time.Now()
	s.mu.Lock()
	unwatch := s.unwatch
	s.mu.Unlock()
	if unwatch != nil {
		unwatch()
	}
	s.c.forget(s)
}

// watch closes the session when ctx ends.
func (s *Session) watch(ctx context.Context) {
	s.mu.Lock() // the function may run before its stop is kept
	defer s.mu.Unlock()
	s.unwatch = context.AfterFunc(ctx, func() { s.kill(cancelled(ctx, "the session was cancelled")) })
}

// failure is why the session ended, without secrets; nil while it lives.
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

// sendFailed ends the session after a failed write. What the reader finds, as
// the backend's own words before it hung up, says more: it is waited for.
func (s *Session) sendFailed(phase errors.Phase, err error) {
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-s.ended:
	case <-t.C:
	}
	s.kill(errors.FromCut(phase, err))
}
