package session

import (
	"net"
	"syscall"
	"testing"
	"time"
)

// The kernel's word on when the peer closed does not survive a probe.
func TestASessionsSocketSendsNoKeepaliveProbes(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dialer := net.Dialer{KeepAlive: 30 * time.Second}
	conn, err := dialer.DialContext(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	keepalive := func() (on int) {
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if ctlErr := raw.Control(func(fd uintptr) {
			on, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE) // #nosec G115 -- a file descriptor
		}); ctlErr != nil || err != nil {
			t.Fatal(ctlErr, err)
		}
		return on
	}
	if keepalive() == 0 {
		t.Fatal("the dialer of the backend's connections sets keepalive no more: nothing is tested")
	}
	newSocket(conn)
	if keepalive() != 0 {
		t.Error("keepalive is on")
	}
}
