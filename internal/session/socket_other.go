//go:build !unix

package session

import "net"

// newSocket returns conn: it can't be waited for without reading.
func newSocket(conn net.Conn) net.Conn { return conn }
