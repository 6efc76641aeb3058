package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/session"
	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/topology"
)

// speechBytes is 20 ms of PCM at 16 kHz: as little as possible, so that a run
// measures the frames and not the speech.
const speechBytes = 640

// bareReader is the least that can be a session: token, upgrade, configuration,
// one message of speech, and reading into a pooled buffer. It parses nothing.
type bareReader struct {
	p       params
	http    *http.Client
	buffers sync.Pool
	publish bool // each frame to the frames stream, as the worker does
	record  bool // each session's frames to one object, by the client's own Put

	nc    *nats.Conn
	js    jetstream.JetStream
	store jetstream.ObjectStore

	mu   sync.Mutex
	open []*websocket.Conn
	idle sync.WaitGroup
}

func (r *bareReader) start(ctx context.Context, p params) (answer, error) {
	r.p, r.http = p, session.NewHTTPClient()
	r.buffers.New = func() any { b := make([]byte, 64<<10); return &b }
	if !r.publish && !r.record {
		return answer{}, nil
	}
	var err error
	if r.nc, r.js, err = connect(p.NATS); err != nil {
		return answer{}, err
	}
	h, _, err := topology.Ensure(ctx, r.js, topology.Names{}, topology.DefaultSettings())
	r.store = h.Recordings
	return answer{}, err
}

func (r *bareReader) stop() {
	for _, c := range r.open {
		_ = c.CloseNow() // measured already
	}
	r.idle.Wait()
	if r.nc != nil {
		r.nc.Close()
	}
}

func (r *bareReader) do(ctx context.Context, c command) (answer, error) {
	switch c.Do {
	case "run":
		return together(c.N, func(i int) error { return r.speak(ctx, i, c.Frames) })
	case "open":
		return together(c.N, func(int) error { return r.openIdle(ctx) })
	default:
		return answer{}, fmt.Errorf("%s: not a command of a reader", c.Do)
	}
}

// together runs f n times at once and says how long all of it took.
func together(n int, f func(i int) error) (answer, error) {
	begun := time.Now()
	var (
		wg    sync.WaitGroup
		fault atomic.Pointer[error]
	)
	for i := range n {
		wg.Go(func() {
			if err := f(i); err != nil {
				fault.Store(&err)
			}
		})
	}
	wg.Wait()
	if err := fault.Load(); err != nil {
		return answer{}, *err
	}
	return answer{Elapsed: time.Since(begun)}, nil
}

func (r *bareReader) speak(ctx context.Context, i, frames int) error {
	c, err := r.connect(ctx)
	if err != nil {
		return err
	}
	speech, err := proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT,
		Data: &avatarpb.Message_ClientAudioInput{ClientAudioInput: &avatarpb.ClientAudioInput{
			ReqId: recordedRequest, End: true, Audio: make([]byte, speechBytes),
		}},
	})
	if err != nil {
		return err
	}
	if err := c.Write(ctx, websocket.MessageBinary, speech); err != nil {
		return err
	}
	forward, finish := r.forward, func(err error) error { return err }
	if r.record {
		forward, finish = r.recording(ctx, i)
	}
	for seq := 1; seq <= frames && err == nil; seq++ {
		err = r.read(c, func(b []byte) error { return forward(ctx, i, seq, seq == frames, b) })
	}
	if err := finish(err); err != nil {
		return err
	}
	return c.Close(websocket.StatusNormalClosure, "")
}

// connect is a session up to its confirm.
func (r *bareReader) connect(ctx context.Context) (*websocket.Conn, error) {
	token, err := r.token(ctx)
	if err != nil {
		return nil, err
	}
	header := http.Header{"X-App-ID": {"app"}, "X-Session-Key": {token}}
	c, _, err := websocket.Dial(ctx, r.p.Ingress+"/websocket?id=ok", &websocket.DialOptions{HTTPClient: r.http, HTTPHeader: header})
	if err != nil {
		return nil, err
	}
	c.SetReadLimit(16 << 20)
	configure, err := proto.Marshal(&avatarpb.Message{
		Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_CONFIGURE_SESSION,
		Data: &avatarpb.Message_ClientConfigureSession{ClientConfigureSession: &avatarpb.ClientConfigureSession{SampleRate: 16000}},
	})
	if err != nil {
		return nil, err
	}
	if err := c.Write(ctx, websocket.MessageBinary, configure); err != nil {
		return nil, err
	}
	return c, r.read(c, func([]byte) error { return nil })
}

func (r *bareReader) token(ctx context.Context) (string, error) {
	body := `{"expireAt":` + strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10) + `}`
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.p.Console+"/session-tokens", bytes.NewReader([]byte(body)))
	if err != nil {
		return "", err
	}
	req.Header.Set("X-Api-Key", "bench")
	resp, err := r.http.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	var got struct {
		SessionToken string `json:"sessionToken"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, resp.Body) // so that the connection is used again
	return got.SessionToken, err
}

// read reads one message into a pooled buffer.
func (r *bareReader) read(c *websocket.Conn, handle func([]byte) error) error {
	// Under a context that can't end, which costs the library nothing.
	_, in, err := c.Reader(context.Background())
	if err != nil {
		return err
	}
	buf, n := r.buffers.Get().(*[]byte), 0
	defer r.buffers.Put(buf)
	for err == nil && n < len(*buf) {
		var m int
		m, err = in.Read((*buf)[n:])
		n += m
	}
	if err != io.EOF { //nolint:errorlint // io.Reader promises io.EOF itself
		return fmt.Errorf("a message of more than %d bytes, or %w", len(*buf), err)
	}
	return handle((*buf)[:n])
}

// forward publishes a frame in the same way as the worker, where it is to.
func (r *bareReader) forward(ctx context.Context, i, seq int, end bool, b []byte) error {
	if !r.publish {
		return nil
	}
	id, number := "bare"+strconv.Itoa(i), strconv.Itoa(seq)
	h := nats.Header{
		"Avatar-Run": {"1"}, "Avatar-Session": {"1"}, "Avatar-Attempt": {"1"}, "Avatar-Utterance": {"1"},
		"Avatar-Req-Id": {recordedRequest}, "Avatar-Seq": {number},
		jetstream.MsgIDHeader: {id + ".run1.s1.frame" + number},
	}
	if end {
		h["Avatar-End"] = []string{"true"}
	}
	_, err := r.js.PublishMsg(ctx, &nats.Msg{Subject: topology.Names{}.Frames(id), Header: h, Data: b})
	return err
}

// recording puts a session's frames into one object while they come.
func (r *bareReader) recording(ctx context.Context, i int) (forward func(context.Context, int, int, bool, []byte) error, finish func(error) error) {
	in, out := io.Pipe()
	put := make(chan error, 1)
	go func() { // finish waits for it
		_, err := r.store.Put(ctx, jetstream.ObjectMeta{Name: "bare" + strconv.Itoa(i)}, filled{in})
		_ = in.CloseWithError(err) // so that no write waits for a reader that is gone
		put <- err
	}()
	forward = func(_ context.Context, _, _ int, _ bool, b []byte) error {
		_, err := out.Write(b)
		return err
	}
	return forward, func(err error) error {
		_ = out.CloseWithError(err) // it returns nil
		return errors.Join(err, <-put)
	}
}

// filled reads as much as there is room for: Put makes a chunk of each read.
type filled struct{ r io.Reader }

func (f filled) Read(b []byte) (int, error) {
	n, err := io.ReadFull(f.r, b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

func (r *bareReader) openIdle(ctx context.Context) error {
	c, err := r.connect(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.open = append(r.open, c)
	r.mu.Unlock()
	r.idle.Go(func() {
		_, _, _ = c.Reader(context.Background()) // until it is closed: an idle session is being read
	})
	return nil
}
