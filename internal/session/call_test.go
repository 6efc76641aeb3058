package session

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
)

func TestEndBeforeAllSpeechWasPlayedIsNotTheEnd(t *testing.T) {
	for name, stop := range map[string]func(s *Session) error{
		"interrupted": func(s *Session) error { _, err := s.Interrupt(context.Background()); return err },
		"closed":      func(s *Session) error { return s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			b := &backend{session: func(p *peer) {
				p.confirm()
				p.sendRaw(frame(p.t, p.read().GetClientAudioInput().ReqId, true, "too early"))
				for p.read() != nil { // to its end
				}
			}}
			inMemory(t, b, Options{}, func(c *Client) {
				s := mustOpen(t, c, params())
				live := make(liveSpeech, 1)
				live <- []byte{1, 2}
				said := make(chan Call, 1)
				go func() { said <- s.Start(context.Background(), Utterance{Speech: live}) }()
				synctest.Wait()
				if err := stop(s); err != nil {
					t.Fatal(err)
				}
				saying := <-said
				<-saying.Done()
				spoken, err := saying.Wait()
				if spoken.Interrupted != (name == "interrupted") || (err == nil) != spoken.Interrupted || spoken.Frames != 1 {
					t.Errorf("%+v, %v", spoken, err)
				}
			})
		})
	}
}

func TestAnsweredReportsTheEndAndEveryOther(t *testing.T) {
	cut := errors.New("enough")
	for name, c := range map[string]struct {
		backend func(p *peer, reqID string)
		failed  func(error) bool
	}{
		"end":             {func(p *peer, id string) { p.sendRaw(frame(p.t, id, true, "x")) }, func(err error) bool { return err == nil }},
		"close":           {func(p *peer, _ string) { _ = p.c.Close(1011, "no") }, func(err error) bool { return errors.Of(err).Code == errors.CodeConnectionClosed }},
		"silence":         {func(*peer, string) { time.Sleep(time.Minute) }, func(err error) bool { return errors.Of(err).Code == errors.CodeConnectionClosed }},
		"its own context": {nil, func(err error) bool { return errors.Is(err, cut) }},
	} {
		t.Run(name, func(t *testing.T) {
			b := &backend{session: func(p *peer) {
				p.confirm()
				id, _, _ := p.speech()
				time.Sleep(time.Second)
				if c.backend != nil {
					c.backend(p, id)
				}
				for p.read() != nil { // to its end
				}
			}}
			inMemory(t, b, Options{}, func(client *Client) {
				s := mustOpen(t, client, params())
				ctx, cancel := context.WithCancelCause(context.Background())
				defer cancel(nil)
				saying := s.Start(ctx, Utterance{Speech: speechOf(1, 0)})
				synctest.Wait()
				select {
				case <-saying.Done():
					t.Fatal("answered, and nothing has come")
				default:
				}
				if c.backend == nil {
					cancel(cut)
				}
				<-saying.Done()
				if _, err := saying.Wait(); !c.failed(err) {
					t.Errorf("%v", err)
				}
			})
		})
	}
}
