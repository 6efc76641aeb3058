package session

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"sync/atomic"
	"time"

	"avatarworker/internal/errors"
)

// stream is the connection behind an upgrade, as the WebSocket library reads it.
//
// The library would wait for the next message within its own calls and those of
// crypto/tls. These use 1.9 KiB of the reader's stack, with TLS 2.7 KiB, and the
// runtime shrinks a stack to 4 KiB only if less than 1.2 KiB is in use. So the
// reader calls wait first, which waits with a short chain of calls, and the library
// then finds the beginning of the message here.
//
// The library must never wait for a message of its own accord: after a ping or
// pong it would. Read returns errIdle instead, which leaves the library as it was
// before its Reader was called.
type stream struct {
	net.Conn               // TCP or TLS
	sock     waiter        // the socket beneath Conn; nil if it can't be waited for
	bufs     *bufferPool   // for buf
	blocking atomic.Bool   // Read waits for a message after all
	reading  chan struct{} // a lock, held while the socket is waited for; guards what follows
	buf      *buffer       // holds bytes that the library has not read yet; nil: none
	from, to int           // where they are in buf
	err      error         // what the connection returned after them
	frames   frameBoundary // where the library is
}

// waiter is a socket that can be waited for.
type waiter interface {
	// wait returns once the socket has bytes to read, or has failed.
	wait()
	// setNoWait makes Read return errIdle instead of waiting.
	setNoWait(on bool)
	// closedFor returns how long ago the peer closed the connection; 0: it has not,
	// or that is not known.
	closedFor() time.Duration
	// quietFor returns how long ago the last bytes came; 0: that is not known.
	quietFor() time.Duration
}

// errIdle means that no bytes have come yet. crypto/tls goes on reading after it,
// as it does after a timeout.
var errIdle net.Error = idleError{}

type idleError struct{}

func (idleError) Error() string   { return "nothing has come yet" }
func (idleError) Timeout() bool   { return true }
func (idleError) Temporary() bool { return true }

// newStream returns a stream that begins with rest, at most 4 KiB.
func newStream(conn net.Conn, bufs *bufferPool, rest []byte) *stream {
	if _, secure := conn.(*tls.Conn); !secure {
		conn = newSocket(conn)
	}
	beneath := conn
	for secure, ok := beneath.(*tls.Conn); ok; secure, ok = beneath.(*tls.Conn) { // two with an HTTPS proxy
		beneath = secure.NetConn()
	}
	s := &stream{Conn: conn, bufs: bufs, reading: make(chan struct{}, 1)}
	s.sock, _ = beneath.(waiter)
	if len(rest) > 0 {
		s.buf = bufs.get(0)
		s.to = copy(s.buf.b, rest)
	}
	return s
}

// wait returns once there are bytes to read, or the connection has failed, which
// Read then reports. It returns at once within a message.
func (s *stream) wait() {
	if s.sock == nil {
		return
	}
	s.reading <- struct{}{}
	defer s.release()
	for s.buf == nil && s.err == nil && s.frames.between() {
		if !s.tryFill() {
			s.sock.wait()
		}
	}
}

// closedFor returns how long ago the peer closed the connection; 0: it has not, or
// that is not known.
func (s *stream) closedFor() time.Duration {
	if s.sock == nil {
		return 0
	}
	return s.sock.closedFor()
}

// quietFor returns how long ago the last bytes came; 0: that is not known.
func (s *stream) quietFor() time.Duration {
	if s.sock == nil {
		return 0
	}
	return s.sock.quietFor()
}

// tryFill reads what has come. It returns false if that is nothing.
func (s *stream) tryFill() bool {
	s.sock.setNoWait(true)
	defer s.sock.setNoWait(false)
	s.fill()
	if errors.Is(s.err, errIdle) {
		s.err = nil
		return s.buf != nil
	}
	return true
}

// fill reads into a buffer of the pool, which is kept only if it holds something.
func (s *stream) fill() {
	buf := s.bufs.get(0)
	n, err := s.Conn.Read(buf.b)
	if n == 0 {
		s.bufs.put(buf)
	} else {
		s.buf, s.from, s.to = buf, 0, n
	}
	s.err = err
}

// Read never reads beyond the end of a frame, so the library holds nothing when it
// asks for the next one.
func (s *stream) Read(p []byte) (int, error) {
	s.reading <- struct{}{}
	defer s.release()
	for s.buf == nil {
		switch {
		case s.err != nil:
			return 0, s.err
		case s.sock != nil && s.frames.between() && !s.blocking.Load():
			return 0, errIdle
		case len(p) >= bufferSizes[0] && s.frames.left >= uint64(len(p)):
			n, err := s.Conn.Read(p)
			s.frames.take(p[:n])
			return n, err
		}
		s.fill()
	}
	have := s.buf.b[s.from:s.to]
	have = have[:min(len(have), len(p))]
	n := copy(p, have[:s.frames.take(have)])
	if s.from += n; s.from == s.to {
		s.bufs.put(s.buf)
		s.buf = nil
	}
	return n, nil
}

func (s *stream) release() { <-s.reading }

// block makes Read wait for a message from now on: the library reads the peer's
// answer to its close frame.
func (s *stream) block() { s.blocking.Store(true) }

// frameBoundary follows a server's frames (RFC 6455, section 5.2).
type frameBoundary struct {
	head  [14]byte
	have  int    // bytes of head
	left  uint64 // bytes of the frame's payload that are still to come
	inner bool   // the message goes on in another frame
}

// between reports whether the next byte begins a message or a control frame that
// is not within one.
func (f *frameBoundary) between() bool { return f.have == 0 && f.left == 0 && !f.inner }

// take returns how many of the bytes belong to the frame at hand, at least one if
// there is one, and moves on by as many.
func (f *frameBoundary) take(b []byte) int {
	n := 0
	for f.left == 0 && n < len(b) {
		f.head[f.have] = b[n]
		n++
		f.have++
		if f.have < f.headSize() {
			continue
		}
		f.begin()
		if f.left == 0 {
			return n
		}
	}
	more := min(f.left, uint64(len(b)-n))
	f.left -= more
	return n + int(more) // #nosec G115 -- at most len(b)
}

// headSize returns the size of the frame's header, as far as its first bytes
// determine it.
func (f *frameBoundary) headSize() int {
	if f.have < 2 {
		return 2
	}
	size := 2
	switch f.head[1] & 0x7f {
	case 126:
		size += 2
	case 127:
		size += 8
	}
	if f.head[1]&0x80 != 0 {
		size += 4
	}
	return size
}

// begin reads the header.
func (f *frameBoundary) begin() {
	switch length := f.head[1] & 0x7f; length {
	case 126:
		f.left = uint64(binary.BigEndian.Uint16(f.head[2:]))
	case 127:
		f.left = binary.BigEndian.Uint64(f.head[2:])
	default:
		f.left = uint64(length)
	}
	if control := f.head[0]&0x08 != 0; !control {
		f.inner = f.head[0]&0x80 == 0
	}
	f.have = 0
}
