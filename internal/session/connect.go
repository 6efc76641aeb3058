package session

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/proxy"

	"avatarworker/internal/errors"
)

// maxAnswerHead bounds the status line and headers of an answer, in bytes.
const maxAnswerHead = 64 << 10

// newTransport has the settings of both the calls to the console and the
// connections to the ingress. timeout bounds each dial and each TLS handshake.
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
		return shakes.start(ctx, conn, config, host)
	}
	return t
}

// upgradeKey finds, in the context of a dial for an upgrade, the *tls.Config to
// use: http.Transport changes its own as it works, and offers HTTP/2.
type upgradeKey struct{}

// handshakes makes TLS handshakes, a bounded number at a time: when thousands of
// sessions start at once and all shake hands together, none is done in time. A
// turn is waited for as long as others succeed; where none has within timeout,
// as with a server that never answers, it is not waited for any longer.
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

// start closes conn if the handshake fails.
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

// turn waits for a turn; false: it was not waited for any longer.
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

// environmentProxy is find, for http.Transport, with an error that does not
// repeat the proxy's address: it may hold a password.
func environmentProxy(find func(*url.URL) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(req *http.Request) (*url.URL, error) {
		u, err := find(req.URL)
		if err != nil {
			return nil, errors.New("the proxy's address in the environment (HTTPS_PROXY, HTTP_PROXY) is not a URL: write http://host:port")
		}
		return u, nil
	}
}

// proxyError is a proxy's answer where the backend's was wanted.
type proxyError struct {
	proxy  *url.URL
	status int
	header http.Header
}

func (p *proxyError) Error() string {
	return fmt.Sprintf("the proxy %s answered with HTTP %d", proxyName(p.proxy), p.status)
}

// proxyName is a proxy's URL without its login.
func proxyName(u *url.URL) string { return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String() }

// refusedConnect keeps what a proxy says of a CONNECT of net/http's.
func refusedConnect(_ context.Context, proxyURL *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{proxyURL, resp.StatusCode, resp.Header}
}

// proxyOf is the proxy on the way to u; nil: there is none. ws and wss are
// http and https to it.
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

// Proxies says for the log which proxy is on the way to console and ingress of
// the default region, without its login; "none" where there is none.
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

// connect opens a connection to u's host on which an upgrade can be asked for:
// TCP, through a proxy if there is one, and TLS. A proxy is always asked for a
// tunnel, for ws too: one that forwards requests does not forward an upgrade.
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

// startTLS closes conn if the handshake fails.
func (c *Client) startTLS(ctx context.Context, conn net.Conn, host string) (net.Conn, error) {
	return c.handshakes.start(ctx, conn, c.tls, host)
}

// connectVia has a proxy connect to addr.
func (c *Client) connectVia(ctx context.Context, via *url.URL, addr string) (net.Conn, error) {
	switch via.Scheme {
	case "socks5", "socks5h":
		dialer, err := proxy.FromURL(via, dialerFunc(c.dialTCP))
		if err != nil {
			return nil, err
		}
		with, ok := dialer.(proxy.ContextDialer)
		if !ok {
			return nil, errors.New("the SOCKS library can't be cancelled")
		}
		ctx, cancel := c.dialLimit(ctx)
		defer cancel()
		return with.DialContext(ctx, "tcp", addr)
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

// dialLimit is ConnectTimeout.
func (c *Client) dialLimit(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := c.o.ConnectTimeout
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not connected within %s", timeout))
}

// dialerFunc is a proxy.Dialer.
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

// hostPort is u's address, with the scheme's port where it names none.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[webScheme(u.Scheme)]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// early is a connection that is opened while the session token is minted.
type early struct {
	cancel context.CancelFunc
	done   chan struct{} // closed once conn or err is set
	conn   net.Conn
	err    error
	since  time.Time // when conn was there
}

// connectEarly starts to connect to u; stop has to be called. An ingress counts
// and bills sessions, and neither connections nor upgrades that it refuses.
func (c *Client) connectEarly(ctx context.Context, u *url.URL) *early {
	ctx, cancel := context.WithCancel(ctx)
	e := &early{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		defer errors.Recover(&e.err, errors.PhaseConnect)
		e.conn, e.err = c.connect(ctx, u)
		e.since = time.Now()
	}()
	return e
}

// take waits for the connection, which is the caller's then.
func (e *early) take(ctx context.Context) (net.Conn, error) {
	select {
	case <-e.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	conn := e.conn
	e.conn = nil
	return conn, e.err
}

// stop ends the dialling, and closes a connection that was not taken.
func (e *early) stop() {
	e.cancel()
	<-e.done
	if e.conn != nil {
		_ = e.conn.Close() // nothing was sent on it
	}
}

// refusalLimit is how much of a refusal's body is read, and refusalWait for how
// long.
const (
	refusalLimit = 64 << 10
	refusalWait  = 3 * time.Second
)

// exchange is one request and its answer on a connection of its own.
type exchange struct {
	conn     net.Conn
	br       *bufio.Reader // has what was read beyond the answer's head
	answered bool          // at least a byte of an answer came
	refusal  []byte        // the first bytes of an answer that is not an upgrade
}

var _ http.RoundTripper = (*exchange)(nil)

// RoundTrip asks for an upgrade. The body of an answer 101 is the connection; of
// any other answer the connection is closed, and the body is in x.refusal.
func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	ended := x.watch(req.Context())
	resp, err := x.head(req)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		_ = x.conn.SetReadDeadline(time.Now().Add(refusalWait)) // one that is closed fails by itself
		// What came of the body is what there is to say.
		x.refusal, _ = io.ReadAll(io.LimitReader(resp.Body, refusalLimit))
		resp.Body = http.NoBody
		ended()
		_ = x.conn.Close() // it is of no more use
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

// ask sends a request and returns its answer without the body.
func (x *exchange) ask(ctx context.Context, req *http.Request) (*http.Response, error) {
	ended := x.watch(ctx)
	resp, err := x.head(req)
	if ended() {
		return nil, context.Cause(ctx)
	}
	return resp, err
}

// watch fails the connection's reads and writes once ctx ends, until the
// function that it returns is called, which reports whether it did so.
func (x *exchange) watch(ctx context.Context) (ended func() bool) {
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = x.conn.SetDeadline(time.Unix(1, 0)) // one that is closed fails by itself
	})
	return func() bool {
		if cancel() {
			return false
		}
		<-done
		return true
	}
}

// head sends a request and reads the head of its final answer.
func (x *exchange) head(req *http.Request) (*http.Response, error) {
	if err := req.Write(x.conn); err != nil {
		return nil, err
	}
	limited := &limitedReader{r: x.conn, left: maxAnswerHead}
	x.br = bufio.NewReader(limited)
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

// upgraded is the connection behind an answer 101. The buffer is kept only where
// it has something.
func (x *exchange) upgraded() io.ReadWriteCloser {
	n := x.br.Buffered()
	if n == 0 {
		x.br = nil
		return x.conn
	}
	rest, _ := x.br.Peek(n) // it is there
	return &readAhead{x.conn, bytes.NewReader(rest)}
}

// readAhead is a connection of which some bytes were read already.
type readAhead struct {
	net.Conn
	rest *bytes.Reader
}

func (r *readAhead) Read(p []byte) (int, error) {
	if r.rest.Len() > 0 {
		return r.rest.Read(p)
	}
	return r.Conn.Read(p)
}
