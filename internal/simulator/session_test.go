package simulator_test

import (
	"encoding/binary"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/session/avatarpb"
	"avatarworker/internal/simulator"
)

const reqID = "20260101000000_abcdefghijkl"

func TestSpeechIsAnsweredInTheShapeOfTheRealBackend(t *testing.T) {
	s := start(t, simulator.Options{})
	for _, rate := range []int{8000, 16000, 22050, 24000, 32000, 44100, 48000} {
		c := openWith(t, s, "ok", &avatarpb.ClientConfigureSession{SampleRate: int32(rate)})
		c.say(reqID, pcm(rate, 20300), true)
		frames := c.answerTo(reqID)
		// As captured: docs/protocol.md, section 4.
		if want := []int{24968, 49868, 49868, 49868, 49868, 28456}; !slices.Equal(sizes(frames), want) {
			t.Errorf("%d Hz: envelopes of %v bytes, not %v", rate, sizes(frames), want)
		}
		var counts []int
		for _, f := range frames {
			counts = append(counts, keyFrames(t, f))
		}
		if want := []int{50, 100, 100, 100, 100, 57}; !slices.Equal(counts, want) {
			t.Errorf("%d Hz: key frames %v, not %v", rate, counts, want)
		}
		c.close()
	}
}

func TestTheCutOfSpeechIntoMessagesChangesNothing(t *testing.T) {
	s := start(t, simulator.Options{})
	for _, ms := range []int{0, 10, 40, 1000, 2000, 2040, 6000, 6020, 10000, 13370} {
		var first []int
		for _, chunk := range []int{1 << 30, 40, 100, 2000, 6000} {
			c := open(t, s, "ok")
			speech := pcm(16000, ms)
			for piece := range slices.Chunk(speech, min(chunk*32, 1<<20)) {
				c.say(reqID, piece, false)
			}
			c.say(reqID, nil, true)
			got := sizes(c.answerTo(reqID))
			if first == nil {
				first = got
			}
			if !slices.Equal(got, first) {
				t.Errorf("%d ms in chunks of %d ms: %v, whole: %v", ms, chunk, got, first)
			}
			c.close()
		}
	}
}

func TestFramesComeWhileSpeechIsStillComing(t *testing.T) {
	s := start(t, simulator.Options{})
	c := open(t, s, "ok")
	c.say(reqID, pcm(16000, 2100), false)
	m, b := c.receive()
	if m.GetServerResponseAnimation().GetEnd() || keyFrames(t, b) != 50 {
		t.Fatalf("first frame: end %v, %d key frames", m.GetServerResponseAnimation().GetEnd(), keyFrames(t, b))
	}
	c.say(reqID, pcm(16000, 400), true)
	m, b = c.receive()
	if !m.GetServerResponseAnimation().GetEnd() || keyFrames(t, b) != 12 {
		t.Fatalf("last frame: end %v, %d key frames", m.GetServerResponseAnimation().GetEnd(), keyFrames(t, b))
	}
}

func TestSpeedPacesTheFramesAsTheyPlay(t *testing.T) {
	s := start(t, simulator.Options{Speed: 4})
	c := open(t, s, "ok")
	began := time.Now()
	c.say(reqID, pcm(16000, 20000), true)
	c.receive()
	first := time.Since(began)
	c.answerTo(reqID)
	// The last envelope begins at 18 s of motion: 4.5 s at four times the speed, 18 s without it.
	if all := time.Since(began); first > all/2 || all < 4400*time.Millisecond || all > 15*time.Second {
		t.Errorf("first frame after %s, last after %s", first, all)
	}
}

func TestUtterancesAreAnsweredInOrder(t *testing.T) {
	s := start(t, simulator.Options{})
	c := open(t, s, "ok")
	ids := []string{"a", "b", "c"}
	for _, id := range ids {
		c.say(id, pcm(16000, 3000), true)
	}
	for _, id := range ids {
		c.answerTo(id)
	}
	c.close()
	rec := closed(t, s)[0]
	if rec.Utterances != 3 || rec.Frames != 6 || rec.Ends != 3 || !slices.Equal(rec.ReqIDs, ids) {
		t.Errorf("the session log says %+v", rec)
	}
	if want := []string{"00-a", "00-b", "00-c"}; !slices.Equal(rec.TraceParents, want) {
		t.Errorf("trace parents %v", rec.TraceParents)
	}
	if rec.CloseCode != 1000 || rec.ClosedBy != "client" || rec.Confirmed.IsZero() || rec.Closed.IsZero() {
		t.Errorf("the session log says %+v", rec)
	}
}

func TestInterruptDiscardsTheRestButForOneLateFrame(t *testing.T) {
	s := start(t, simulator.Options{Speed: 1})
	c := open(t, s, "ok")
	c.say("a", pcm(16000, 60000), true)
	c.receive() // the next one is 2 s away
	c.interrupt("a")
	c.say("b", pcm(16000, 1000), true)
	m, _ := c.receive()
	if a := m.GetServerResponseAnimation(); a.GetReqId() != "a" || a.GetEnd() {
		t.Fatalf("after the interrupt came %v", m)
	}
	c.answerTo("b")
	c.interrupt("a") // long gone: nothing happens
	c.say("c", pcm(16000, 1000), true)
	c.answerTo("c")
}

func TestOggOpusIsMeasuredByItsGranules(t *testing.T) {
	s := start(t, simulator.Options{})
	stream := opus(7)
	for _, chunk := range []int{1, 13, 4096} {
		c := openWith(t, s, "ok", &avatarpb.ClientConfigureSession{
			SampleRate: 24000, AudioFormat: avatarpb.AudioFormat_AUDIO_FORMAT_OGG_OPUS,
		})
		for piece := range slices.Chunk(stream, chunk) {
			c.say(reqID, piece, false)
		}
		c.say(reqID, nil, true)
		total := 0
		for _, f := range c.answerTo(reqID) {
			total += keyFrames(t, f)
		}
		if total != 7*25 {
			t.Errorf("in chunks of %d bytes: %d key frames for 7 s", chunk, total)
		}
		c.close()
	}
}

func TestBrokenOggIsAnsweredWithAServerError(t *testing.T) {
	s := start(t, simulator.Options{})
	c := openWith(t, s, "ok", &avatarpb.ClientConfigureSession{
		SampleRate: 24000, AudioFormat: avatarpb.AudioFormat_AUDIO_FORMAT_OGG_OPUS,
	})
	c.say(reqID, []byte("no Ogg at all"), true)
	m, _ := c.receive()
	if e := m.GetServerError(); e.GetCode() != 3 || e.GetReqId() != reqID {
		t.Fatalf("answered %v", m)
	}
}

// opus is an Ogg Opus stream of so many seconds, a page a second.
func opus(seconds int) []byte {
	page := func(granule int64, body []byte) []byte {
		b := []byte("OggS\x00\x00")
		b = binary.LittleEndian.AppendUint64(b, uint64(granule))
		b = append(b, make([]byte, 12)...)
		return append(append(b, 1, byte(len(body))), body...)
	}
	head := append([]byte("OpusHead\x01\x01"), 0x38, 0x01, 0, 0, 0, 0, 0, 0, 0)
	out := append(page(0, head), page(0, []byte("OpusTags"))...)
	for i := range seconds {
		out = append(out, page(312+int64(i+1)*48000, make([]byte, 200))...)
	}
	return out
}

func TestConfigurationsTheBackendRefuses(t *testing.T) {
	livekit := func(token string) *avatarpb.ClientConfigureSession {
		return &avatarpb.ClientConfigureSession{
			SampleRate: 16000, EgressType: avatarpb.EgressType_EGRESS_TYPE_LIVEKIT,
			LivekitEgress: &avatarpb.LiveKitEgress{Url: "wss://x", RoomName: "r", ApiToken: token},
		}
	}
	tests := map[string]struct {
		cfg  *avatarpb.ClientConfigureSession
		code int32
		text string
	}{
		"a PCM rate": {&avatarpb.ClientConfigureSession{SampleRate: 11025}, 0, "unsupported sample rate"},
		"an Opus rate": {&avatarpb.ClientConfigureSession{SampleRate: 44100,
			AudioFormat: avatarpb.AudioFormat_AUDIO_FORMAT_OGG_OPUS}, 0, "unsupported sample rate"},
		"a bad LiveKit token": {livekit("bad-token"), 16, "unauthorized"},
		"no LiveKit token":    {livekit(""), 3, "missing livekit credentials"},
		"no Agora channel": {&avatarpb.ClientConfigureSession{SampleRate: 16000,
			EgressType: avatarpb.EgressType_EGRESS_TYPE_AGORA}, 3, "agora_egress"},
	}
	s := start(t, simulator.Options{})
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c, _, err := dial(t, s, "ok")
			if err != nil {
				t.Fatal(err)
			}
			c.configure(tc.cfg)
			m, _ := c.receive()
			if e := m.GetServerError(); e == nil || e.GetCode() != tc.code || !strings.Contains(e.GetMessage(), tc.text) {
				t.Errorf("answered %v", m)
			}
			if _, _, err := c.tryReceive(); websocket.CloseStatus(err) != 1011 {
				t.Errorf("then %v", err)
			}
		})
	}
}

func TestEgressSendsNothingUnlessAskedTo(t *testing.T) {
	cfg := &avatarpb.ClientConfigureSession{
		SampleRate: 16000, EgressType: avatarpb.EgressType_EGRESS_TYPE_AGORA,
		AgoraEgress: &avatarpb.AgoraEgress{ChannelName: "c", Token: "t"},
	}
	s := start(t, simulator.Options{})
	c := openWith(t, s, "ok", cfg)
	c.say(reqID, pcm(16000, 5000), true)
	c.close()
	if rec := closed(t, s)[0]; rec.Frames != 0 || rec.Utterances != 1 || rec.Egress != "agora" {
		t.Errorf("the session log says %+v", rec)
	}

	c = openWith(t, s, "egress-end-1", cfg)
	c.say(reqID, pcm(16000, 5000), true)
	frames := c.answerTo(reqID)
	if len(frames) != 2 || keyFrames(t, frames[0])+keyFrames(t, frames[1]) != 0 {
		t.Errorf("egress-end sent %v bytes", sizes(frames))
	}
}

func TestExtraParamsAreInTheSessionLog(t *testing.T) {
	s := start(t, simulator.Options{})
	openWith(t, s, "ok", &avatarpb.ClientConfigureSession{
		SampleRate: 16000, ExtraParams: map[string]string{"server_post_process": "false"},
	})
	if got := s.SessionLog()[0].ExtraParams["server_post_process"]; got != "false" {
		t.Errorf("extra_params in the session log: %q", got)
	}
}

func TestQueryAuthenticationWorksAsHeaders(t *testing.T) {
	s := start(t, simulator.Options{})
	c, _, err := websocket.Dial(t.Context(),
		s.IngressURL()+"/websocket?id=ok&appId=query-app&sessionKey="+token(t, s), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if got := s.SessionLog()[0].AppID; got != "query-app" {
		t.Errorf("app id %q", got)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestPingsAreAnsweredUnlessTheClientIsToMissThem(t *testing.T) {
	s := start(t, simulator.Options{})
	for avatar, want := range map[string]bool{"ok": true, "hang": true, "deaf": false} {
		c := open(t, s, avatar)
		reading := c.conn.CloseRead(c.ctx)
		ctx, cancel := contextWithin(t, 300*time.Millisecond)
		if err := c.conn.Ping(ctx); (err == nil) != want {
			t.Errorf("%s: ping: %v", avatar, err)
		}
		cancel()
		// Closed at once: an unanswered ping leaves nothing to wait for.
		_ = c.conn.CloseNow()
		<-reading.Done()
	}
}

func TestHeartbeatDropsAClientThatDoesNotAnswer(t *testing.T) {
	s := start(t, simulator.Options{PingInterval: 30 * time.Millisecond})
	open(t, s, "ok") // without a reader, pings are not answered
	if rec := closed(t, s)[0]; rec.CloseCode != 1006 {
		t.Errorf("the session log says %+v", rec)
	}
}
