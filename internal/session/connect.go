package session

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/proxy"

	"avatarworker/internal/errors"
)

// maxAnswerHead bounds the status line and headers of a reply, in bytes.
const maxAnswerHead = 64 << 10

// newTransport returns a transport for calls to the console and connections to
// the ingress. timeout bounds each dial and each TLS handshake.
func newTransport(timeout time.Duration) *http.Transport {
	tcp := &net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}
	shakes := newHandshakes(timeout)
	t := &http.Transport{
		Proxy:                  environmentProxy(httpproxy.FromEnvironment().ProxyFunc()),
		OnProxyConnectResponse: refusedConnect,
		DialContext:            tcp.DialContext,
		TLSClientConfig:        &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(256), MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    64,
		MaxResponseHeaderBytes: maxAnswerHead,
		IdleConnTimeout:        90 * time.Second,
		TLSHandshakeTimeout:    timeout,
		ExpectContinueTimeout:  time.Second,
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
		conn, err := tcp.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if upgrade {
			conn = newSocket(conn)
		}
		return shakes.start(ctx, conn, config, host)
	}
	return t
}

// upgradeKey is the context key of the *tls.Config for an upgrade's dial:
// http.Transport modifies its own configuration as it works, and offers HTTP/2.
type upgradeKey struct{}

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

// environmentProxy wraps find for http.Transport. Its error does not contain the
// proxy's address, which may hold a password.
func environmentProxy(find func(*url.URL) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(req *http.Request) (*url.URL, error) {
		u, err := find(req.URL)
		if err != nil {
			return nil, errors.New("the proxy's address in the environment (HTTPS_PROXY, HTTP_PROXY) is not a URL: write http://host:port")
		}
		return u, nil
	}
}

// proxyError is a reply that came from the proxy instead of the backend.
type proxyError struct {
	proxy  *url.URL
	status int
	header http.Header
}

func (p *proxyError) Error() string {
	return fmt.Sprintf("the proxy %s answered with HTTP %d", proxyName(p.proxy), p.status)
}

// proxyName returns a proxy's URL without its login.
func proxyName(u *url.URL) string { return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String() }

// refusedConnect keeps a proxy's reply to a CONNECT request of net/http.
func refusedConnect(_ context.Context, proxyURL *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{proxyURL, resp.StatusCode, resp.Header}
}

// proxyOf returns the proxy for u, or nil if there is none. It treats ws and wss
// as http and https.
func (c *Client) proxyOf(u *url.URL) (*url.URL, error) {
	if c.transport.Proxy == nil {
		return nil, nil //nolint:nilnil // as http.Transport.Proxy has it
	}
	web := *u
	web.Scheme = webScheme(u.Scheme)
	return c.transport.Proxy(&http.Request{Method: http.MethodGet, URL: &web, Host: web.Host, Header: http.Header{}})
}

func webScheme(scheme string) string {
	switch scheme {
	case "ws":
		return "http"
	case "wss":
		return "https"
	}
	return scheme
}

// Proxies returns, for the log, the proxies for console and ingress in the
// default region, without logins; "none" if there is no proxy.
func (c *Client) Proxies() (console, ingress string) {
	region := c.o.DefaultRegion
	if region == AutoRegion {
		region = DefaultRegion
	}
	name := func(u *url.URL, err error) string {
		if err != nil {
			return err.Error()
		}
		p, err := c.proxyOf(u)
		switch {
		case err != nil:
			return err.Error()
		case p == nil:
			return "none"
		}
		return proxyName(p)
	}
	return name(c.o.Endpoints.tokenURL(region)), name(c.o.Endpoints.socketURL(region, "-"))
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
		conn, err := c.dialTCP(ctx, "tcp", hostPort(u))
		if err != nil || !secure {
			return conn, err
		}
		return c.startTLS(ctx, conn, u.Hostname())
	}
	conn, err := c.connectVia(ctx, via, hostPort(u))
	if err == nil && secure {
		conn, err = c.startTLS(ctx, conn, u.Hostname())
	}
	if err != nil {
		return nil, fmt.Errorf("through the proxy %s: %w", proxyName(via), err)
	}
	return conn, nil
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

// startTLS starts TLS on conn. It closes conn if that fails.
func (c *Client) startTLS(ctx context.Context, conn net.Conn, host string) (net.Conn, error) {
	return c.handshakes.start(ctx, newSocket(conn), c.tls, host)
}

// connectVia connects to addr through a proxy.
func (c *Client) connectVia(ctx context.Context, via *url.URL, addr string) (net.Conn, error) {
	switch via.Scheme {
	case "socks5", "socks5h":
		var tcp net.Conn // without the library's wrapper, which hides the socket
		dialer, err := proxy.FromURL(via, dialerFunc(func(ctx context.Context, network, addr string) (_ net.Conn, err error) {
			tcp, err = c.dialTCP(ctx, network, addr)
			return tcp, err
		}))
		if err != nil {
			return nil, err
		}
		with, ok := dialer.(proxy.ContextDialer)
		if !ok {
			return nil, errors.New("the SOCKS library can't be cancelled")
		}
		ctx, cancel := c.dialLimit(ctx)
		defer cancel()
		if _, err := with.DialContext(ctx, "tcp", addr); err != nil {
			return nil, err
		}
		return tcp, nil
	case "http", "https":
	default:
		return nil, fmt.Errorf("scheme %q is not known: http, https and socks5 are", via.Scheme)
	}
	conn, err := c.dialTCP(ctx, "tcp", hostPort(via))
	if err == nil && via.Scheme == "https" {
		conn, err = c.startTLS(ctx, conn, via.Hostname())
	}
	if err != nil {
		return nil, err
	}
	limited, cancel := c.dialLimit(ctx)
	defer cancel()
	if err := tunnel(limited, conn, via, addr); err != nil {
		_ = conn.Close() // the proxy's answer says more
		return nil, err
	}
	return conn, nil
}

// dialLimit applies ConnectTimeout.
func (c *Client) dialLimit(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := c.o.ConnectTimeout
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not connected within %s", timeout))
}

// dialerFunc implements proxy.Dialer.
type dialerFunc func(ctx context.Context, network, addr string) (net.Conn, error)

func (f dialerFunc) Dial(network, addr string) (net.Conn, error) {
	return f(context.Background(), network, addr)
}

func (f dialerFunc) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	return f(ctx, network, addr)
}

// tunnel asks an HTTP proxy for a tunnel to addr.
func tunnel(ctx context.Context, conn net.Conn, via *url.URL, addr string) error {
	header := http.Header{}
	if via.User != nil {
		password, _ := via.User.Password()
		login := via.User.Username() + ":" + password
		header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(login)))
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: header}
	x := &exchange{conn: conn}
	resp, err := x.ask(ctx, req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return &proxyError{via, resp.StatusCode, resp.Header}
	}
	if x.br.Buffered() > 0 {
		return errors.New("the proxy sent more than its answer to CONNECT")
	}
	return nil
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

// refusalLimit is how much of a refusal's body is read, and refusalWait how long
// that may take.
const (
	refusalLimit = 64 << 10
	refusalWait  = 3 * time.Second
)

// exchange is one request and its reply on a connection of its own.
type exchange struct {
	conn     net.Conn
	bufs     *bufferPool
	stream   *stream       // of a reply 101
	br       *bufio.Reader // holds what was read beyond the reply's headers
	answered bool          // at least one byte of a reply came
	refusal  []byte        // the first bytes of a reply that is not an upgrade
}

var _ http.RoundTripper = (*exchange)(nil)

// RoundTrip sends an upgrade request. The body of a reply 101 is the connection.
// After any other reply the connection is closed and the body is in x.refusal.
func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	ended := x.watch(req.Context())
	resp, err := x.head(req)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		_ = x.conn.SetReadDeadline(time.Now().Add(refusalWait)) // a closed one fails by itself
		// Use whatever part of the body arrived.
		x.refusal, _ = io.ReadAll(io.LimitReader(resp.Body, refusalLimit))
		resp.Body = http.NoBody
		x.dropReader()
		ended()
		_ = x.conn.Close() // it can't be used again
		return resp, nil
	}
	if ended() {
		err = context.Cause(req.Context())
	}
	if err != nil {
		_ = x.conn.Close() // the error says more
		return nil, err
	}
	resp.Body = x.upgraded()
	return resp, nil
}

// ask sends a request and returns its reply without the body.
func (x *exchange) ask(ctx context.Context, req *http.Request) (*http.Response, error) {
	ended := x.watch(ctx)
	resp, err := x.head(req)
	if ended() {
		return nil, context.Cause(ctx)
	}
	return resp, err
}

// watch makes the connection's reads and writes fail once ctx ends. The returned
// function stops that, and reports whether ctx has ended.
func (x *exchange) watch(ctx context.Context) (ended func() bool) {
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = x.conn.SetDeadline(time.Unix(1, 0)) // a closed one fails by itself
	})
	return func() bool {
		if cancel() {
			return false
		}
		<-done
		return true
	}
}

// head sends a request and reads the status line and headers of the final reply.
func (x *exchange) head(req *http.Request) (*http.Response, error) {
	if err := x.send(req); err != nil {
		return nil, err
	}
	limited := &limitedReader{r: x.conn, left: maxAnswerHead}
	x.br = readers.Get().(*bufio.Reader)
	x.br.Reset(limited)
	if _, err := x.br.Peek(1); err != nil {
		return nil, err
	}
	x.answered = true
	for {
		resp, err := http.ReadResponse(x.br, req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode == http.StatusSwitchingProtocols || resp.StatusCode < 100 || resp.StatusCode >= 200 {
			limited.left = math.MaxInt
			return resp, nil
		}
	}
}

// readers and writers hold what an exchange needs for its time. Thousands of them
// among buffers that live as long as their sessions would keep the heap half-empty.
var (
	readers = sync.Pool{New: func() any { return bufio.NewReader(nil) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriter(nil) }}
)

func (x *exchange) send(req *http.Request) error {
	w := writers.Get().(*bufio.Writer)
	defer writers.Put(w)
	w.Reset(x.conn)
	defer w.Reset(nil)
	if err := req.Write(w); err != nil {
		return err
	}
	return w.Flush()
}

// dropReader drops what was read beyond the reply's headers.
func (x *exchange) dropReader() {
	x.br.Reset(nil)
	readers.Put(x.br)
	x.br = nil
}

// limitedReader fails after left bytes.
type limitedReader struct {
	r    io.Reader
	left int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("the answer's headers have more than %d KiB", maxAnswerHead>>10)
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// upgraded returns the connection behind a reply 101.
func (x *exchange) upgraded() *stream {
	rest, _ := x.br.Peek(x.br.Buffered()) // they are buffered
	x.stream = newStream(x.conn, x.bufs, rest)
	x.dropReader()
	return x.stream
}
