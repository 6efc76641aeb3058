// Package client is what a publisher needs of avatarworker: it uploads speech,
// publishes jobs and live speech, follows a job to its outcome and collects its
// frames. It owns none of the streams and buckets that it uses, and it prints
// nothing. It must not know the command line or the configuration.
package client

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/topology"
)

// requestTimeout bounds what still has to be done after the caller's context has
// ended: the end of live speech, the removal of uploads that no job names.
const requestTimeout = 5 * time.Second

// Options are what a Client is made of. JetStream is required.
type Options struct {
	JetStream jetstream.JetStream
	Names     topology.Names   // zero: the default prefix
	Now       func() time.Time // nil: time.Now
	Log       zerolog.Logger   // debug lines only; the zero value logs nothing
}

// Client publishes and follows jobs. It is safe for concurrent use.
type Client struct {
	js    jetstream.JetStream
	names topology.Names
	now   func() time.Time
	log   zerolog.Logger
}

// New returns a Client. It sends nothing yet.
func New(o Options) *Client {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Client{js: o.JetStream, names: o.Names, now: o.Now, log: o.Log}
}

// Workers returns the workers that serve the queue now: those whose presence is
// fresh and that are not draining.
func (c *Client) Workers(ctx context.Context, queue string) ([]fleet.Presence, error) {
	bucket, err := c.js.KeyValue(ctx, c.names.FleetBucket())
	if err != nil {
		return nil, c.names.Unavailable("bucket "+c.names.FleetBucket(), err)
	}
	workers, err := fleet.Read(ctx, bucket)
	if err != nil {
		return nil, err
	}
	now := c.now()
	var serving []fleet.Presence
	for _, w := range workers {
		if _, ok := w.Queues[queue]; ok && !w.Draining && fleet.Fresh(w.Stored, now) {
			serving = append(serving, w.Presence)
		}
	}
	return serving, nil
}

// Recording opens a recording by the name that the job's outcome gives. Reading
// it to its end checks its digest. The caller closes it.
func (c *Client) Recording(ctx context.Context, name string) (io.ReadCloser, error) {
	bucket := c.names.RecordingsBucket()
	body, _, err := audio.JetStreamObjects(c.js)(ctx, bucket, name)
	if errors.Is(err, audio.ErrNoObject) {
		return nil, fmt.Errorf("recording %s not found in bucket %s: it may have aged out, or its job has not completed", name, bucket)
	}
	if err != nil {
		return nil, fmt.Errorf("recording %s in bucket %s: %w", name, bucket, err)
	}
	return body, nil
}

func (c *Client) stream(ctx context.Context, name string) (jetstream.Stream, error) {
	stream, err := c.js.Stream(ctx, name)
	if err != nil {
		return nil, c.names.Unavailable("stream "+name, err)
	}
	return stream, nil
}
