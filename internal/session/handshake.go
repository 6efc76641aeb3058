package session

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync/atomic"
	"time"
)

// handshakes limits concurrent TLS handshakes: if thousands of sessions start at
// once and all shake hands together, none finishes in time. A handshake waits for
// its turn as long as others succeed. If none has succeeded within timeout, as
// with a server that never replies, it proceeds without a turn.
type handshakes struct {
	turns   chan struct{}
	timeout time.Duration // of each handshake
	begun   time.Time
	success atomic.Int64 // when the last one succeeded, in nanoseconds since begun
}

const handshakesAtOnce = 64

func newHandshakes(timeout time.Duration) *handshakes {
	return &handshakes{turns: make(chan struct{}, handshakesAtOnce), timeout: timeout, begun: time.Now()}
}

// start dials and shakes hands. A connection that has waited long for the handshake's
// turn is replaced: the server may have given it up.
func (h *handshakes) start(ctx context.Context, dial dialFunc, config *tls.Config, host string) (net.Conn, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	dialled := time.Now()
	had, err := h.turn(ctx)
	if had {
		defer func() { <-h.turns }()
	}
	if err == nil && time.Since(dialled) >= staleAfter {
		_ = conn.Close() // nothing was sent on it
		if conn, err = dial(ctx); err != nil {
			return nil, err
		}
	}
	config = config.Clone()
	if config.ServerName == "" {
		config.ServerName = host
	}
	secure := tls.Client(conn, config)
	if err == nil {
		err = h.do(ctx, secure)
	}
	if err != nil {
		_ = conn.Close() // the error says more
		return nil, err
	}
	return secure, nil
}

// dialFunc opens a connection.
type dialFunc func(context.Context) (net.Conn, error)

// sockets returns the same with connections that are read as newSocket says.
func (f dialFunc) sockets() dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		conn, err := f(ctx)
		if err != nil {
			return nil, err
		}
		return newSocket(conn), nil
	}
}

func (h *handshakes) do(ctx context.Context, conn *tls.Conn) error {
	ctx, cancel := context.WithTimeoutCause(ctx, h.timeout, fmt.Errorf("no TLS handshake within %s", h.timeout))
	defer cancel()
	err := conn.HandshakeContext(ctx)
	switch {
	case err == nil:
		h.success.Store(int64(time.Since(h.begun)))
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return err
}

// turn waits for a turn. It returns false if the handshake is to proceed without
// one.
func (h *handshakes) turn(ctx context.Context) (bool, error) {
	wait := time.NewTimer(h.timeout)
	defer wait.Stop()
	for {
		select {
		case h.turns <- struct{}{}:
			return true, nil
		case <-wait.C:
			since := time.Since(h.begun) - time.Duration(h.success.Load())
			if since >= h.timeout {
				return false, nil
			}
			wait.Reset(h.timeout - since)
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// connectTLS dials, and starts TLS with host.
func (c *Client) connectTLS(ctx context.Context, dial dialFunc, host string) (net.Conn, error) {
	return c.handshakes.start(ctx, dial.sockets(), c.tls, host)
}
