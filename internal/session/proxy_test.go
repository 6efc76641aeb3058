package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http/httpproxy"

	"avatarworker/internal/errors"
)

// testProxy tunnels and forwards whatever it is asked for to one server: the
// names that the client uses exist for it alone.
type testProxy struct {
	to      string
	connect func(host string) int // refuses a CONNECT with that status; 0: does not
	forward func(http.ResponseWriter) (done bool)
	// intercept, where it is set, sees every request first.
	intercept func(http.ResponseWriter, *http.Request) (done bool)

	mu      sync.Mutex
	asked   []string // "CONNECT host" or "POST host"
	logins  []string
	tunnels sync.WaitGroup
}

func (p *testProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock() // so that a waiter that holds it knows of every handler
	p.tunnels.Add(1)
	defer p.tunnels.Done()
	p.asked = append(p.asked, r.Method+" "+r.Host)
	p.logins = append(p.logins, r.Header.Get("Proxy-Authorization"))
	p.mu.Unlock()
	if p.intercept != nil && p.intercept(w, r) {
		return
	}
	if r.Method != http.MethodConnect {
		if p.forward != nil && p.forward(w) {
			return
		}
		out := r.Clone(r.Context())
		out.URL.Host, out.RequestURI = p.to, ""
		resp, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			http.Error(w, "cannot forward", http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
		return
	}
	if p.connect != nil {
		if status := p.connect(r.Host); status != 0 {
			w.Header().Set("Retry-After", "3")
			http.Error(w, "no tunnel", status)
			return
		}
	}
	there, err := net.Dial("tcp", p.to)
	if err != nil {
		http.Error(w, "cannot connect", http.StatusBadGateway)
		return
	}
	here, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = io.WriteString(here, "HTTP/1.1 200 Connection established\r\n\r\n")
	p.tunnels.Go(func() {
		_, _ = io.Copy(there, here)
		there.Close()
	})
	p.tunnels.Go(func() {
		_, _ = io.Copy(here, there)
		here.Close()
	})
}

// saw returns how often the proxy was asked for what begins so.
func (p *testProxy) saw(prefix string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, asked := range p.asked {
		if strings.HasPrefix(asked, prefix) {
			n++
		}
	}
	return n
}

// behindProxy is a client whose way to b leads through p, which is served with
// TLS if its scheme is https.
func behindProxy(t *testing.T, b *backend, p *testProxy, backendTLS, proxyTLS bool, noProxy string) (*Client, *url.URL) {
	t.Helper()
	b.reset(t)
	roots := x509.NewCertPool()
	serve := func(h http.Handler, secure bool) *httptest.Server {
		srv := httptest.NewUnstartedServer(h)
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		if secure {
			srv.StartTLS()
			roots.AddCert(srv.Certificate())
		} else {
			srv.Start()
		}
		return srv
	}
	srv := serve(b, backendTLS)
	p.to = srv.Listener.Addr().String()
	proxySrv := serve(p, proxyTLS)
	proxyURL, err := url.Parse(proxySrv.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxyURL.User = url.UserPassword("anna", "hunter2%/")
	proxied := httpproxy.Config{HTTPProxy: proxyURL.String(), HTTPSProxy: proxyURL.String(), NoProxy: noProxy}
	tr := newTransport(defaultTimeout)
	tr.Proxy = func(r *http.Request) (*url.URL, error) { return proxied.ProxyFunc()(r.URL) }
	// Names without a proxy lead to the backend.
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if strings.Contains(addr, "example.com") {
			addr = p.to
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	tr.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	web, ws := "http", "ws"
	if backendTLS {
		web, ws = "https", "wss"
	}
	c := New(Options{HTTPClient: &http.Client{Transport: tr}, Endpoints: Endpoints{
		ConsoleURL: web + "://console.example.com/v1/console", IngressURL: ws + "://ingress.example.com/v2/driveningress",
	}})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		tr.CloseIdleConnections()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		proxySrv.Close()
		srv.Close()
		p.mu.Lock()
		p.mu.Unlock() //nolint:staticcheck // empty: it orders the Adds before the Wait
		p.tunnels.Wait()
	})
	return c, proxyURL
}

func TestEveryUpgradeGoesThroughATunnelOfTheProxy(t *testing.T) {
	for _, backendTLS := range []bool{false, true} {
		for _, proxyTLS := range []bool{false, true} {
			t.Run(fmt.Sprintf("backend TLS %v, proxy TLS %v", backendTLS, proxyTLS), func(t *testing.T) {
				b, p := &backend{}, &testProxy{}
				c, _ := behindProxy(t, b, p, backendTLS, proxyTLS, "")
				s := mustOpen(t, c, params())
				if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
					t.Fatal(err)
				}
				s.Close()
				port, token := ":80", "POST console.example.com"
				if backendTLS {
					port, token = ":443", "CONNECT console.example.com:443"
				}
				if p.saw("CONNECT ingress.example.com"+port) != 1 || p.saw(token) != 1 || len(p.asked) != 2 {
					t.Errorf("the proxy was asked for %q", p.asked)
				}
				for _, login := range p.logins {
					if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("anna:hunter2%/")); login != want {
						t.Errorf("login %q, want %q", login, want)
					}
				}
			})
		}
	}
}

func TestProxysOwnAnswerIsConnectionFailedAndNamesTheProxy(t *testing.T) {
	refuse := func(host string, status int) func(string) int {
		return func(asked string) int {
			if strings.HasPrefix(asked, host) {
				return status
			}
			return 0
		}
	}
	own := func(status int, header ...string) func(http.ResponseWriter) bool {
		return func(w http.ResponseWriter) bool {
			if len(header) > 0 {
				w.Header().Set(header[0], header[1])
			}
			http.Error(w, `{"error":{"code":"unauthorized"}}`, status)
			return true
		}
	}
	type row struct {
		name       string
		p          *testProxy
		backendTLS bool
		phase      errors.Phase
		status     string
	}
	rows := []row{
		{"plain, 407", &testProxy{forward: own(407)}, false, errors.PhaseToken, "407"},
		{"plain, squid's 403", &testProxy{forward: own(403, "X-Squid-Error", "ERR_ACCESS_DENIED 0")}, false, errors.PhaseToken, "403"},
		{"plain, RFC 9209", &testProxy{forward: own(500, "Proxy-Status", "gate; error=dns_error")}, false, errors.PhaseToken, "500"},
		{"plain, 403 and no JSON", &testProxy{forward: own(403)}, false, errors.PhaseToken, "403"},
		{"plain, 502 and no JSON", &testProxy{forward: own(502)}, false, errors.PhaseToken, "502"},
	}
	for _, status := range []int{403, 407, 500, 502, 503} {
		text := fmt.Sprint(status)
		rows = append(rows,
			row{"console, " + text, &testProxy{connect: refuse("console", status)}, true, errors.PhaseToken, text},
			row{"ingress, " + text, &testProxy{connect: refuse("ingress", status)}, true, errors.PhaseConnect, text},
			row{"ws, " + text, &testProxy{connect: refuse("ingress", status)}, false, errors.PhaseConnect, text})
	}
	table, err := errors.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range rows {
		t.Run(tc.name, func(t *testing.T) {
			b := &backend{}
			c, proxyURL := behindProxy(t, b, tc.p, tc.backendTLS, false, "")
			_, err := c.Open(context.Background(), params())
			e := wantError(t, err, errors.CodeConnectionFailed, tc.phase)
			if d := table.Decide(e, false); d.Class != errors.ClassTransient || d.Action != errors.ActionRetry || !d.Proxy {
				t.Errorf("decided %+v", d)
			}
			if !strings.Contains(e.Message, proxyURL.Host) || !strings.Contains(e.Message, "HTTP "+tc.status) {
				t.Errorf("it does not name the proxy %s and its answer: %v", proxyURL.Host, e)
			}
			if text := e.Error(); strings.Contains(text, "hunter2") || strings.Contains(text, "anna") {
				t.Errorf("it shows the proxy's login: %s", text)
			}
			if b.upgrades.Load() != 0 {
				t.Error("an upgrade was asked for")
			}
		})
	}
}

func TestBackendsAnswerThroughAProxyIsTheBackends(t *testing.T) {
	for _, backendTLS := range []bool{false, true} {
		b := &backend{token: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			answer(401, `{"error":{"code":"unauthorized"}}`)(w, r)
		}}
		c, _ := behindProxy(t, b, &testProxy{}, backendTLS, false, "")
		_, err := c.Open(context.Background(), params())
		wantError(t, err, errors.CodeInvalidEgressConfig, errors.PhaseToken)
	}
}

func TestProxyThatCantBeReachedIsNamed(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := gone.Addr().String()
	gone.Close()
	for _, scheme := range []string{"http", "https", "socks5"} {
		for _, web := range []string{"http", "https"} {
			for _, ingressOnly := range []bool{false, true} {
				b := &backend{}
				c := overTCP(t, b, Options{})
				c.transport.Proxy = func(r *http.Request) (*url.URL, error) {
					if ingressOnly && !strings.Contains(r.URL.Host, "ingress") {
						return nil, nil
					}
					return url.Parse(scheme + "://anna:hunter2@" + addr)
				}
				c.o.Endpoints.IngressURL = web + "://ingress.example.com/v2/driveningress"
				_, err := c.Open(context.Background(), params())
				phase := errors.PhaseToken
				if ingressOnly {
					phase = errors.PhaseConnect
				}
				e := wantError(t, err, errors.CodeConnectionFailed, phase)
				if !e.Proxy || !strings.Contains(e.Message, scheme+"://"+addr) || strings.Contains(e.Error(), "hunter2") {
					t.Errorf("%v", e)
				}
			}
		}
	}
}

// What a proxy does that answers nothing is its own fault; what comes through it
// is the backend's, or its certificate's.
func TestTheFaultOfAProxyIsDistinguishedFromTheBackends(t *testing.T) {
	hangUp := func(w http.ResponseWriter) {
		here, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		here.Close()
	}
	closing := func(host string) *testProxy {
		return &testProxy{intercept: func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.Host, host) {
				return false
			}
			hangUp(w)
			return true
		}}
	}
	for _, tc := range []struct {
		name       string
		p          *testProxy
		backendTLS bool
		change     func(*Client)
		phase      errors.Phase
		proxy      bool
	}{
		{"closes, plain", closing("console"), false, nil, errors.PhaseToken, true},
		{"closes, console", closing("console"), true, nil, errors.PhaseToken, true},
		{"closes, ingress", closing("ingress"), true, nil, errors.PhaseConnect, true},
		{"closes, ws", closing("ingress"), false, nil, errors.PhaseConnect, true},
		{"certificate, console", &testProxy{}, true, func(c *Client) { c.transport.TLSClientConfig.RootCAs = x509.NewCertPool() }, errors.PhaseToken, false},
		{"certificate, ingress", &testProxy{}, true, func(c *Client) { c.tls.RootCAs = x509.NewCertPool() }, errors.PhaseConnect, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, proxyURL := behindProxy(t, &backend{}, tc.p, tc.backendTLS, false, "")
			if tc.change != nil {
				tc.change(c)
			}
			_, err := c.Open(context.Background(), params())
			e := wantError(t, err, errors.CodeConnectionFailed, tc.phase)
			if e.Proxy != tc.proxy || !strings.Contains(e.Message, proxyURL.Host) {
				t.Errorf("the proxy's fault: %v, want %v: %v", e.Proxy, tc.proxy, e)
			}
		})
	}
}

func TestNoProxyHolds(t *testing.T) {
	b, p := &backend{}, &testProxy{}
	c, proxyURL := behindProxy(t, b, p, false, false, "ingress.example.com")
	mustOpen(t, c, params()).Close()
	if p.saw("CONNECT") != 0 || p.saw("POST console.example.com") != 1 {
		t.Errorf("the proxy was asked for %q", p.asked)
	}
	console, ingress := c.Proxies()
	if console != "http://"+proxyURL.Host || ingress != "none" {
		t.Errorf("proxies %q and %q", console, ingress)
	}
}

func TestBadProxyAddressIsReportedWithoutItsLogin(t *testing.T) {
	b := &backend{}
	c := overTCP(t, b, Options{})
	c.transport.Proxy = environmentProxy(func(*url.URL) (*url.URL, error) {
		return nil, errors.New(`invalid proxy address "http://anna:hunter2@a b"`)
	})
	_, err := c.Open(context.Background(), params())
	e := wantError(t, err, errors.CodeConnectionFailed, errors.PhaseToken)
	if !e.Proxy {
		t.Error("not the proxy's fault")
	}
	console, ingress := c.Proxies()
	for _, text := range []string{e.Message, console, ingress} {
		if !strings.Contains(text, "HTTPS_PROXY") || strings.Contains(text, "hunter2") {
			t.Errorf("reported as %q", text)
		}
	}
}

// socksServer speaks as much of SOCKS5 (RFC 1928) as one CONNECT needs.
func socksServer(t *testing.T, to string) (addr string, asked func() []string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var names []string
	var wg sync.WaitGroup
	serve := func(here net.Conn) {
		defer here.Close()
		head := make([]byte, 2)
		if _, err := io.ReadFull(here, head); err != nil {
			return
		}
		_, _ = io.CopyN(io.Discard, here, int64(head[1]))
		_, _ = here.Write([]byte{5, 0})
		request := make([]byte, 5)
		if _, err := io.ReadFull(here, request); err != nil {
			return
		}
		name := make([]byte, int(request[4])+2)
		if _, err := io.ReadFull(here, name); err != nil {
			return
		}
		mu.Lock()
		names = append(names, string(name[:len(name)-2]))
		mu.Unlock()
		there, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		_, _ = here.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
		wg.Go(func() { _, _ = io.Copy(there, here); there.Close() })
		_, _ = io.Copy(here, there)
	}
	wg.Go(func() {
		for {
			here, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(here) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String(), func() []string { mu.Lock(); defer mu.Unlock(); return names }
}

func TestSOCKSProxyIsUsed(t *testing.T) {
	b := &backend{}
	b.reset(t)
	srv := httptest.NewServer(b)
	addr, asked := socksServer(t, srv.Listener.Addr().String())
	tr := newTransport(defaultTimeout)
	tr.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse("socks5://" + addr) }
	c := New(Options{HTTPClient: &http.Client{Transport: tr}, Endpoints: Endpoints{
		ConsoleURL: "http://console.example.com/v1/console", IngressURL: "ws://ingress.example.com/v2/driveningress",
	}})
	mustOpen(t, c, params()).Close()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	tr.CloseIdleConnections()
	srv.Close()
	if got := strings.Join(asked(), " "); !strings.Contains(got, "console.example.com") || !strings.Contains(got, "ingress.example.com") {
		t.Errorf("the proxy was asked for %q", got)
	}
}
