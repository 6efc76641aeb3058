package session

import (
	"time"

	"golang.org/x/sys/unix"
)

// info asks the system; nil: it does not say.
func (s *socket) info() (info *unix.TCPInfo) {
	if err := s.raw.Control(func(fd uintptr) {
		info, _ = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) // #nosec G115 -- a file descriptor
	}); err != nil {
		return nil
	}
	return info
}

// peerClosed reports whether the peer has closed the connection, and how long ago.
func (s *socket) peerClosed() (ago time.Duration, closed bool) {
	info := s.info()
	if info == nil || info.State != unix.BPF_TCP_CLOSE_WAIT {
		return 0, false
	}
	// Its end was the last that came.
	return time.Duration(info.Last_ack_recv) * time.Millisecond, true
}

// quietFor implements waiter.
func (s *socket) quietFor() time.Duration {
	info := s.info()
	if info == nil {
		return 0
	}
	return time.Duration(info.Last_data_recv) * time.Millisecond
}
