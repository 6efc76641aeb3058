package natsconn

import (
	"net"

	"github.com/nats-io/nats.go"
)

// closeWhenStalled closes a connection that can't be written to for writeTimeout.
// The library alone would report only the write that timed out, silently drop
// what others published or subscribed meanwhile, and keep the connection. It
// replaces a closed one.
func closeWhenStalled(o *nats.Options) error {
	o.FlusherTimeout = writeTimeout
	if o.InProcessServer != nil {
		o.InProcessServer = inProcess{o.InProcessServer}
		return nil
	}
	via := o.CustomDialer // a context's proxy
	if via == nil {
		via = &net.Dialer{Timeout: dialTimeout}
	}
	o.CustomDialer = dialer{via}
	return nil
}

type dialer struct{ via nats.CustomDialer }

// Dial is called by the library for each connect.
func (d dialer) Dial(network, address string) (net.Conn, error) {
	return closing(d.via.Dial(network, address))
}

type inProcess struct{ server nats.InProcessConnProvider }

// InProcessConn is called by the library for each connect.
func (p inProcess) InProcessConn() (net.Conn, error) { return closing(p.server.InProcessConn()) }

func closing(conn net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return closingConn{conn}, nil
}

// closingConn is a connection that closes when a write fails.
type closingConn struct{ net.Conn }

// Write writes p, and closes the connection if that fails.
func (c closingConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.Close() // so that the reader notices
	}
	return n, err
}
