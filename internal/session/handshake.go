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

// start shakes hands on conn. It closes conn if that fails.
func (h *handshakes) start(ctx context.Context, conn net.Conn, config *tls.Config, host string) (net.Conn, error) {
	config = config.Clone()
	if config.ServerName == "" {
		config.ServerName = host
	}
	secure := tls.Client(conn, config)
	if err := h.do(ctx, secure); err != nil {
		_ = conn.Close() // the handshake's error says more
		return nil, err
	}
	return secure, nil
}

func (h *handshakes) do(ctx context.Context, conn *tls.Conn) error {
	had, err := h.turn(ctx)
	if err != nil {
		return err
	}
	if had {
		defer func() { <-h.turns }()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, h.timeout, fmt.Errorf("no TLS handshake within %s", h.timeout))
	defer cancel()
	err = conn.HandshakeContext(ctx)
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

// startTLS starts TLS on conn. It closes conn if that fails.
func (c *Client) startTLS(ctx context.Context, conn net.Conn, host string) (net.Conn, error) {
	return c.handshakes.start(ctx, conn, c.tls, host)
}
