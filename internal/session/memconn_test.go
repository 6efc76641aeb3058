package session

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// memoryPipe is net.Pipe with a buffer, as sockets have one: both sides can
// write at the same time.
func memoryPipe() (net.Conn, net.Conn) {
	a, b := newPipeHalf(), newPipeHalf()
	return &memoryConn{in: a, out: b}, &memoryConn{in: b, out: a}
}

// pipeHalf is one direction.
type pipeHalf struct {
	mu       sync.Mutex
	data     []byte
	closed   bool
	deadline time.Time
	changed  chan struct{} // closed and replaced at every change
}

func newPipeHalf() *pipeHalf { return &pipeHalf{changed: make(chan struct{})} }

func (s *pipeHalf) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *pipeHalf) read(p []byte, noWait bool) (int, error) {
	for {
		s.mu.Lock()
		some := len(s.data) > 0
		n, closed, deadline, changed := copy(p, s.data), s.closed, s.deadline, s.changed
		s.data = s.data[n:]
		s.mu.Unlock()
		wait := time.Until(deadline)
		switch {
		case some:
			return n, nil
		case closed:
			return 0, io.EOF
		case !deadline.IsZero() && wait <= 0:
			return 0, os.ErrDeadlineExceeded
		case noWait:
			return 0, errIdle
		case deadline.IsZero():
			<-changed
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
}

type memoryConn struct {
	in, out *pipeHalf
	noWait  bool
}

var _ waiter = (*memoryConn)(nil)

func (c *memoryConn) Read(p []byte) (int, error) { return c.in.read(p, c.noWait) }

func (c *memoryConn) setNoWait(on bool) { c.noWait = on }

func (c *memoryConn) closedFor() time.Duration { return 0 }
func (c *memoryConn) quietFor() time.Duration  { return 0 }

func (c *memoryConn) wait() { _, _ = c.in.read(nil, false) } // the next Read fails likewise

func (c *memoryConn) Write(p []byte) (n int, err error) {
	c.out.change(func() {
		if c.out.closed {
			err = net.ErrClosed
			return
		}
		n, c.out.data = len(p), append(c.out.data, p...)
	})
	return n, err
}

func (c *memoryConn) Close() error {
	c.in.change(func() { c.in.closed = true })
	c.out.change(func() { c.out.closed = true })
	return nil
}

func (c *memoryConn) SetReadDeadline(t time.Time) error {
	c.in.change(func() { c.in.deadline = t })
	return nil
}
func (c *memoryConn) SetDeadline(t time.Time) error    { return c.SetReadDeadline(t) }
func (c *memoryConn) SetWriteDeadline(time.Time) error { return nil } // writing never waits
func (c *memoryConn) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "here"} }
func (c *memoryConn) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "there"} }
