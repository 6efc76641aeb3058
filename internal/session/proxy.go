package session

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/proxy"

	"avatarworker/internal/errors"
)

// proxyFromEnvironment returns the environment's proxies for http.Transport, nil if
// there are none: nothing is then made for each start of a session to ask for them.
func proxyFromEnvironment() func(*http.Request) (*url.URL, error) {
	c := httpproxy.FromEnvironment()
	if c.HTTPProxy == "" && c.HTTPSProxy == "" {
		return nil
	}
	return environmentProxy(c.ProxyFunc())
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
	connect := func(ctx context.Context) (net.Conn, error) { return c.dialTCP(ctx, "tcp", hostPort(via)) }
	if via.Scheme == "https" {
		dial := connect
		connect = func(ctx context.Context) (net.Conn, error) { return c.connectTLS(ctx, dial, via.Hostname()) }
	}
	conn, err := connect(ctx)
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
