package session

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"avatarworker/internal/errors"
)

// newTransport returns a transport for calls to the console and connections to
// the ingress. timeout bounds each dial and each TLS handshake.
func newTransport(timeout time.Duration) *http.Transport {
	tcp := &net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}
	shakes := newHandshakes(timeout)
	t := &http.Transport{
		Proxy:                  proxyFromEnvironment(),
		OnProxyConnectResponse: refusedConnect,
		DialContext:            tcp.DialContext,
		TLSClientConfig:        &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(256), MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    64,
		MaxResponseHeaderBytes: maxAnswerHead,
		// Of a token call. Others than the default, 4 KiB, which is the size of what a
		// WebSocket keeps: thousands that end among those would leave the heap half-empty.
		ReadBufferSize:        2 << 10,
		WriteBufferSize:       2 << 10,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   timeout,
		ExpectContinueTimeout: time.Second,
	}
	t.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		config, upgrade := ctx.Value(upgradeKey{}).(*tls.Config)
		if !upgrade {
			config = t.TLSClientConfig.Clone()
			config.NextProtos = []string{"h2", "http/1.1"}
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		var dial dialFunc = func(ctx context.Context) (net.Conn, error) { return tcp.DialContext(ctx, network, addr) }
		if upgrade {
			dial = dial.sockets()
		}
		return shakes.start(ctx, dial, config, host)
	}
	return t
}

// upgradeKey is the context key of the *tls.Config for an upgrade's dial:
// http.Transport modifies its own configuration as it works, and offers HTTP/2.
type upgradeKey struct{}

func webScheme(scheme string) string {
	switch scheme {
	case "ws":
		return "http"
	case "wss":
		return "https"
	}
	return scheme
}

// connect opens a connection to u's host for an upgrade: TCP, through a proxy if
// there is one, and TLS. It always asks a proxy for a tunnel, for ws too, because
// a proxy that forwards requests does not forward an upgrade.
func (c *Client) connect(ctx context.Context, u *url.URL) (net.Conn, error) {
	via, err := c.proxyOf(u)
	if err != nil {
		return nil, err
	}
	secure := webScheme(u.Scheme) == "https"
	if via == nil {
		if secure && c.transport.DialTLSContext != nil {
			return c.transport.DialTLSContext(context.WithValue(ctx, upgradeKey{}, c.tls), "tcp", hostPort(u))
		}
		dial := func(ctx context.Context) (net.Conn, error) { return c.dialTCP(ctx, "tcp", hostPort(u)) }
		if !secure {
			return dial(ctx)
		}
		return c.connectTLS(ctx, dial, u.Hostname())
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		conn, err := c.connectVia(ctx, via, hostPort(u))
		if err != nil {
			return nil, &blockedError{via, err}
		}
		return conn, nil
	}
	if !secure {
		return dial(ctx)
	}
	conn, err := c.connectTLS(ctx, dial, u.Hostname())
	if blocked := (*blockedError)(nil); err != nil && !errors.As(err, &blocked) {
		err = fmt.Errorf("through the proxy %s: %w", proxyName(via), err)
	}
	return conn, err
}

func (c *Client) dialTCP(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := c.dialLimit(ctx)
	defer cancel()
	dial := c.transport.DialContext
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	conn, err := dial(ctx, network, addr)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // it names the limit
	}
	return conn, err
}

// dialLimit applies ConnectTimeout.
func (c *Client) dialLimit(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := c.o.ConnectTimeout
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not connected within %s", timeout))
}

// hostPort returns u's address, with the scheme's default port if u has none.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[webScheme(u.Scheme)]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// earlyConn is a connection that is opened while the session token is minted.
type earlyConn struct {
	cancel context.CancelFunc
	done   chan struct{} // closed once conn or err is set
	conn   net.Conn
	err    error
	since  time.Time // when conn was established
}

// connectEarly starts to connect to u. The caller must call stop. An ingress
// bills sessions, but not connections or refused upgrades.
func (c *Client) connectEarly(ctx context.Context, u *url.URL) *earlyConn {
	ctx, cancel := context.WithCancel(ctx)
	e := &earlyConn{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		defer errors.Recover(&e.err, errors.PhaseConnect)
		e.conn, e.err = c.connect(ctx, u)
		e.since = time.Now()
	}()
	return e
}

// take waits for the connection and hands it to the caller.
func (e *earlyConn) take(ctx context.Context) (net.Conn, error) {
	select {
	case <-e.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	conn := e.conn
	e.conn = nil
	return conn, e.err
}

// stop ends the dialling, and closes the connection unless it was taken.
func (e *earlyConn) stop() {
	e.cancel()
	<-e.done
	if e.conn != nil {
		_ = e.conn.Close() // nothing was sent on it
	}
}
