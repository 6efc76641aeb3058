//go:build unix

package session

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"avatarworker/internal/errors"
)

// socket is a connection of the system that can be waited for without reading.
type socket struct {
	net.Conn
	raw    syscall.RawConn
	noWait bool

	// Of one call of Read or wait, so that it allocates nothing.
	read     func(fd uintptr) bool
	p        []byte
	n        int
	err      error
	readable func(fd uintptr) bool
	asked    bool
	one      [1]byte

	closing  sync.Mutex // guards what follows
	closedAt time.Time  // when the peer closed; zero: not known
	lookedAt time.Time  // for that, last
}

// lookEvery is how often at most a Write looks whether the peer has closed.
const lookEvery = 100 * time.Millisecond

var _ waiter = (*socket)(nil)

// newSocket returns conn as a socket, or conn itself if the system does not know
// it.
func newSocket(conn net.Conn) net.Conn {
	known, ok := conn.(syscall.Conn)
	if !ok {
		return conn
	}
	raw, err := known.SyscallConn()
	if err != nil {
		return conn
	}
	if c, ok := conn.(interface{ SetKeepAlive(on bool) error }); ok {
		// Sessions have pings. The answer to a probe would hide when the peer closed.
		_ = c.SetKeepAlive(false) // then the probes only come
	}
	s := &socket{Conn: conn, raw: raw}
	s.read, s.readable = s.readNow, s.isReadable
	return s
}

func (s *socket) setNoWait(on bool) { s.noWait = on }

// Read returns errIdle instead of waiting if noWait is set.
func (s *socket) Read(p []byte) (int, error) {
	if !s.noWait || len(p) == 0 {
		return s.Conn.Read(p)
	}
	s.p = p
	err := s.raw.Read(s.read)
	s.p = nil
	switch {
	case err != nil:
		var op *net.OpError
		if errors.As(err, &op) {
			op.Op = "read" // it says raw-read
		}
		return 0, err
	case s.err == syscall.EAGAIN:
		return 0, errIdle
	case s.err != nil:
		return 0, &net.OpError{Op: "read", Net: s.LocalAddr().Network(), Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: os.NewSyscallError("read", s.err)}
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

// Write first looks whether the peer has closed: its answer to what is written
// would hide when that was.
func (s *socket) Write(p []byte) (int, error) {
	s.look(lookEvery)
	n, err := s.Conn.Write(p)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		s.gone(time.Now()) // the reader may be held up
	}
	return n, err
}

// Close first looks whether the peer has closed: afterwards the system does not say.
func (s *socket) Close() error {
	s.look(0)
	return s.Conn.Close()
}

// closedFor implements waiter.
func (s *socket) closedFor() time.Duration {
	s.look(0)
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.closedAt.IsZero() {
		return 0
	}
	return time.Since(s.closedAt)
}

// look notes when the peer closed, if it has, unless that was looked for less than
// every ago.
func (s *socket) look(every time.Duration) {
	now := time.Now()
	s.closing.Lock()
	due := s.closedAt.IsZero() && now.Sub(s.lookedAt) >= every
	if due {
		s.lookedAt = now
	}
	s.closing.Unlock()
	if !due {
		return
	}
	if ago, closed := s.peerClosed(); closed {
		s.gone(now.Add(-ago))
	}
}

// gone notes when the peer closed. The first call wins.
func (s *socket) gone(at time.Time) {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.closedAt.IsZero() {
		s.closedAt = at
	}
}

func (s *socket) readNow(fd uintptr) bool {
	for {
		s.n, s.err = syscall.Read(int(fd), s.p) // #nosec G115 -- a file descriptor
		if !errors.Is(s.err, syscall.EINTR) {
			return true
		}
	}
}

// wait implements waiter.
func (s *socket) wait() {
	s.asked = false
	_ = s.raw.Read(s.readable) // the next Read fails likewise
}

// isReadable asks the system once. After that it is called when the socket has
// become readable.
func (s *socket) isReadable(fd uintptr) bool {
	if s.asked {
		return true
	}
	s.asked = true
	_, _, err := syscall.Recvfrom(int(fd), s.one[:], syscall.MSG_PEEK) // #nosec G115 -- a file descriptor
	return !errors.Is(err, syscall.EAGAIN)
}
