//go:build unix

package session

import (
	"io"
	"net"
	"os"
	"syscall"

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
}

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
