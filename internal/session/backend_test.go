package session

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// backend is a scriptable one: each test sets what differs from a good one.
type backend struct {
	t         testing.TB
	token     http.HandlerFunc                              // nil: a new token
	upgrade   func(http.ResponseWriter, *http.Request) bool // true: refused
	session   func(p *peer)                                 // nil: confirm and answer each utterance
	bootstrap http.HandlerFunc
	dial      func(host string) error                   // an error: can't be reached
	opened    func(host string, conn net.Conn) net.Conn // what the client gets for a connection

	accept  *websocket.AcceptOptions
	release chan struct{} // a test's own

	minted   atomic.Int64
	upgrades atomic.Int64

	mu       sync.Mutex
	requests []*http.Request
	closes   []websocket.StatusCode // as the peers saw them
	peers    *sync.WaitGroup        // a bubble's own, as the next
	handlers *sync.WaitGroup
}

func (b *backend) reset(t testing.TB) {
	b.t, b.peers, b.handlers, b.closes, b.requests = t, new(sync.WaitGroup), new(sync.WaitGroup), nil, nil
	b.minted.Store(0)
	b.upgrades.Store(0)
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock() // so that who holds it knows of every handler
	b.handlers.Add(1)
	defer b.handlers.Done()
	b.requests = append(b.requests, r)
	b.mu.Unlock()
	switch r.URL.Path {
	case "/v1/console/session-tokens":
		n := b.minted.Add(1)
		if b.token != nil {
			b.token(w, r)
			return
		}
		fmt.Fprintf(w, `{"sessionToken":"token-%d"}`, n)
	case "/bootstrap":
		b.bootstrap(w, r)
	case "/v2/driveningress/websocket":
		b.upgrades.Add(1)
		if b.upgrade != nil && b.upgrade(w, r) {
			return
		}
		b.serve(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (b *backend) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.peers.Add(1)
	b.mu.Unlock()
	defer b.peers.Done()
	c, err := websocket.Accept(w, r, b.accept)
	if err != nil {
		b.t.Errorf("accept: %v", err)
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(32 << 20)
	p := &peer{b: b, t: b.t, c: c}
	if b.session != nil {
		b.session(p)
	} else {
		p.confirm()
		p.speakAll()
	}
	// See how the client closes.
	for p.sawClose == 0 {
		if _, _, err := c.Read(context.Background()); err != nil {
			p.sawClose = websocket.CloseStatus(err)
			break
		}
	}
	b.mu.Lock()
	b.closes = append(b.closes, p.sawClose)
	b.mu.Unlock()
}

func (b *backend) wait(wg *sync.WaitGroup) {
	b.mu.Lock()
	b.mu.Unlock() //nolint:staticcheck // empty: it orders the Adds before the Wait
	wg.Wait()
}

// seenCloses waits for all peers.
func (b *backend) seenCloses() []websocket.StatusCode {
	b.wait(b.peers)
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closes
}

// peer is the backend's side of one session.
type peer struct {
	b        *backend
	t        testing.TB
	c        *websocket.Conn
	config   *avatarpb.ClientConfigureSession
	sawClose websocket.StatusCode
}

// read gives the next message; nil when the client has closed.
func (p *peer) read() *avatarpb.Message {
	_, b, err := p.c.Read(context.Background())
	if err != nil {
		p.sawClose = orDefault(p.sawClose, websocket.CloseStatus(err))
		return nil
	}
	var m avatarpb.Message
	if err := proto.Unmarshal(b, &m); err != nil {
		p.t.Errorf("the client sent no envelope: %v", err)
	}
	return &m
}

func (p *peer) send(m *avatarpb.Message) { p.sendRaw(encode(p.t, m)) }

func (p *peer) sendRaw(b []byte) {
	// A client that has gone is seen by the next read.
	_ = p.c.Write(context.Background(), websocket.MessageBinary, b)
}

func (p *peer) confirm() {
	if m := p.read(); m != nil {
		p.config = m.GetClientConfigureSession()
	}
	p.send(confirmMessage("cid-1"))
}

// speech reads an utterance's messages to its end, or to an interrupt or the
// client's close.
func (p *peer) speech() (reqID string, audio []byte, all []*avatarpb.Message) {
	for {
		m := p.read()
		if m == nil {
			return reqID, audio, all
		}
		all = append(all, m)
		in := m.GetClientAudioInput()
		if in == nil {
			return reqID, audio, all
		}
		reqID, audio = in.ReqId, append(audio, in.Audio...)
		if in.End {
			return reqID, audio, all
		}
	}
}

// speakAll answers each utterance with two frames.
func (p *peer) speakAll() {
	for {
		id, _, _ := p.speech()
		if p.sawClose != 0 || id == "" {
			return
		}
		p.sendRaw(frame(p.t, id, false, "one"))
		p.sendRaw(frame(p.t, id, true, "two"))
	}
}

func encode(t testing.TB, m *avatarpb.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func confirmMessage(id string) *avatarpb.Message {
	return &avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_CONFIRM_SESSION,
		Data: &avatarpb.Message_ServerConfirmSession{ServerConfirmSession: &avatarpb.ServerConfirmSession{ConnectionId: id}},
	}
}

func errorMessage(code int32, text string) *avatarpb.Message {
	return &avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_ERROR,
		Data: &avatarpb.Message_ServerError{ServerError: &avatarpb.ServerError{ConnectionId: "cid-1", Code: code, Message: text}},
	}
}

// frame is an envelope with animation data in the field that the schema lacks.
func frame(t testing.TB, reqID string, end bool, data string) []byte {
	a := &avatarpb.ServerResponseAnimation{ConnectionId: "cid-1", ReqId: reqID, End: end}
	raw := append([]byte{0x22, byte(len(data))}, data...)
	a.ProtoReflect().SetUnknown(raw)
	return encode(t, &avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_RESPONSE_ANIMATION,
		Data: &avatarpb.Message_ServerResponseAnimation{ServerResponseAnimation: a},
	})
}

// memoryListener connects client and server within the process, so that
// synctest's clock rules both.
type memoryListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *memoryListener) Close() error   { return nil }
func (l *memoryListener) Addr() net.Addr { return &net.UnixAddr{Name: "memory"} }

// inMemory runs f in a bubble of its own time, with a client of b. The
// composed addresses all lead to b.
func inMemory(t *testing.T, b *backend, o Options, f func(c *Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b.reset(t)
		l := &memoryListener{conns: make(chan net.Conn), done: make(chan struct{})}
		srv := &http.Server{Handler: b}
		served := make(chan struct{})
		go func() { defer close(served); _ = srv.Serve(l) }()
		// What is composed is https; there is no TLS in memory.
		dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
			if b.dial != nil {
				if err := b.dial(addr); err != nil {
					return nil, err
				}
			}
			here, there := memoryPipe()
			select {
			case l.conns <- there:
				if b.opened != nil {
					return b.opened(addr, here), nil
				}
				return here, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		tr := &http.Transport{DialContext: dial, DialTLSContext: dial}
		o.HTTPClient = &http.Client{Transport: tr}
		if o.Endpoints == (Endpoints{}) {
			o.Endpoints = Endpoints{ConsoleURL: "http://backend/v1/console", IngressURL: "http://backend/v2/driveningress"}
		}
		c := New(o)
		f(c)
		if err := c.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
		tr.CloseIdleConnections()
		b.wait(b.handlers)
		close(l.done)
		srv.Close()
		<-served
	})
}

// overTCP is the same over real sockets.
func overTCP(t testing.TB, b *backend, o Options) *Client {
	t.Helper()
	b.reset(t)
	srv := httptest.NewServer(b)
	o.Endpoints = Endpoints{ConsoleURL: srv.URL + "/v1/console", IngressURL: srv.URL + "/v2/driveningress"}
	c := New(o)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
		srv.Close()
	})
	return c
}

func params() Params {
	return Params{
		AppID: "app-1", AvatarID: "avatar-1",
		APIKey: func() (string, error) { return "the-api-key", nil },
		Config: func(context.Context) (AudioConfig, error) { return AudioConfig{SampleRate: 16000}, nil },
	}
}

func mustOpen(t testing.TB, c *Client, p Params) *Session {
	t.Helper()
	s, err := c.Open(context.Background(), p)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

// chunks is speech at hand.
type chunks struct {
	data   [][]byte
	length time.Duration
	next   int
	asked  []time.Time
}

func speechOf(n int, length time.Duration) *chunks {
	c := &chunks{length: length}
	for i := range n {
		c.data = append(c.data, []byte{byte(i), 0})
	}
	return c
}

func (c *chunks) Next(context.Context) ([]byte, time.Duration, error) {
	c.asked = append(c.asked, time.Now())
	if c.next == len(c.data) {
		return nil, 0, io.EOF
	}
	c.next++
	return c.data[c.next-1], c.length, nil
}

// liveSpeech is a source that the test feeds; closing it is the end.
type liveSpeech chan []byte

func (l liveSpeech) Next(ctx context.Context) ([]byte, time.Duration, error) {
	select {
	case b, ok := <-l:
		if !ok {
			return nil, 0, io.EOF
		}
		return b, 100 * time.Millisecond, nil
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
}

func wantError(t testing.TB, err error, code errors.Code, phase errors.Phase) *errors.Error {
	t.Helper()
	var e *errors.Error
	if !errors.As(err, &e) {
		t.Fatalf("error is %v, want %s in %s", err, code, phase)
	}
	if e.Code != code || e.Phase != phase {
		t.Fatalf("error is %v, want %s in %s", e, code, phase)
	}
	return e
}

func wantClosed1000(t testing.TB, b *backend, n int) {
	t.Helper()
	closes := b.seenCloses()
	if len(closes) != n {
		t.Errorf("%d sessions were opened, want %d", len(closes), n)
	}
	for _, code := range closes {
		if code != websocket.StatusNormalClosure {
			t.Errorf("a session was closed with %d, want 1000", code)
		}
	}
}
