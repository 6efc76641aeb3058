package client

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
)

// Speech is what Speak publishes: chunks in the job's live format, each with the
// time that it takes to speak. Next returns io.EOF at the end.
type Speech interface {
	Next(ctx context.Context) (data []byte, length time.Duration, err error)
}

// Speak publishes the speech of a live job to its end, and then the end of the
// session. It publishes that end also after an error or when ctx ends, since a
// session that waits for speech costs money. With realtime set, no chunk is
// published before the earlier ones have been spoken.
func (c *Client) Speak(ctx context.Context, jobID string, speech Speech, realtime bool) error {
	subject := c.names.Audio(jobID)
	err := c.chunks(ctx, subject, speech, realtime)
	last := nats.NewMsg(subject)
	last.Header.Set(audio.HeaderEnd, "true")
	last.Header.Set(audio.HeaderClose, "true")
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if _, endErr := c.js.PublishMsg(short, last); endErr != nil && err == nil {
		err = fmt.Errorf("publishing the end of the speech on %s: %w", subject, endErr)
	}
	return err
}

func (c *Client) chunks(ctx context.Context, subject string, speech Speech, realtime bool) error {
	start := time.Now()
	var spoken time.Duration
	for {
		data, length, err := speech.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the live speech: %w", err)
		}
		if realtime {
			if err := waitUntil(ctx, start.Add(spoken)); err != nil {
				return err
			}
		}
		spoken += length
		_, err = c.js.Publish(ctx, subject, data)
		switch {
		case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse):
			return fmt.Errorf("no stream takes live speech on %s", subject)
		case err != nil:
			return fmt.Errorf("publishing speech on %s: %w", subject, err)
		}
	}
}

func waitUntil(ctx context.Context, at time.Time) error {
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
