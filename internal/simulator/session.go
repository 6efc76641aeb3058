package simulator

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/session/avatarpb"
)

// session is one connection. Its reader is the goroutine of the HTTP request. A
// second one, the pump, runs only while there is something to send.
type session struct {
	srv       *Server
	id        string // connection id
	behaviour behaviour
	rec       *Session // guarded by sessionLog
	conn      *websocket.Conn
	net       net.Conn

	egress   bool
	newMeter func() meter

	cutAt atomic.Pointer[time.Time] // when cutConn closed the connection

	sending    sync.Mutex // held while an envelope is written and recorded
	mu         sync.Mutex
	queue      []*utterance // not fully answered, oldest first
	latest     *utterance
	pumping    bool
	done       bool        // nothing more is sent
	timer      *time.Timer // wakes the pump
	closeTimer *time.Timer // ends an unanswered close
	heartbeat  *time.Timer
	frames     int
	lastSent   time.Time
}

// serve handles the session from its first message on. It returns what ended the
// reading.
func (c *session) serve() error {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	cfg, refusal, err := c.readConfigure(ctx)
	cancel()
	if err != nil {
		return err
	}
	if c.behaviour.mute {
		return c.readOn(func([]byte) {})
	}
	if f := c.behaviour.fault; refusal == nil && f != nil && f.phase == phaseHandshake {
		refusal = f
	}
	if refusal == nil {
		refusal = c.configure(cfg)
	}
	if refusal != nil {
		c.srv.sessionLog.countRefused()
		c.fail(*refusal, "")
		return c.readOn(func([]byte) {})
	}
	confirm, err := encodeConfirm(c.id)
	if err != nil {
		return fmt.Errorf("encode the confirm: %w", err)
	}
	c.srv.sessionLog.confirmed(c.rec, c.srv.now())
	if err := c.write(confirm); err != nil {
		return err
	}
	if c.behaviour.hang {
		return c.readOn(func([]byte) {})
	}
	return c.readOn(c.handle)
}

// readConfigure reads the first message. The fault is the reply to one that does
// not configure the session.
func (c *session) readConfigure(ctx context.Context) (cfg *avatarpb.ClientConfigureSession, refusal *fault, err error) {
	err = c.read(ctx, func(typ websocket.MessageType, b []byte) {
		m, derr := decodeClient(b)
		switch {
		case typ != websocket.MessageBinary:
			refusal = refuse(0, "unexpected message type: text")
		case derr != nil:
			refusal = refuse(3, "failed to unmarshal initial message: "+derr.Error())
		case m.kind != avatarpb.MessageType_MESSAGE_TYPE_CLIENT_CONFIGURE_SESSION:
			refusal = refuse(0, "expected ClientConfigureSession message")
		case m.configure == nil:
			refusal = refuse(0, "ClientConfigureSession message is nil")
		default:
			cfg = m.configure
		}
	})
	return cfg, refusal, err
}

// refuse refuses the handshake with a ServerError.
func refuse(code int32, text string) *fault {
	return &fault{name: "refused", phase: phaseHandshake, serverCode: code, text: text}
}

// configure applies the client's settings, or returns why it can't
// (docs/protocol.md, sections 6 and 7).
func (c *session) configure(cfg *avatarpb.ClientConfigureSession) *fault {
	rate := int(cfg.GetSampleRate())
	format, rates := "pcm_s16le", []int{8000, 16000, 22050, 24000, 32000, 44100, 48000}
	switch cfg.GetAudioFormat() {
	case avatarpb.AudioFormat_AUDIO_FORMAT_PCM_S16LE:
		c.newMeter = func() meter { return &pcmMeter{rate: int64(rate)} }
	case avatarpb.AudioFormat_AUDIO_FORMAT_OGG_OPUS:
		format, rates = "ogg_opus", []int{8000, 12000, 16000, 24000, 48000}
		c.newMeter = func() meter { return &oggMeter{} }
	default:
		return refuse(3, fmt.Sprintf("audio_format %d is not known", cfg.GetAudioFormat()))
	}
	if !slices.Contains(rates, rate) {
		return refuse(0, fmt.Sprintf("unsupported sample rate: %d for %s", rate, format))
	}
	if f := c.configureEgress(cfg); f != nil {
		return f
	}
	c.srv.sessionLog.update(c.rec, func(rec *Session) {
		rec.SampleRate, rec.AudioFormat, rec.ExtraParams = rate, format, cfg.GetExtraParams()
	})
	return nil
}

func (c *session) configureEgress(cfg *avatarpb.ClientConfigureSession) *fault {
	var name, token string
	switch cfg.GetEgressType() {
	case avatarpb.EgressType_EGRESS_TYPE_WEBSOCKET:
		return nil
	case avatarpb.EgressType_EGRESS_TYPE_LIVEKIT:
		e := cfg.GetLivekitEgress()
		if e.GetUrl() == "" || e.GetRoomName() == "" {
			return refuse(3, "livekit_egress: url and room_name are required")
		}
		if e.GetApiToken() == "" && (e.GetApiKey() == "" || e.GetApiSecret() == "") {
			return refuse(3, "missing livekit credentials: provide api_token or both api_key and api_secret")
		}
		name, token = "livekit", e.GetApiToken()
	case avatarpb.EgressType_EGRESS_TYPE_AGORA:
		e := cfg.GetAgoraEgress()
		if e.GetChannelName() == "" {
			return refuse(3, "agora_egress: channel_name is required")
		}
		name, token = "agora", e.GetToken()
	default:
		return refuse(3, fmt.Sprintf("egress_type %d is not known", cfg.GetEgressType()))
	}
	if len(token) >= 3 && token[:3] == "bad" {
		return refuse(16, "could not connect to the "+name+" room: unauthorized: invalid token")
	}
	c.egress = true
	c.srv.sessionLog.update(c.rec, func(rec *Session) { rec.Egress = name })
	return nil
}

// readOn reads binary messages until the connection ends. Reading never stops,
// because it also handles pings, pongs and closes.
func (c *session) readOn(handle func([]byte)) error {
	for {
		err := c.read(context.Background(), func(typ websocket.MessageType, b []byte) {
			if typ == websocket.MessageBinary {
				handle(b)
			}
		})
		if err != nil {
			return err
		}
	}
}

// read passes one message to handle; its bytes are valid until handle returns.
func (c *session) read(ctx context.Context, handle func(websocket.MessageType, []byte)) error {
	typ, r, err := c.conn.Reader(ctx)
	if err != nil {
		return err
	}
	buf := c.srv.messages.get()
	defer c.srv.messages.put(buf)
	if _, err := buf.ReadFrom(r); err != nil {
		return err
	}
	handle(typ, buf.Bytes())
	return nil
}

// handle handles a message of a confirmed session. It ignores messages other than
// speech and interrupts.
func (c *session) handle(b []byte) {
	m, err := decodeClient(b)
	switch {
	case err != nil:
		c.writeError("", 3, "failed to unmarshal message: "+err.Error())
	case m.kind == avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT && m.audio != nil:
		c.addSpeech(m.audio)
	case m.kind == avatarpb.MessageType_MESSAGE_TYPE_CLIENT_INTERRUPT:
		c.interrupt(m.interrupt)
	}
}

// addSpeech takes a piece of speech.
func (c *session) addSpeech(a *clientAudio) {
	c.mu.Lock()
	u := c.latest
	fresh := c.begins(a)
	if fresh {
		if u != nil {
			// Its end was not sent, so its last piece is never made.
			u.abandoned = true
		}
		u = &utterance{reqID: a.reqID, meter: c.newMeter()}
		c.latest = u
		c.queue = append(c.queue, u)
	}
	if u.end || u.interrupted || c.done {
		u.end = u.end || a.end
		c.mu.Unlock()
		return
	}
	err := u.meter.write(a.audio)
	u.end = a.end
	u.interrupted = err != nil
	u.late = err != nil // a broken utterance is answered with the error only
	c.startPump()
	c.mu.Unlock()

	c.srv.sessionLog.update(c.rec, func(rec *Session) { rec.addSpeech(a, fresh) })
	if err != nil {
		c.writeError(a.reqID, 3, "invalid audio: "+err.Error())
	}
}

// begins reports whether a piece of speech is an utterance's first. The caller
// holds mu.
func (c *session) begins(a *clientAudio) bool {
	u := c.latest
	switch {
	case u == nil || u.reqID != a.reqID:
		return true
	case c.srv.replay != nil && !c.srv.opts.ReplayPatch:
		// The recorded answers have one req_id, so a client that knows it uses it
		// for every utterance.
		return u.end
	default:
		return false
	}
}

// addSpeech records a piece of speech in the session log.
func (rec *Session) addSpeech(a *clientAudio, fresh bool) {
	rec.AudioBytes += int64(len(a.audio))
	if a.end {
		rec.Utterances++
	}
	if fresh && len(rec.ReqIDs) < maxListed {
		rec.ReqIDs = append(rec.ReqIDs, a.reqID)
	}
	if a.traceParent != "" && len(rec.TraceParents) < maxListed {
		rec.TraceParents = append(rec.TraceParents, a.traceParent)
	}
}

// interrupt drops the rest of an utterance, except for one frame that was already
// on its way.
func (c *session) interrupt(reqID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range c.queue {
		if u.reqID == reqID {
			u.interrupted, u.end = true, true // no more speech comes
		}
	}
	c.startPump()
	c.srv.sessionLog.update(c.rec, func(rec *Session) { rec.Interrupts++ })
}

// answerPing reports whether a ping is answered.
func (c *session) answerPing(context.Context, []byte) bool {
	return !c.srv.opts.IgnorePings && !c.behaviour.deaf
}

// startHeartbeat pings the client at intervals, if the options say so.
func (c *session) startHeartbeat() {
	every := c.srv.opts.PingInterval
	if every <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heartbeat = time.AfterFunc(every, c.beat)
}

// beat pings once. The server counts the reader while the session is not done, so
// Stop waits for this goroutine.
func (c *session) beat() {
	c.mu.Lock()
	if c.done {
		c.mu.Unlock()
		return
	}
	c.srv.wg.Add(1)
	c.mu.Unlock()
	defer c.srv.wg.Done()

	ctx, cancel := context.WithTimeout(context.Background(), c.srv.opts.PingInterval)
	defer cancel()
	if err := c.conn.Ping(ctx); err != nil {
		c.cutConn()
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.done {
		c.heartbeat.Reset(c.srv.opts.PingInterval)
	}
}
