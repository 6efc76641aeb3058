package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"avatarworker/internal/session"
)

// clientReader is our session client, without the worker around it.
type clientReader struct {
	client *session.Client
	mu     sync.Mutex
	open   []*session.Session
}

func (r *clientReader) start(_ context.Context, p params) (answer, error) {
	r.client = session.New(session.Options{Endpoints: session.Endpoints{ConsoleURL: p.Console, IngressURL: p.Ingress}})
	return answer{}, nil
}

func (r *clientReader) stop() { _ = r.client.Close() } // always nil

func (r *clientReader) do(ctx context.Context, c command) (answer, error) {
	switch c.Do {
	case "run":
		return together(c.N, func(int) error { return r.speak(ctx, c.Frames) })
	case "open":
		return together(c.N, func(int) error { return r.openIdle(ctx) })
	default:
		return answer{}, fmt.Errorf("%s: not a command of a reader", c.Do)
	}
}

func (r *clientReader) connect(ctx context.Context) (*session.Session, error) {
	return r.client.Open(ctx, session.Params{
		AppID: "app", AvatarID: "ok",
		APIKey: func() (string, error) { return "bench", nil },
		Config: func(context.Context) (session.AudioConfig, error) { return session.AudioConfig{SampleRate: 16000}, nil },
	})
}

func (r *clientReader) speak(ctx context.Context, frames int) error {
	s, err := r.connect(ctx)
	if err != nil {
		return err
	}
	spoken, err := s.Speak(ctx, session.Utterance{Speech: silence{}, OnFrame: func(session.Frame) error { return nil }})
	if err == nil && spoken.Frames != frames {
		err = fmt.Errorf("%d frames came, not %d", spoken.Frames, frames)
	}
	if closeErr := s.Close(); err == nil {
		err = closeErr
	}
	return err
}

func (r *clientReader) openIdle(ctx context.Context) error {
	s, err := r.connect(ctx)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = append(r.open, s)
	return nil
}

// silence is 20 ms of it.
type silence struct{}

func (silence) Next(context.Context) ([]byte, time.Duration, error) {
	return quiet[:], 20 * time.Millisecond, io.EOF
}

var quiet [speechBytes]byte
