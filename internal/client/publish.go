package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"avatarworker/internal/errors"
)

// Published says where a job is kept.
type Published struct {
	JobID     string `json:"job_id"`
	Queue     string `json:"queue"`
	Subject   string `json:"subject"`
	Stream    string `json:"stream"`
	Seq       uint64 `json:"seq"`                 // in the stream
	Duplicate bool   `json:"duplicate,omitempty"` // it was published before, under this id
}

// NewJobID returns an id that no other job has.
func NewJobID() string { return "job-" + strings.ToLower(nuid.Next()) }

// Publish gives a job to the jobs stream, as a body that jobspec.Decode takes.
// jobID is the body's id. When Publish returns without an error, the job is
// stored and will have an outcome.
func (c *Client) Publish(ctx context.Context, queue, jobID string, body []byte) (Published, error) {
	msg := nats.NewMsg(c.names.Jobs(queue))
	msg.Data = body
	ack, err := c.js.PublishMsg(ctx, msg, jetstream.WithMsgID(jobID), jetstream.WithExpectStream(c.names.JobsStream()))
	if err != nil {
		return Published{}, c.publishError(err, msg)
	}
	return Published{
		JobID: jobID, Queue: queue, Subject: msg.Subject, Stream: ack.Stream, Seq: ack.Sequence, Duplicate: ack.Duplicate,
	}, nil
}

// codeStoreFailed is the server's error code for a publish into a full stream.
const codeStoreFailed = 10077

func (c *Client) publishError(err error, msg *nats.Msg) error {
	const tooLarge = "the job has %d bytes, more than %s: upload its speech instead of sending it inside the job"
	var api *jetstream.APIError
	switch {
	case errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("no stream takes jobs on %s: no worker has run here with this nats.prefix yet ('avatarworker run' makes it)", msg.Subject)
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf(tooLarge, len(msg.Data), fmt.Sprintf("the NATS server takes (%d)", c.js.Conn().MaxPayload()))
	case errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamMessageExceedsMaximum:
		return fmt.Errorf(tooLarge, len(msg.Data), fmt.Sprintf("stream %s takes", c.names.JobsStream()))
	case errors.As(err, &api) && api.ErrorCode == codeStoreFailed:
		return fmt.Errorf("stream %s is full or can't store messages: publish again when jobs have been done: %w", c.names.JobsStream(), err)
	}
	return fmt.Errorf("publishing on %s: %w", msg.Subject, err)
}
