// Package leader reads streams and object buckets from their leader. It owns nothing
// that is stored, and must not know what the messages mean.
//
// The client's own reads of a stream with direct access may be answered by any
// replica, which may lag behind what a publisher knows is stored. "Not found"
// then means "not here yet", and an object may have been replaced since. Callers
// that depend on what is or is not stored must read through this package. A Feed
// follows a subject's messages as they are stored.
package leader

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

const (
	// requestTimeout bounds one request: without a leader there is no reply.
	requestTimeout = 2 * time.Second
	// retryPause is the wait before a request is repeated.
	retryPause = 200 * time.Millisecond
	// answerTimeout is how long a reply is waited for: longer than an election.
	answerTimeout = 30 * time.Second
)

// Last reads the last message of a subject. It returns jetstream.ErrMsgNotFound
// if there is none. Like all reads of this package it waits out an election: it
// tries until a reply comes, ctx ends, or half a minute is over.
func Last(ctx context.Context, js jetstream.JetStream, stream, subject string) (*jetstream.RawStreamMsg, error) {
	return get(ctx, js, stream, query{LastOf: subject})
}

// Message reads the message with that sequence. It returns
// jetstream.ErrMsgNotFound if there is none.
func Message(ctx context.Context, js jetstream.JetStream, stream string, seq uint64) (*jetstream.RawStreamMsg, error) {
	return get(ctx, js, stream, query{Seq: seq})
}

// Next reads the first message of a subject whose sequence is at least seq. It
// returns jetstream.ErrMsgNotFound if there is none.
func Next(ctx context.Context, js jetstream.JetStream, stream string, seq uint64, subject string) (*jetstream.RawStreamMsg, error) {
	return get(ctx, js, stream, query{Seq: seq, NextOf: subject})
}

// query is the body of a $JS.API.STREAM.MSG.GET request, which only the
// stream's leader answers.
type query struct {
	Seq    uint64 `json:"seq,omitempty"`
	LastOf string `json:"last_by_subj,omitempty"`
	NextOf string `json:"next_by_subj,omitempty"`
}

func get(ctx context.Context, js jetstream.JetStream, stream string, q query) (*jetstream.RawStreamMsg, error) {
	body, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	var msg *jetstream.RawStreamMsg
	err = Try(ctx, stream, func(ctx context.Context) (err error) {
		msg, err = request(ctx, js, stream, body)
		return err
	})
	return msg, err
}

// Try repeats a request about a stream until there is a reply (which may be a
// refusal), ctx ends, or half a minute is over. Each request has a short timeout
// of its own, because the client never fails one that was lost with its
// connection or with a node.
func Try(ctx context.Context, stream string, request func(ctx context.Context) error) error {
	for since := time.Now(); ; {
		err := limited(ctx, request)
		switch {
		case err == nil || permanent(err):
			return err
		case ctx.Err() != nil:
			return errors.Join(context.Cause(ctx), err)
		case time.Since(since) > answerTimeout:
			return fmt.Errorf("stream %s did not answer for %s: %w", stream, answerTimeout, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryPause):
		}
	}
}

// limited makes one request.
func limited(ctx context.Context, request func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return request(ctx)
}

// permanent reports whether repeating the request would not help.
func permanent(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, nats.ErrConnectionClosed) || errors.As(err, &api) && api.Code < http.StatusInternalServerError
}

func request(ctx context.Context, js jetstream.JetStream, stream string, body []byte) (*jetstream.RawStreamMsg, error) {
	reply, err := js.Conn().RequestWithContext(ctx, topology.APIPrefix(js)+"STREAM.MSG.GET."+stream, body)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	switch err := json.Unmarshal(reply.Data, &answer); {
	case err != nil:
		return nil, fmt.Errorf("read stream %s: %w", stream, err)
	case answer.Error != nil:
		return nil, answer.Error
	case answer.Message == nil:
		return nil, fmt.Errorf("read stream %s: %w", stream, jetstream.ErrInvalidJetStreamResponse)
	}
	m := answer.Message
	msg := &jetstream.RawStreamMsg{Subject: m.Subject, Sequence: m.Sequence, Data: m.Data, Time: m.Time, Header: nats.Header{}}
	if len(m.Header) > 0 {
		// Malformed headers, which a publisher may have sent, are dropped, as the
		// client does for messages that it receives.
		if h, err := nats.DecodeHeadersMsg(m.Header); err == nil {
			msg.Header = h
		}
	}
	return msg, nil
}
