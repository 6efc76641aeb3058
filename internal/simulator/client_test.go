package simulator_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/simulator"
)

const app = "app-1"

// start runs a simulator until the test ends.
func start(t *testing.T, opts simulator.Options) *simulator.Server {
	t.Helper()
	opts.Addr = "127.0.0.1:0"
	s := simulator.New(opts)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

// answer is an HTTP answer that was read.
type answer struct {
	status int
	body   string
	header http.Header
}

func post(t *testing.T, url, key, body string) (answer, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("X-Api-Key", key)
	}
	return do(t, req)
}

func do(t *testing.T, req *http.Request) (answer, error) {
	t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	return answer{status: resp.StatusCode, body: string(body), header: resp.Header}, nil
}

func tokenBody(life time.Duration) string {
	return fmt.Sprintf(`{"expireAt":%d,"modelVersion":"x"}`, time.Now().Add(life).Unix())
}

func token(t *testing.T, s *simulator.Server) string {
	t.Helper()
	a, err := post(t, s.ConsoleURL()+"/session-tokens", "key", tokenBody(time.Hour))
	if err != nil || a.status != http.StatusOK {
		t.Fatalf("token call: %d %s %v", a.status, a.body, err)
	}
	var out struct {
		SessionToken string `json:"sessionToken"`
	}
	if err := json.Unmarshal([]byte(a.body), &out); err != nil || out.SessionToken == "" {
		t.Fatalf("token call answered %q: %v", a.body, err)
	}
	return out.SessionToken
}

// client is a session as a bare client has it.
type client struct {
	t    *testing.T
	ctx  context.Context
	conn *websocket.Conn
}

// dial opens a session, or returns the answer that refused it.
func dial(t *testing.T, s *simulator.Server, avatar string) (*client, *answer, error) {
	t.Helper()
	return dialAs(t, s, avatar, app, token(t, s))
}

func dialAs(t *testing.T, s *simulator.Server, avatar, appID, tok string) (*client, *answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	conn, resp, err := websocket.Dial(ctx, s.IngressURL()+"/websocket?id="+avatar, &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: transport},
		HTTPHeader: http.Header{"X-App-Id": {appID}, "X-Session-Key": {tok}},
	})
	if err != nil {
		if resp == nil {
			return nil, nil, err
		}
		body, rerr := io.ReadAll(resp.Body)
		if rerr != nil {
			t.Fatal(rerr)
		}
		return nil, &answer{status: resp.StatusCode, body: string(body), header: resp.Header}, err
	}
	conn.SetReadLimit(1 << 20)
	t.Cleanup(func() {
		// Most tests have closed it already.
		_ = conn.CloseNow()
	})
	return &client{t: t, ctx: ctx, conn: conn}, nil, nil
}

// open opens a session and has it confirmed.
func open(t *testing.T, s *simulator.Server, avatar string) *client {
	t.Helper()
	return openWith(t, s, avatar, &avatarpb.ClientConfigureSession{SampleRate: 16000})
}

func openWith(t *testing.T, s *simulator.Server, avatar string, cfg *avatarpb.ClientConfigureSession) *client {
	t.Helper()
	c, a, err := dial(t, s, avatar)
	if err != nil {
		t.Fatalf("dial %s: %v %+v", avatar, err, a)
	}
	c.configure(cfg)
	m, _ := c.receive()
	if m.GetServerConfirmSession().GetConnectionId() == "" {
		t.Fatalf("no confirm for %s but %v", avatar, m)
	}
	return c
}

func (c *client) send(m *avatarpb.Message) {
	c.t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.conn.Write(c.ctx, websocket.MessageBinary, b); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *client) configure(cfg *avatarpb.ClientConfigureSession) {
	c.t.Helper()
	c.send(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_CONFIGURE_SESSION,
		Data: &avatarpb.Message_ClientConfigureSession{ClientConfigureSession: cfg},
	})
}

func (c *client) say(req string, audio []byte, end bool) {
	c.t.Helper()
	c.send(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT,
		Data: &avatarpb.Message_ClientAudioInput{ClientAudioInput: &avatarpb.ClientAudioInput{
			ReqId: req, Audio: audio, End: end,
			TraceContext: &avatarpb.TraceContext{Traceparent: "00-" + req},
		}},
	})
}

func (c *client) interrupt(req string) {
	c.t.Helper()
	c.send(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_INTERRUPT,
		Data: &avatarpb.Message_ClientInterrupt{ClientInterrupt: &avatarpb.ClientInterrupt{ReqId: req}},
	})
}

// receive reads one envelope.
func (c *client) receive() (*avatarpb.Message, []byte) {
	c.t.Helper()
	m, b, err := c.tryReceive()
	if err != nil {
		c.t.Fatalf("receive: %v", err)
	}
	return m, b
}

func (c *client) tryReceive() (*avatarpb.Message, []byte, error) {
	_, b, err := c.conn.Read(c.ctx)
	if err != nil {
		return nil, nil, err
	}
	var m avatarpb.Message
	if err := proto.Unmarshal(b, &m); err != nil {
		return nil, b, nil
	}
	return &m, b, nil
}

// answerTo reads the frames of an utterance until its end.
func (c *client) answerTo(req string) [][]byte {
	c.t.Helper()
	var frames [][]byte
	for {
		m, b := c.receive()
		a := m.GetServerResponseAnimation()
		if a.GetReqId() != req {
			c.t.Fatalf("answer to %s: %v", req, m)
		}
		frames = append(frames, b)
		if a.GetEnd() {
			return frames
		}
	}
}

func (c *client) close() {
	c.t.Helper()
	if err := c.conn.Close(websocket.StatusNormalClosure, ""); err != nil {
		c.t.Fatalf("close: %v", err)
	}
}

// keyFrames counts the key frames of an envelope and checks their shape.
func keyFrames(t *testing.T, envelope []byte) int {
	t.Helper()
	anim := field(t, envelope, 6)
	data := field(t, anim, 4)
	n := 0
	for len(data) > 0 {
		num, typ, size := protowire.ConsumeTag(data)
		if num != 1 || typ != protowire.BytesType {
			t.Fatalf("animation data has field %d of type %d", num, typ)
		}
		value, vsize := protowire.ConsumeBytes(data[size:])
		if len(value) != 495 {
			t.Fatalf("key frame of %d bytes", len(value))
		}
		data = data[size+vsize:]
		n++
	}
	return n
}

// field finds a bytes field; nil if it is absent.
func field(t *testing.T, b []byte, want protowire.Number) []byte {
	t.Helper()
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		size := protowire.ConsumeFieldValue(num, typ, b[max(n, 0):])
		if n < 0 || size < 0 {
			t.Fatal("envelope does not decode")
		}
		if num == want && typ == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(b[n:])
			return value
		}
		b = b[n+size:]
	}
	return nil
}

// pcm is silence of so many milliseconds.
func pcm(rate, ms int) []byte { return make([]byte, rate*ms/1000*2) }

// settled waits until the backend has at most n sessions open.
func settled(t *testing.T, s *simulator.Server, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.WaitOpen(ctx, n); err != nil {
		t.Fatal(err)
	}
}

// closed waits until no session is open, and returns the backend's session log.
func closed(t *testing.T, s *simulator.Server) []simulator.Session {
	t.Helper()
	settled(t, s, 0)
	return s.SessionLog()
}

func sizes(frames [][]byte) []int {
	var out []int
	for _, f := range frames {
		out = append(out, len(f))
	}
	return out
}

func sameBytes(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
