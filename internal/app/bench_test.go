package app_test

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/config"
	"avatarworker/internal/session/avatarpb"
)

// BenchmarkLiveFirstFrame measures the time from the publish of an utterance's
// first chunk to its first frame at a subscriber: through the worker, and
// through a bare relay (subscribe, WebSocket, publish) that keeps nothing and
// checks nothing, turn by turn against the same NATS and the same backend.
func BenchmarkLiveFirstFrame(b *testing.B) {
	f := newFleet(b, nil)
	f.worker(worker{log: io.Discard, config: func(c *config.Config) { c.Worker.Concurrency = 2 }})
	f.publish("bench", "ok", live("60s"))
	relay := f.relay()
	defer relay()

	through := map[string]*path{
		"worker": f.path(f.names.Audio("bench"), f.names.Frames("bench")),
		"bare":   f.path("bare.audio", "bare.frames"),
	}
	chunk := silence(100 * time.Millisecond)
	for _, p := range through {
		for range 20 { // until everything is warm
			p.turn(chunk)
		}
		p.took = nil
	}
	b.ResetTimer()
	for range b.N {
		through["worker"].turn(chunk)
		through["bare"].turn(chunk)
	}
	b.StopTimer()
	for name, p := range through {
		slices.Sort(p.took)
		at := func(q float64) time.Duration { return p.took[int(q*float64(len(p.took)-1))] }
		b.ReportMetric(float64(at(0.5).Microseconds()), name+"-p50-µs")
		b.ReportMetric(float64(at(0.99).Microseconds()), name+"-p99-µs")
		b.Logf("%s: median %s, p99 %s of %d", name, at(0.5), at(0.99), len(p.took))
	}
	f.say("bench", nil, closing)
	f.completed("bench")
}

// path is one way from a publisher of speech to a subscriber of frames.
type path struct {
	f     *fleet
	audio string
	got   chan *nats.Msg
	took  []time.Duration
}

func (f *fleet) path(audio, frames string) *path {
	f.t.Helper()
	p := &path{f: f, audio: audio, got: make(chan *nats.Msg, 16)}
	sub, err := f.nc.ChanSubscribe(frames, p.got)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := sub.Unsubscribe(); err != nil {
			f.t.Error(err)
		}
	})
	if err := f.nc.Flush(); err != nil {
		f.t.Fatal(err)
	}
	return p
}

// turn speaks one utterance of one chunk.
func (p *path) turn(chunk []byte) {
	p.f.t.Helper()
	began := time.Now()
	if err := p.f.nc.PublishMsg(&nats.Msg{Subject: p.audio, Header: nats.Header{"Avatar-End": {"true"}}, Data: chunk}); err != nil {
		p.f.t.Fatal(err)
	}
	select {
	case <-p.got:
		p.took = append(p.took, time.Since(began))
	case <-time.After(patience):
		p.f.t.Fatalf("no frame for the speech on %s", p.audio)
	}
}

// relay runs a bare one; the function returned stops it.
func (f *fleet) relay() func() {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, f.backend.ConsoleURL()+"/session-tokens",
		strings.NewReader(`{"expireAt":`+strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10)+`}`))
	if err != nil {
		f.t.Fatal(err)
	}
	req.Header.Set("X-Api-Key", "k")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		f.t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
	token := strings.Split(string(body), `"`)[3]
	c, _, err := websocket.Dial(ctx, f.backend.IngressURL()+"/websocket?id=ok", &websocket.DialOptions{
		HTTPHeader: http.Header{"X-App-Id": {"bare"}, "X-Session-Key": {token}},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	c.SetReadLimit(1 << 20)
	send := func(m *avatarpb.Message) {
		data, err := proto.Marshal(m)
		if err == nil {
			err = c.Write(ctx, websocket.MessageBinary, data)
		}
		if err != nil {
			f.t.Error(err)
		}
	}
	send(&avatarpb.Message{Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_CONFIGURE_SESSION, Data: &avatarpb.Message_ClientConfigureSession{
		ClientConfigureSession: &avatarpb.ClientConfigureSession{SampleRate: 16000},
	}})
	if _, _, err := c.Read(ctx); err != nil {
		f.t.Fatal(err)
	}
	n := 0
	sub, err := f.nc.Subscribe("bare.audio", func(m *nats.Msg) {
		n++
		send(&avatarpb.Message{Type: avatarpb.MessageType_MESSAGE_TYPE_CLIENT_AUDIO_INPUT, Data: &avatarpb.Message_ClientAudioInput{
			ClientAudioInput: &avatarpb.ClientAudioInput{ReqId: "req-" + strconv.Itoa(n), End: true, Audio: m.Data},
		}})
	})
	if err != nil {
		f.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			_, data, err := c.Read(ctx)
			if err != nil {
				return // stopped
			}
			if err := f.nc.Publish("bare.frames", data); err != nil {
				f.t.Error(err)
			}
		}
	}()
	return func() {
		if err := sub.Unsubscribe(); err != nil {
			f.t.Error(err)
		}
		cancel()
		<-done
	}
}
