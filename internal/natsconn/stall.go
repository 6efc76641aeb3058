package natsconn

import (
	"net"

	"github.com/nats-io/nats.go"
)

// closeWhenStalled closes a connection that can't be written to for
// writeTimeout. Alone, the library would report the one write that timed out,
// throw away with it whatever others had published or subscribed meanwhile
// without an error, and go on with the connection; a closed one it replaces.
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

// closingConn is of no use any more after a write that failed.
type closingConn struct{ net.Conn }

// Write closes the connection where it fails.
func (c closingConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.Close() // whoever reads it finds it closed, which is the point
	}
	return n, err
}
