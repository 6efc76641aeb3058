package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
)

// apart gives console and ingress addresses that tests can distinguish.
func apart() Endpoints {
	return Endpoints{ConsoleURL: "http://console/v1/console", IngressURL: "http://ingress/v2/driveningress"}
}

// closeReporter reports when the client has closed a connection.
type closeReporter struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *closeReporter) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func TestIngressIsDialledWhileTheTokenIsMinted(t *testing.T) {
	var dialled chan struct{}
	b := &backend{token: func(w http.ResponseWriter, _ *http.Request) {
		<-dialled // only answered once the ingress is connected
		fmt.Fprint(w, `{"sessionToken":"t"}`)
	}}
	b.opened = func(host string, conn net.Conn) net.Conn {
		if strings.HasPrefix(host, "ingress") {
			close(dialled) // a second dial would panic
		}
		return conn
	}
	inMemory(t, b, Options{Endpoints: apart()}, func(c *Client) {
		dialled = make(chan struct{})
		mustOpen(t, c, params()).Close()
		wantClosed1000(t, b, 1)
	})
}

func TestConnectionIsClosedAtOnceWhereNoSessionComesOfIt(t *testing.T) {
	boom := errors.New("no such object")
	for name, tc := range map[string]struct {
		b      *backend
		change func(*Params)
	}{
		"token refused":   {&backend{token: answer(401, "no")}, func(*Params) {}},
		"no API key":      {&backend{}, func(p *Params) { p.APIKey = func() (string, error) { return "", boom } }},
		"no speech":       {&backend{}, func(p *Params) { p.Config = func(context.Context) (AudioConfig, error) { return AudioConfig{}, boom } }},
		"upgrade refused": {&backend{upgrade: refuse(404, "{}")}, func(*Params) {}},
	} {
		t.Run(name, func(t *testing.T) {
			var conns []*closeReporter
			tc.b.opened = func(host string, conn net.Conn) net.Conn {
				if !strings.HasPrefix(host, "ingress") {
					return conn
				}
				conns = append(conns, &closeReporter{Conn: conn, closed: make(chan struct{})})
				return conns[len(conns)-1]
			}
			inMemory(t, tc.b, Options{Endpoints: apart()}, func(c *Client) {
				conns = nil
				p := params()
				tc.change(&p)
				if _, err := c.Open(context.Background(), p); err == nil {
					t.Fatal("a session was opened")
				}
				for _, conn := range conns {
					select {
					case <-conn.closed:
					default:
						t.Error("the connection is still open when Open has returned")
					}
				}
			})
		})
	}
}

func TestTokensFailureIsReportedBeforeTheDials(t *testing.T) {
	down := func(host string) error {
		if strings.HasPrefix(host, "ingress") {
			return errors.New("connection refused")
		}
		return nil
	}
	for _, tc := range []struct {
		name  string
		b     *backend
		code  errors.Code
		phase errors.Phase
	}{
		{"both fail", &backend{dial: down, token: answer(401, "no")}, errors.CodeSessionTokenExpired, errors.PhaseToken},
		{"the dial fails", &backend{dial: down}, errors.CodeConnectionFailed, errors.PhaseConnect},
		{"the dial fails before the token is there", &backend{dial: down, token: func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Second)
			answer(200, `{"sessionToken":"t"}`)(w, r)
		}}, errors.CodeConnectionFailed, errors.PhaseConnect},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inMemory(t, tc.b, Options{Endpoints: apart()}, func(c *Client) {
				_, err := c.Open(context.Background(), params())
				e := wantError(t, err, tc.code, tc.phase)
				if tc.phase == errors.PhaseConnect && !strings.Contains(e.Message, "connection refused") {
					t.Errorf("the cause is lost: %v", e)
				}
			})
		})
	}
}

// A server may give up a connection that asks for nothing.
func TestConnectionThatWasDroppedWhileTheTokenWasMintedIsDialledAgain(t *testing.T) {
	for _, tc := range []struct {
		name  string
		slow  time.Duration
		dials int
		code  errors.Code
	}{
		{"after a long wait", 3 * time.Second, 2, ""},
		{"at once", 0, 1, errors.CodeConnectionFailed}, // the upgrade was not wanted
	} {
		t.Run(tc.name, func(t *testing.T) {
			dials := 0
			b := &backend{token: func(w http.ResponseWriter, _ *http.Request) {
				time.Sleep(tc.slow)
				fmt.Fprint(w, `{"sessionToken":"t"}`)
			}}
			b.opened = func(host string, conn net.Conn) net.Conn {
				if strings.HasPrefix(host, "ingress") {
					if dials++; dials == 1 {
						conn.Close()
					}
				}
				return conn
			}
			inMemory(t, b, Options{Endpoints: apart()}, func(c *Client) {
				dials = 0
				_, err := c.Open(context.Background(), params())
				if tc.code != "" {
					wantError(t, err, tc.code, errors.PhaseConnect)
				} else if err != nil {
					t.Fatal(err)
				}
				if dials != tc.dials {
					t.Errorf("%d dials, want %d", dials, tc.dials)
				}
			})
		})
	}
}

func TestTLSThatIsNotFinishedIsGivenUpAfterTheConnectTimeout(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for phase, change := range map[errors.Phase]func(*Endpoints){
		errors.PhaseConnect: func(e *Endpoints) { e.IngressURL = "wss://" + silent.Addr().String() + "/v2/driveningress" },
		errors.PhaseToken:   func(e *Endpoints) { e.ConsoleURL = "https://" + silent.Addr().String() + "/v1/console" },
	} {
		c := overTCP(t, &backend{}, Options{ConnectTimeout: 200 * time.Millisecond})
		change(&c.o.Endpoints)
		_, err = c.Open(context.Background(), params())
		e := wantError(t, err, errors.CodeConnectionFailed, phase)
		if !strings.Contains(e.Message, "no TLS handshake within 200ms") {
			t.Errorf("%v", e)
		}
	}
}

func TestFramesBehindTheUpgradesAnswerAreNotLost(t *testing.T) {
	here, there := memoryPipe()
	defer here.Close()
	go func() {
		_, _ = there.Read(make([]byte, 4096))
		_, _ = io.WriteString(there, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\nfirst")
		_, _ = io.WriteString(there, " second")
		there.Close()
	}()
	req, err := http.NewRequest(http.MethodGet, "http://h/", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&exchange{conn: here, bufs: newBufferPool()}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "first second" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestEndlessAnswerIsGivenUp(t *testing.T) {
	for name, answer := range map[string]string{
		"headers":     "HTTP/1.1 404 Not Found\r\nX: ",
		"interim":     "HTTP/1.1 100 Continue\r\n\r\n",
		"status line": "HTTP/1.1 ",
	} {
		t.Run(name, func(t *testing.T) {
			here, there := memoryPipe()
			defer here.Close()
			if _, err := io.WriteString(there, answer+strings.Repeat(answer, 1+(maxAnswerHead/len(answer)))); err != nil {
				t.Fatal(err)
			}
			req, err := http.NewRequest(http.MethodGet, "http://h/", http.NoBody)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := (&exchange{conn: here, bufs: newBufferPool()}).RoundTrip(req); err == nil {
				t.Error("it was read to its end")
			}
		})
	}
}

func TestLongRefusalIsReadWhole(t *testing.T) {
	b := &backend{upgrade: refuse(400, `{"pad":"`+strings.Repeat("x", 20_000)+`","message":"Avatar not found"}`)}
	inMemory(t, b, Options{}, func(c *Client) {
		_, err := c.Open(context.Background(), params())
		wantError(t, err, errors.CodeAvatarNotFound, errors.PhaseConnect)
	})
}

func TestHandshakesThatNeverEndHoldUpTheOthersForOneTimeoutOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(10 * time.Second)
		var wg sync.WaitGroup
		begun := time.Now()
		for range 4 * handshakesAtOnce {
			wg.Go(func() {
				dial := func(context.Context) (net.Conn, error) {
					here, there := memoryPipe()
					t.Cleanup(func() { there.Close() })
					return here, nil
				}
				if _, err := h.start(t.Context(), dial, &tls.Config{MinVersion: tls.VersionTLS12}, "h"); err == nil || !strings.Contains(err.Error(), "no TLS handshake within 10s") {
					t.Errorf("%v", err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("%d handshakes were given up after %s", 4*handshakesAtOnce, took)
		}
	})
}

func TestATurnIsWaitedForAsLongAsHandshakesSucceed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(10 * time.Second)
		for range handshakesAtOnce {
			h.turns <- struct{}{}
		}
		go func() {
			for range 10 {
				time.Sleep(5 * time.Second)
				h.success.Store(int64(time.Since(h.begun)))
			}
			<-h.turns
		}()
		begun := time.Now()
		if had, err := h.turn(t.Context()); !had || err != nil || time.Since(begun) != 50*time.Second {
			t.Errorf("a turn %v, %v, after %s", had, err, time.Since(begun))
		}
		begun = time.Now()
		if had, err := h.turn(t.Context()); had || err != nil || time.Since(begun) != 10*time.Second {
			t.Errorf("a turn %v, %v, after %s, though none succeeded any more", had, err, time.Since(begun))
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("stopped")
		cancel(cause)
		if _, err := h.turn(ctx); !errors.Is(err, cause) {
			t.Errorf("%v", err)
		}
	})
}

func TestAConnectionThatWaitedLongForItsTurnIsDialledAgain(t *testing.T) {
	for waited, want := range map[time.Duration]int{staleAfter - time.Second: 1, staleAfter: 2} {
		synctest.Test(t, func(t *testing.T) {
			h := newHandshakes(10 * time.Second)
			for range handshakesAtOnce {
				h.turns <- struct{}{}
			}
			time.AfterFunc(waited, func() { <-h.turns })
			var dialled []net.Conn
			dial := func(context.Context) (net.Conn, error) {
				here, there := memoryPipe()
				t.Cleanup(func() { there.Close() })
				dialled = append(dialled, here)
				return here, nil
			}
			// There is no server: only the dialling counts.
			if _, err := h.start(t.Context(), dial, &tls.Config{MinVersion: tls.VersionTLS12}, "h"); err == nil {
				t.Error("a handshake without a server succeeded")
			}
			if len(dialled) != want {
				t.Errorf("after a wait of %s: dialled %d times, want %d", waited, len(dialled), want)
			}
			for i, conn := range dialled {
				if _, err := conn.Write([]byte{0}); err == nil {
					t.Errorf("connection %d is open", i+1)
				}
			}
		})
	}
}

var starts = flag.Int("starts", 200, "sessions that start at once over TLS")

func TestManySessionsStartAtOnceOverTLS(t *testing.T) {
	b := &backend{}
	b.reset(t)
	srv := httptest.NewUnstartedServer(b)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	hc := NewHTTPClient()
	tr := hc.Transport.(*http.Transport)
	tr.TLSClientConfig.RootCAs = roots
	defer tr.CloseIdleConnections()
	c := New(Options{
		HTTPClient: hc, Endpoints: Endpoints{ConsoleURL: srv.URL + "/v1/console", IngressURL: srv.URL + "/v2/driveningress"},
	})
	defer c.Close()
	failures := make(chan error, *starts)
	var wg sync.WaitGroup
	for range *starts {
		wg.Go(func() {
			_, err := c.Open(context.Background(), params())
			failures <- err
		})
	}
	wg.Wait()
	for range *starts {
		if err := <-failures; err != nil {
			t.Fatal(err)
		}
	}
}
