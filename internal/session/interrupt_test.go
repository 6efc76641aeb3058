package session

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

func TestInterruptStopsTheUtteranceAndDropsItsLateFrames(t *testing.T) {
	var interrupted string
	b := &backend{session: func(p *peer) {
		p.confirm()
		first := p.read().GetClientAudioInput().ReqId
		p.sendRaw(frame(p.t, first, false, "early"))
		m := p.read()
		for m != nil && m.Type != avatarpb.MessageType_MESSAGE_TYPE_CLIENT_INTERRUPT {
			m = p.read()
		}
		interrupted = m.GetClientInterrupt().GetReqId()
		p.sendRaw(frame(p.t, first, false, "late"))
		p.sendRaw(frame(p.t, first, true, "late"))
		p.speakAll()
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		if _, err := s.Interrupt(context.Background()); !errors.Is(err, ErrNoUtterance) {
			t.Errorf("without an utterance: %v", err)
		}
		live := make(liveSpeech, 1)
		live <- []byte{1, 2}
		frames := 0
		type result struct {
			spoken Spoken
			err    error
		}
		got := make(chan result, 1)
		go func() {
			spoken, err := s.Speak(context.Background(), Utterance{Speech: live, OnFrame: func(Frame) error { frames++; return nil }})
			got <- result{spoken, err}
		}()
		synctest.Wait()
		start := time.Now()
		id, err := s.Interrupt(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		r := <-got
		if r.err != nil || !r.spoken.Interrupted || r.spoken.ReqID != id || r.spoken.Frames != 1 || time.Since(start) != 0 {
			t.Errorf("%+v, %v after %s", r.spoken, r.err, time.Since(start))
		}
		next, err := s.Speak(context.Background(), Utterance{Speech: speechOf(2, 0)})
		if err != nil || next.Frames != 2 || next.Interrupted {
			t.Errorf("the next utterance: %+v, %v", next, err)
		}
		if interrupted != id || frames != 1 {
			t.Errorf("the backend was sent %q, want %q; %d frames", interrupted, id, frames)
		}
	})
}

func TestInterruptWaitsForTheFrameBeingHandled(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		id, _, _ := p.speech()
		for range 5 {
			p.sendRaw(frame(p.t, id, false, "x"))
		}
		p.read()
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		handled := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error {
				time.Sleep(time.Second)
				handled++
				return nil
			}})
			if err != nil {
				t.Error(err)
			}
		}()
		time.Sleep(1500 * time.Millisecond)
		if _, err := s.Interrupt(context.Background()); err != nil {
			t.Error(err)
		}
		at := handled
		time.Sleep(time.Minute)
		<-done
		if at != 2 || handled != 2 {
			t.Errorf("%d frames when Interrupt returned, %d later; want 2", at, handled)
		}
	})
}

func TestUtteranceInterruptedBeforeItsFirstChunkSendsNothing(t *testing.T) {
	b := &backend{session: func(p *peer) {
		p.confirm()
		if m := p.read(); m != nil {
			p.t.Errorf("the client sent %v", m)
		}
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if spoken, err := s.Speak(context.Background(), Utterance{Speech: make(liveSpeech)}); err != nil || !spoken.Interrupted {
				t.Errorf("%+v, %v", spoken, err)
			}
		}()
		synctest.Wait()
		if _, err := s.Interrupt(context.Background()); err != nil {
			t.Error(err)
		}
		<-done
	})
}

func TestASecondUtteranceAtOnceIsRefused(t *testing.T) {
	inMemory(t, &backend{}, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		live, done := make(liveSpeech), make(chan struct{})
		go func() {
			defer close(done)
			if _, err := s.Speak(context.Background(), Utterance{Speech: live}); err != nil {
				t.Errorf("the first: %v", err)
			}
		}()
		synctest.Wait()
		_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)})
		wantError(t, err, errors.CodeInternal, errors.PhaseSend)
		live <- []byte{1, 2}
		close(live)
		<-done
	})
}

// An interrupt that comes while the last frame is handled is answered with success, so
// the utterance counts as interrupted, even if it is complete before the interrupt is.
func TestInterruptDuringTheLastFrameIsTheUtterancesEnd(t *testing.T) {
	inMemory(t, &backend{}, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		started, stopping := make(chan Call, 1), make(chan struct{})
		interrupted := make(chan error, 1)
		call := s.Start(context.Background(), Utterance{
			Speech: speechOf(1, 0),
			OnFrame: func(f Frame) error {
				if f.End {
					go func() {
						_, err := s.Interrupt(context.Background())
						interrupted <- err
					}()
					<-stopping
				}
				return nil
			},
			OnInterrupt: func() {
				close(stopping)
				<-(<-started).Done() // the utterance is complete
			},
		})
		started <- call
		spoken, err := call.Wait()
		if err != nil || !spoken.Interrupted {
			t.Errorf("interrupted: %v, error %v", spoken.Interrupted, err)
		}
		if err := <-interrupted; err != nil {
			t.Error(err)
		}
	})
}
