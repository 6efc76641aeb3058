//go:build unix

package session

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
)

// wsFrame is a frame as a server sends it, or with a mask.
func wsFrame(first byte, masked bool, payload []byte) []byte {
	b := []byte{first}
	mask := byte(0)
	if masked {
		mask = 0x80
	}
	switch n := len(payload); {
	case n < 126:
		b = append(b, mask|byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, mask|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, mask|127), uint64(n))
	}
	if masked {
		b = append(b, 1, 2, 3, 4)
	}
	return append(b, payload...)
}

func TestFrameBoundariesAreFound(t *testing.T) {
	const (
		last, text, binaryData, continued, ping = 0x80, 1, 2, 0, 9
	)
	type sent struct {
		bytes   []byte
		between bool // after it
	}
	var list []sent
	for _, n := range []int{0, 1, 125, 126, 127, 65535, 65536, 70_000} {
		p := make([]byte, n)
		for _, masked := range []bool{false, true} {
			list = append(list,
				sent{wsFrame(last|binaryData, masked, p), true},
				sent{wsFrame(text, masked, p), false},
				sent{wsFrame(last|ping, masked, p[:min(n, 125)]), false},
				sent{wsFrame(continued, masked, p), false},
				sent{wsFrame(last|continued, masked, p), true},
				sent{wsFrame(last|ping, masked, p[:min(n, 125)]), true},
			)
		}
	}
	for name, part := range map[string]func() int{
		"whole":        func() int { return 1 << 20 },
		"single bytes": func() int { return 1 },
		"parts":        func() int { return 1 + rand.IntN(40) },
	} {
		t.Run(name, func(t *testing.T) {
			var f frameBoundary
			for i, frame := range list {
				behind := append(bytes.Clone(frame.bytes), 0x82, 3, 'n', 'e', 'x')
				for at := 0; at < len(frame.bytes); {
					if at > 0 && f.between() {
						t.Fatalf("frame %d seems to end after %d of %d bytes", i, at, len(frame.bytes))
					}
					n := f.take(behind[at:min(at+part(), len(behind))])
					if at += n; n < 1 || at > len(frame.bytes) {
						t.Fatalf("frame %d: %d bytes taken, to %d of %d", i, n, at, len(frame.bytes))
					}
				}
				if f.between() != frame.between {
					t.Fatalf("after frame %d: between %v", i, f.between())
				}
			}
		})
	}
}

// layered returns a stream with so many layers of TLS over a socket, and its peer.
func layered(t *testing.T, layers int) (*stream, net.Conn) {
	t.Helper()
	srv := httptest.NewUnstartedServer(nil)
	srv.StartTLS()
	certificates := srv.TLS.Certificates
	srv.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	here, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	there, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	here = newSocket(here)
	for range layers {
		server := tls.Server(there, &tls.Config{Certificates: certificates, MinVersion: tls.VersionTLS12})
		shaken := make(chan error, 1)
		go func() { shaken <- server.Handshake() }()
		client := tls.Client(here, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}) // #nosec G402 -- the peer is this test
		if err := errors.Join(client.Handshake(), <-shaken); err != nil {
			t.Fatal(err)
		}
		here, there = client, server
	}
	t.Cleanup(func() { here.Close(); there.Close() })
	return newStream(here, newBufferPool(), nil), there
}

// What has come already, in the stream or in a layer of TLS, is not waited for: the
// socket has nothing more to give.
func TestStreamReturnsEachFrameAndThenThatNothingHasCome(t *testing.T) {
	frames := [][]byte{
		wsFrame(0x82, false, []byte("one")), wsFrame(0x8a, false, nil), wsFrame(0x82, false, make([]byte, 9_000)),
		wsFrame(0x82, false, []byte("two")), wsFrame(0x82, false, make([]byte, 70_000)), wsFrame(0x89, false, []byte("ping")),
	}
	for layers := range 3 {
		for _, dribble := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d layers of TLS, dribbled %v", layers, dribble), func(t *testing.T) {
				s, there := layered(t, layers)
				all, wrote := bytes.Join(frames, nil), make(chan error, 1)
				go func() {
					var err error
					for n := len(all); dribble && err == nil && len(all) > n-20; all = all[1:] {
						_, err = there.Write(all[:1])
					}
					_, rest := there.Write(all)
					wrote <- errors.Join(err, rest)
				}()
				for i, want := range frames {
					s.wait()
					got := make([]byte, len(want))
					if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, want) {
						t.Fatalf("frame %d: %v", i, err)
					}
				}
				if err := <-wrote; err != nil {
					t.Fatal(err)
				}
				if n, err := s.Read(make([]byte, 10)); n != 0 || !errors.Is(err, errIdle) {
					t.Errorf("after the last frame: %d bytes, %v", n, err)
				}
				// The rest of a message is waited for.
				begun := make(chan struct{})
				go func() {
					_, err := there.Write(wsFrame(0x02, false, []byte("begin")))
					<-begun
					_, rest := there.Write(wsFrame(0x80, false, []byte("rest")))
					wrote <- errors.Join(err, rest)
				}()
				got := make([]byte, 7)
				s.wait()
				if _, err := io.ReadFull(s, got); err != nil {
					t.Fatal(err)
				}
				close(begun)
				s.wait() // returns at once
				if _, err := io.ReadFull(s, got[:6]); err != nil || string(got[2:6]) != "rest" {
					t.Fatalf("%q, %v", got, err)
				}
				if err := <-wrote; err != nil {
					t.Fatal(err)
				}
				there.Close()
				s.wait()
				if n, err := s.Read(got); n != 0 || err != io.EOF {
					t.Errorf("after the close: %d bytes, %v", n, err)
				}
			})
		}
	}
}

func TestStreamAllocatesNothingForAMessage(t *testing.T) {
	s, there := layered(t, 0)
	message, got := wsFrame(0x82, false, make([]byte, 20_000)), make([]byte, 20_004)
	per := testing.AllocsPerRun(100, func() {
		if _, err := there.Write(message); err != nil {
			t.Fatal(err)
		}
		s.wait()
		if _, err := io.ReadFull(s, got); err != nil {
			t.Fatal(err)
		}
	})
	if per != 0 {
		t.Errorf("%v allocations", per)
	}
}

func TestStreamNamesTheFaultOfItsSocket(t *testing.T) {
	for layers := range 2 {
		s, there := layered(t, layers)
		if secure, ok := there.(*tls.Conn); ok {
			there = secure.NetConn()
		}
		if err := there.(*net.TCPConn).SetLinger(0); err != nil { // so that the close is a reset
			t.Fatal(err)
		}
		there.Close()
		s.wait()
		_, err := s.Read(make([]byte, 10))
		if !errors.Is(err, syscall.ECONNRESET) || !strings.HasPrefix(err.Error(), "read tcp ") {
			t.Errorf("%d layers: %v", layers, err)
		}
		s.Close()
		if _, err := s.sock.(*socket).Read(make([]byte, 10)); !errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), "raw") {
			t.Errorf("%d layers, closed here: %v", layers, err)
		}
	}
}

// overSockets returns a client of b as a worker makes it.
func overSockets(t *testing.T, b *backend, secure bool) *Client {
	t.Helper()
	if !secure {
		return overTCP(t, b, Options{})
	}
	b.reset(t)
	srv := httptest.NewTLSServer(b)
	hc := NewHTTPClient()
	tr := hc.Transport.(*http.Transport)
	tr.TLSClientConfig.RootCAs = srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	c := New(Options{HTTPClient: hc, Endpoints: Endpoints{ConsoleURL: srv.URL + "/v1/console", IngressURL: srv.URL + "/v2/driveningress"}})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
		tr.CloseIdleConnections()
		srv.Close()
	})
	return c
}

// A reader that waits within the library would keep a stack for the library's
// calls and those of crypto/tls as long as the session lives.
func TestReaderWaitsOutsideTheLibrary(t *testing.T) {
	ping, answered := make(chan struct{}), make(chan struct{})
	pings := func(p *peer) {
		p.confirm()
		<-ping // the test has looked at the reader after the confirm
		ctx := p.c.CloseRead(context.Background())
		if err := p.c.Ping(ctx); err != nil {
			t.Error(err)
		}
		answered <- struct{}{}
		<-ctx.Done()
		p.sawClose = websocket.StatusNormalClosure
	}
	for _, backendTLS := range []bool{false, true} {
		for name, open := range map[string]func(t *testing.T, b *backend) *Client{
			"no proxy": func(t *testing.T, b *backend) *Client {
				return overSockets(t, b, backendTLS)
			},
			"proxy": func(t *testing.T, b *backend) *Client {
				c, _ := behindProxy(t, b, &testProxy{}, backendTLS, false, "")
				return c
			},
			"SOCKS proxy": func(t *testing.T, b *backend) *Client {
				p := &testProxy{}
				c, _ := behindProxy(t, b, p, backendTLS, false, "")
				addr, _ := socksServer(t, p.to)
				t.Cleanup(func() { c.Close(); c.transport.CloseIdleConnections() }) // before the proxy ends
				c.transport.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse("socks5://" + addr) }
				return c
			},
			"proxy with TLS": func(t *testing.T, b *backend) *Client {
				c, _ := behindProxy(t, b, &testProxy{}, backendTLS, true, "")
				return c
			},
		} {
			t.Run(fmt.Sprintf("backend TLS %v, %s", backendTLS, name), func(t *testing.T) {
				s := mustOpen(t, open(t, &backend{session: pings}), params())
				waitsOutside(t, "after the confirm")
				ping <- struct{}{}
				<-answered
				waitsOutside(t, "after a ping")
				s.Close()
			})
		}
	}
}

// waitsOutside returns once the only reader waits for its socket with none of the
// library's calls on its stack.
func waitsOutside(t *testing.T, when string) {
	t.Helper()
	var reader string
	for range 1000 {
		all := make([]byte, 1<<20)
		for g := range strings.SplitSeq(string(all[:runtime.Stack(all, true)]), "\n\n") {
			if strings.Contains(g, "(*Session).readLoop(") {
				reader = g
			}
		}
		if strings.Contains(reader, "(*socket).wait(") && !strings.Contains(reader, "coder/websocket") && !strings.Contains(reader, "crypto/tls") {
			return
		}
		time.Sleep(5 * time.Millisecond) // nothing signals that a goroutine waits
	}
	t.Fatalf("%s the reader waits here:\n%s", when, reader)
}

func TestClosingWaitsForThePeersAnswerOverSockets(t *testing.T) {
	for _, backendTLS := range []bool{false, true} {
		b := &backend{}
		c := overSockets(t, b, backendTLS)
		s := mustOpen(t, c, params())
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		s.Close()
		if took := time.Since(begun); took > closeWait {
			t.Errorf("closing took %s", took)
		}
		wantClosed1000(t, b, 1)
	}
}
