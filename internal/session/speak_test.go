package session

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

func TestUtterancesFollowOneAnotherInOneSession(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		if s.ConnectionID() != "cid-1" || s.Region() != DefaultRegion {
			t.Errorf("connection %q, region %q", s.ConnectionID(), s.Region())
		}
		ids := map[string]bool{}
		for range 3 {
			var frames []string
			spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(4, 10*time.Millisecond), OnFrame: func(f Frame) error {
				want := frame(t, f.ReqID, f.End, map[bool]string{false: "one", true: "two"}[f.End])
				if !bytes.Equal(f.Data, want) {
					t.Errorf("frame %x, want %x as the backend sent it", f.Data, want)
				}
				frames = append(frames, f.ReqID)
				return nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			if len(frames) != 2 || spoken.Frames != 2 || spoken.Audio != 40*time.Millisecond || spoken.Interrupted {
				t.Errorf("%v, spoken %+v", frames, spoken)
			}
			ids[spoken.ReqID] = true
		}
		if len(ids) != 3 {
			t.Errorf("three utterances share ids: %v", ids)
		}
		s.Close()
		wantClosed1000(t, b, 1)
	})
}

func TestSpeechIsSentWholeAndEndsOnce(t *testing.T) {
	for _, tc := range []struct {
		name   string
		speech Speech
		want   int // messages
	}{
		{"an empty end follows", speechOf(3, time.Second), 4},
		{"the end rides on the last chunk", &eofWithLast{speechOf(3, time.Second)}, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var all []*avatarpb.Message
			var audio []byte
			b := &backend{session: func(p *peer) {
				p.confirm()
				var id string
				id, audio, all = p.speech()
				p.sendRaw(frame(p.t, id, true, "x"))
			}}
			inMemory(t, b, Options{}, func(c *Client) {
				s := mustOpen(t, c, params())
				if _, err := s.Speak(context.Background(), Utterance{Speech: tc.speech, TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", TraceState: "k=v"}); err != nil {
					t.Fatal(err)
				}
			})
			if len(all) != tc.want || !bytes.Equal(audio, []byte{0, 0, 1, 0, 2, 0}) {
				t.Fatalf("%d messages with speech %x", len(all), audio)
			}
			for i, m := range all {
				in := m.GetClientAudioInput()
				if in.End != (i == len(all)-1) {
					t.Errorf("message %d has end=%v", i, in.End)
				}
				if (in.TraceContext != nil) != (i == 0) {
					t.Errorf("message %d has trace context %v", i, in.TraceContext)
				}
			}
			if tc := all[0].GetClientAudioInput().TraceContext; tc.Traceparent != "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" || tc.Tracestate != "k=v" {
				t.Errorf("trace context %v", tc)
			}
		})
	}
}

// eofWithLast gives io.EOF together with the last chunk.
type eofWithLast struct{ *chunks }

func (e *eofWithLast) Next(ctx context.Context) ([]byte, time.Duration, error) {
	data, length, err := e.chunks.Next(ctx)
	if err == nil && e.next == len(e.data) {
		_, _, err = e.chunks.Next(ctx)
	}
	return data, length, err
}

func TestSpeechWithoutChunksSendsNothing(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		if m := p.read(); m != nil {
			p.t.Errorf("the client sent %v", m)
		}
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		if spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(0, 0)}); err != nil || spoken != (Spoken{}) {
			t.Errorf("%+v, %v", spoken, err)
		}
	})
}

func TestRealtimePaceWaitsForEachChunkAndNotAfterTheLast(t *testing.T) {
	for pace, want := range map[Pace]time.Duration{PaceFast: 0, PaceRealtime: 400 * time.Millisecond} {
		inMemory(t, &backend{}, Options{Pace: pace}, func(c *Client) {
			s := mustOpen(t, c, params())
			spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(5, 100*time.Millisecond)})
			if err != nil || spoken.Duration != want || spoken.Audio != 500*time.Millisecond {
				t.Errorf("%s: %+v, %v; want duration %s", pace, spoken, err, want)
			}
		})
	}
}

func TestFirstFrameIsMeasuredFromTheFirstChunk(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		time.Sleep(300 * time.Millisecond)
		p.sendRaw(frame(p.t, id, false, "x"))
		time.Sleep(200 * time.Millisecond)
		p.sendRaw(frame(p.t, id, true, "x"))
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		time.Sleep(time.Hour) // an idle session lives
		spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, time.Second)})
		if err != nil || spoken.FirstFrame != 300*time.Millisecond || spoken.Duration != 500*time.Millisecond {
			t.Errorf("%+v, %v", spoken, err)
		}
		s.Close()
		if got := s.Connected(); got != time.Hour+500*time.Millisecond {
			t.Errorf("connected for %s", got)
		}
	})
}

func TestFramesOfOthersAndASecondEndAreDropped(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		for range 2 {
			id, _, _ := p.speech()
			p.sendRaw(frame(p.t, "20250101000000_notmine", true, "no"))
			_ = p.c.Write(context.Background(), websocket.MessageText, []byte("text is ignored"))
			p.sendRaw([]byte{8, 99}) // and so is an unknown type
			p.sendRaw(frame(p.t, id, false, "yes"))
			p.sendRaw(frame(p.t, id, true, "yes"))
			p.sendRaw(frame(p.t, id, true, "no"))
			p.sendRaw(frame(p.t, id, false, "no"))
		}
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		for range 2 {
			n := 0
			spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(f Frame) error {
				n++
				if !bytes.Contains(f.Data, []byte("yes")) {
					t.Errorf("frame %q was handed out", f.Data)
				}
				return nil
			}})
			if err != nil || n != 2 || spoken.Frames != 2 {
				t.Fatalf("%d frames, %+v, %v", n, spoken, err)
			}
		}
	})
}

// TestRuntimeFailures walks what the worker detects while speech is owed.
func TestRuntimeFailures(t *testing.T) {
	for _, tc := range []struct {
		name      string
		fail      func(p *peer, id string)
		code      errors.Code
		closeCode int
	}{
		{"normal close while speech is owed", func(p *peer, _ string) { p.c.Close(1000, "bye") }, errors.CodeConnectionClosed, 1000},
		{"going away while speech is owed", func(p *peer, _ string) { p.c.Close(1001, "") }, errors.CodeConnectionClosed, 1001},
		{"another close", func(p *peer, _ string) { p.c.Close(4503, "upstream") }, errors.CodeConnectionClosed, 4503},
		{"a cut without a close frame", func(p *peer, _ string) { p.c.CloseNow() }, errors.CodeConnectionClosed, 0},
		{"no frame at all", func(p *peer, _ string) { p.read() }, errors.CodeConnectionClosed, 0},
		{"no frame after the first", func(p *peer, id string) { p.sendRaw(frame(p.t, id, false, "x")); p.read() }, errors.CodeConnectionClosed, 0},
		{"binary that is not an envelope", func(p *peer, _ string) { p.sendRaw([]byte{0xff}); p.read() }, errors.CodeProtocolError, 0},
		{"an envelope cut short", func(p *peer, id string) { p.sendRaw(frame(p.t, id, true, "xyz")[:20]); p.read() }, errors.CodeProtocolError, 0},
		{"a message above the limit", func(p *peer, _ string) { p.sendRaw(make([]byte, readLimit+2)); p.read() }, errors.CodeProtocolError, 0},
		{"a server error", func(p *peer, _ string) { p.send(errorMessage(4001, "credits exhausted")); p.read() }, errors.CodeCreditsExhausted, 0},
		{"a server error before a close", func(p *peer, _ string) {
			p.send(errorMessage(4002, "duration exceeded"))
			p.c.Close(4002, "duration exceeded")
		}, errors.CodeSessionDurationExceeded, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &backend{session: func(p *peer) {
				p.confirm()
				id, _, _ := p.speech()
				tc.fail(p, id)
			}}
			inMemory(t, b, Options{}, func(c *Client) {
				s := mustOpen(t, c, params())
				start := time.Now()
				spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(2, time.Second)})
				e := wantError(t, err, tc.code, errors.PhaseRuntime)
				if e.ConnectionID != "cid-1" || e.ReqID == "" || e.ReqID != spoken.ReqID || e.Region != DefaultRegion || e.CloseCode != tc.closeCode {
					t.Errorf("error lacks what is known: %+v", e)
				}
				if took := time.Since(start); took > 31*time.Second {
					t.Errorf("noticed after %s", took)
				}
				if _, again := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); errors.Of(again).Code != tc.code {
					t.Errorf("a second utterance gives %v", again)
				}
			})
		})
	}
}

func TestCloseAfterTheEndIsNoFailure(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		p.sendRaw(frame(p.t, id, true, "x"))
		p.c.Close(1000, "")
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)})
		if e := wantError(t, err, errors.CodeConnectionClosed, errors.PhaseRuntime); e.CloseCode != 1000 {
			t.Errorf("close code %d", e.CloseCode)
		}
	})
}

func TestErrorsOfSourceAndHandlerComeBackAsTheyAre(t *testing.T) {
	boom := errors.New("boom")
	for name, u := range map[string]Utterance{
		"source":  {Speech: failingSpeech{boom}},
		"handler": {Speech: speechOf(1, 0), OnFrame: func(Frame) error { return boom }},
	} {
		b := &backend{}
		inMemory(t, b, Options{}, func(c *Client) {
			s := mustOpen(t, c, params())
			if _, err := s.Speak(context.Background(), u); !errors.Is(err, boom) {
				t.Errorf("%s: error %v", name, err)
			}
			wantClosed1000(t, b, 1)
		})
	}
}

type failingSpeech struct{ err error }

func (f failingSpeech) Next(context.Context) ([]byte, time.Duration, error) { return nil, 0, f.err }

func TestPanicInHandlerEndsOnlyItsSession(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		s, other := mustOpen(t, c, params()), mustOpen(t, c, params())
		_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error { panic("oops") }})
		wantError(t, err, errors.CodeInternal, errors.PhaseRuntime)
		if _, err := other.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err != nil {
			t.Errorf("the other session: %v", err)
		}
	})
}

func TestStallClockStopsWhileTheSourceIsSilent(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{StallTimeout: 5 * time.Second}, func(c *Client) {
		s := mustOpen(t, c, params())
		live := make(liveSpeech)
		go func() {
			live <- []byte{1, 2}
			time.Sleep(time.Minute)
			live <- []byte{3, 4}
			time.Sleep(time.Minute)
			close(live)
		}()
		if spoken, err := s.Speak(context.Background(), Utterance{Speech: live}); err != nil || spoken.Frames != 2 {
			t.Errorf("%+v, %v", spoken, err)
		}
	})
}

func TestStallIsSeenWhileLiveSpeechFlows(t *testing.T) {
	b := &backend{session: func(p *peer) { p.confirm(); p.speech() }}
	inMemory(t, b, Options{StallTimeout: 5 * time.Second}, func(c *Client) {
		s := mustOpen(t, c, params())
		live, stop := make(liveSpeech), make(chan struct{})
		var source sync.WaitGroup
		source.Go(func() {
			for {
				time.Sleep(100 * time.Millisecond)
				select {
				case live <- []byte{1, 2}:
				case <-stop:
					return
				}
			}
		})
		start := time.Now()
		_, err := s.Speak(context.Background(), Utterance{Speech: live})
		close(stop)
		source.Wait()
		wantError(t, err, errors.CodeConnectionClosed, errors.PhaseRuntime)
		if took := time.Since(start); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("noticed after %s", took)
		}
	})
}

func TestSlowHandlerIsNoStall(t *testing.T) {
	inMemory(t, &backend{}, Options{StallTimeout: time.Second}, func(c *Client) {
		s := mustOpen(t, c, params())
		_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error {
			time.Sleep(time.Minute)
			return nil
		}})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestEgressIsDoneAtEndOrWhenItWasPlayed(t *testing.T) {
	silent := func(p *peer) { p.confirm(); p.speech(); p.read() }
	ending := func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		time.Sleep(time.Second)
		p.sendRaw(frame(p.t, id, true, ""))
	}
	for _, tc := range []struct {
		name    string
		session func(*peer)
		want    time.Duration
	}{
		{"nothing comes back", silent, 40*time.Second + 5*time.Second},
		{"an end comes", ending, time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &backend{session: tc.session}
			inMemory(t, b, Options{}, func(c *Client) {
				p := params()
				p.LiveKit = &LiveKit{URL: "wss://lk", RoomName: "r", APIToken: "lk-token"}
				s := mustOpen(t, c, p)
				spoken, err := s.Speak(context.Background(), Utterance{Speech: speechOf(4, 10*time.Second)})
				if err != nil || spoken.Duration != tc.want || spoken.FirstFrame != 0 {
					t.Errorf("%+v, %v; want duration %s", spoken, err, tc.want)
				}
			})
		})
	}
}

func TestCancellationClosesWith1000WithinASecond(t *testing.T) {
	cause := errors.New("the drain is over")
	for name, tc := range map[string]struct {
		session func(*peer)
		speech  Speech
	}{
		"waiting for frames":  {nil, nil},
		"waiting for speech":  {nil, make(liveSpeech)},
		"a peer that is mute": {func(p *peer) { p.confirm(); p.speech(); time.Sleep(10 * time.Second); p.sawClose = 1000 }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := &backend{session: tc.session}
			if b.session == nil {
				b.session = func(p *peer) { p.confirm(); p.speech(); p.read() }
			}
			if tc.speech == nil {
				tc.speech = speechOf(3, 0)
			}
			inMemory(t, b, Options{}, func(c *Client) {
				speech := tc.speech
				if _, ok := speech.(liveSpeech); ok {
					speech = make(liveSpeech) // of this bubble
				}
				s := mustOpen(t, c, params())
				ctx, cancel := context.WithCancelCause(context.Background())
				time.AfterFunc(3*time.Second, func() { cancel(cause) })
				start := time.Now()
				_, err := s.Speak(ctx, Utterance{Speech: speech})
				if !errors.Is(err, cause) {
					t.Errorf("error %v", err)
				}
				if took := time.Since(start); took < 3*time.Second || took > 4*time.Second {
					t.Errorf("returned after %s", took)
				}
				wantClosed1000(t, b, 1)
			})
		})
	}
}

func TestOpensContextBoundsTheSession(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		ctx, cancel := context.WithCancelCause(context.Background())
		s, err := c.Open(ctx, params())
		if err != nil {
			t.Fatal(err)
		}
		cause := errors.New("lease lost")
		cancel(cause)
		wantClosed1000(t, b, 1)
		if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
	})
}

func TestCaptureIsRelayedByteForByte(t *testing.T) {
	path := os.Getenv("AVATAR_CAPTURE")
	if path == "" {
		t.Skip("AVATAR_CAPTURE names no capture")
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var capture struct {
		ReqID    string   `json:"req_id"`
		Audio    string   `json:"audio_base64"`
		Messages []string `json:"animation_messages_base64"`
	}
	if err := json.Unmarshal(raw, &capture); err != nil {
		t.Fatal(err)
	}
	decode := func(s string) []byte {
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var want [][]byte
	b := &backend{session: func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		for i, m := range capture.Messages {
			// The ids have the same length: nothing else changes.
			msg := bytes.Replace(decode(m), []byte(capture.ReqID), []byte(id), 1)
			want = append(want, msg)
			if e, err := decodeEnvelope(msg); err != nil || e.end != (i == len(capture.Messages)-1) {
				p.t.Errorf("frame %d: end %v, %v", i, e.end, err)
			}
			p.sendRaw(msg)
		}
	}}
	c := overTCP(t, b, Options{})
	s := mustOpen(t, c, params())
	var got [][]byte
	_, err = s.Speak(context.Background(), Utterance{
		Speech:  &chunks{data: [][]byte{decode(capture.Audio)}, length: 20 * time.Second},
		OnFrame: func(f Frame) error { got = append(got, bytes.Clone(f.Data)); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	wantClosed1000(t, b, 1)
	if len(got) != len(capture.Messages) {
		t.Fatalf("%d frames, want %d", len(got), len(capture.Messages))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			t.Errorf("frame %d differs", i)
		}
	}
}

// gapped is speech of two chunks, the second 10 s long, with a wait between them; or an
// error in place of the second.
type gapped struct {
	gap  time.Duration
	err  error
	sent int
}

func (g *gapped) Next(context.Context) ([]byte, time.Duration, error) {
	switch g.sent++; g.sent {
	case 1:
		return []byte{1, 0}, time.Second, nil
	case 2:
		time.Sleep(g.gap)
		return []byte{2, 0}, 10 * time.Second, g.err
	}
	return nil, 0, io.EOF
}

// endsInTheGap is a backend that says after the first chunk that it is done.
func endsInTheGap(p *peer) {
	p.confirm()
	p.sendRaw(frame(p.t, p.read().GetClientAudioInput().ReqId, true, "drained"))
	p.speech()
}

// In a room, it only means that playback has caught up.
func TestInARoomAnEndAmidSpeechDoesNotCutTheRestOff(t *testing.T) {
	b := &backend{session: endsInTheGap}
	inMemory(t, b, Options{}, func(c *Client) {
		p := params()
		p.LiveKit = &LiveKit{URL: "wss://x", RoomName: "r", PublisherID: "p", APIToken: "t"}
		s := mustOpen(t, c, p)
		defer s.Close()
		begun := time.Now()
		if _, err := s.Speak(context.Background(), Utterance{Speech: &gapped{gap: 3 * time.Second}}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < 13*time.Second {
			t.Errorf("over after %s: 10 s of speech were sent after 3 s", took)
		}
	})
}

// The sender may only get to run again after the answer to its last message was read.
func TestInARoomAnEndThatComesAsTheLastMessageIsWrittenIsNotMissed(t *testing.T) {
	for finishing, want := range map[bool]time.Duration{true: 2 * time.Second, false: time.Minute + 2*time.Second} {
		inMemory(t, &backend{session: func(p *peer) { p.confirm(); p.speech() }}, Options{EgressMargin: time.Minute}, func(c *Client) {
			p := params()
			p.LiveKit = &LiveKit{URL: "wss://x", RoomName: "r", PublisherID: "p", APIToken: "t"}
			s := mustOpen(t, c, p)
			defer s.Close()
			u := s.newUtterance(Utterance{})
			u.finishing.Store(finishing)
			if err := s.callOnFrame(u, envelope{end: true}, nil); err != nil {
				t.Fatal(err)
			}
			u.playedUntil = time.Now().Add(2 * time.Second)
			begun := time.Now()
			s.play(u)
			<-u.done
			if took := time.Since(begun); took != want {
				t.Errorf("finishing %t: over after %s, want %s", finishing, took, want)
			}
		})
	}
}

func TestSpeechThatFailsAfterTheBackendsEndIsAFailure(t *testing.T) {
	b := &backend{session: endsInTheGap}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		defer s.Close()
		want := errors.New("the source failed")
		if spoken, err := s.Speak(context.Background(), Utterance{Speech: &gapped{gap: 2 * time.Second, err: want}}); !errors.Is(err, want) {
			t.Errorf("spoken %+v, %v", spoken, err)
		}
	})
}
