package session

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// frameSize is a real envelope's (docs/protocol.md, section 4).
const frameSize = 49_868

// flood is a backend that answers one utterance with n frames, marking the last.
func flood(t testing.TB, n int) *backend {
	return &backend{session: func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		last := frame(p.t, id, true, "x")
		b := frame(p.t, id, false, "")
		b = append(b, 0x7a) // an unknown field takes the place of the animation data
		pad := frameSize - len(b) - 3
		b = append(b, byte(pad)|0x80, byte(pad>>7)|0x80, byte(pad>>14))
		b = append(b, make([]byte, pad)...)
		for range n {
			p.sendRaw(b)
		}
		p.sendRaw(last)
	}}
}

// BenchmarkRelayedFrame compares our client with a reader of the bare library
// that looks at nothing; allocations of both include the server's.
func BenchmarkRelayedFrame(b *testing.B) {
	b.Run("session", func(b *testing.B) {
		c := overTCP(b, flood(b, b.N), Options{})
		s := mustOpen(b, c, params())
		b.SetBytes(frameSize)
		b.ReportAllocs()
		b.ResetTimer()
		spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error { return nil }})
		if err != nil || spoken.Frames != b.N+1 {
			b.Fatalf("%+v, %v", spoken, err)
		}
	})
	b.Run("bare", func(b *testing.B) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			be := flood(b, b.N)
			be.reset(b)
			be.serve(w, r)
		}))
		defer srv.Close()
		c, _, err := websocket.Dial(context.Background(), srv.URL, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close(websocket.StatusNormalClosure, "")
		c.SetReadLimit(readLimit)
		write := func(m []byte) {
			if err := c.Write(context.Background(), websocket.MessageBinary, m); err != nil {
				b.Fatal(err)
			}
		}
		write(encode(b, confirmMessage("any")))
		buf := make([]byte, 64<<10)
		read := func() {
			_, r, err := c.Reader(context.Background())
			for n := 0; err == nil; {
				var m int
				m, err = r.Read(buf[n:])
				n += m
			}
			if err != io.EOF {
				b.Fatal(err)
			}
		}
		read()
		write(appendAudio(nil, "id", true, nil, traceContext{}))
		b.SetBytes(frameSize)
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N + 1 {
			read()
		}
	})
}

// TestRelayedFrameAllocatesNothing counts what handling a frame allocates,
// without library and server.
func TestRelayedFrameAllocatesNothing(t *testing.T) {
	c := New(Options{})
	defer c.Close()
	s := &Session{c: c, delivering: make(chan struct{}, 1), born: time.Now()}
	u := s.newUtterance(Utterance{OnFrame: func(Frame) error { return nil }})
	s.cur = u
	msg := frame(t, u.reqID, false, strings.Repeat("x", 100))
	r := strings.NewReader("")
	per := testing.AllocsPerRun(1000, func() {
		r.Reset(string(msg[:0]))
		buf, n, err := c.bufs.readMessage(r, 2)
		if err != nil || n != 0 {
			t.Fatal(err)
		}
		if err := s.handle(msg); err != nil {
			t.Fatal(err)
		}
		c.bufs.put(buf)
	})
	if u.frames == 0 || per != 0 {
		t.Errorf("%d frames, %v allocations for each", u.frames, per)
	}
}

// BenchmarkIdleSession prints what an idle session holds, server included, and
// the same for a bare connection with a reader.
func BenchmarkIdleSession(b *testing.B) {
	const n = 500
	measure := func(b *testing.B, open func()) {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for range n {
			open()
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		used := after.HeapInuse + after.StackInuse - before.HeapInuse - before.StackInuse
		b.ReportMetric(float64(used)/n/1024, "KiB/session")
	}
	b.Run("session", func(b *testing.B) {
		for range b.N {
			c := overTCP(b, &backend{}, Options{})
			measure(b, func() { mustOpen(b, c, params()) })
			c.Close()
		}
	})
	b.Run("bare", func(b *testing.B) {
		for range b.N {
			be := &backend{}
			c := overTCP(b, be, Options{})
			var conns []*websocket.Conn
			measure(b, func() {
				conn, _, err := websocket.Dial(context.Background(), c.o.Endpoints.IngressURL+"/websocket", &websocket.DialOptions{HTTPClient: c.http})
				if err != nil {
					b.Fatal(err)
				}
				if err := conn.Write(context.Background(), websocket.MessageBinary, encode(b, confirmMessage("any"))); err != nil {
					b.Fatal(err)
				}
				if _, _, err := conn.Read(context.Background()); err != nil {
					b.Fatal(err)
				}
				go func() { _, _, _ = conn.Reader(context.Background()) }()
				conns = append(conns, conn)
			})
			for _, conn := range conns {
				if err := conn.Close(websocket.StatusNormalClosure, ""); err != nil {
					b.Fatal(fmt.Errorf("closing: %w", err))
				}
			}
		}
	})
}
