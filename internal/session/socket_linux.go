package session

import (
	"time"

	"golang.org/x/sys/unix"
)

// closedFor implements waiter.
func (s *socket) closedFor() time.Duration {
	var info *unix.TCPInfo
	if err := s.raw.Control(func(fd uintptr) {
		info, _ = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) // #nosec G115 -- a file descriptor
	}); err != nil || info == nil || info.State != unix.BPF_TCP_CLOSE_WAIT {
		return 0
	}
	// Its end was the last that came.
	return time.Duration(info.Last_ack_recv) * time.Millisecond
}
