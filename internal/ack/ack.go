// Package ack publishes messages and reads the acknowledgements of their streams.
// It owns the parsing of acknowledgements, which costs a worker more with a JSON
// decoder than what it acknowledges. It must not know what the messages mean, and
// it repeats nothing.
package ack

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Publish publishes msg to the stream of its subject and returns once the stream
// has stored it, has refused it, or ctx ends. Give ctx a deadline: a reply may be
// lost. The errors are those of jetstream.JetStream.PublishMsg; without a stream
// for the subject it returns jetstream.ErrNoStreamResponse at once.
func Publish(ctx context.Context, nc *nats.Conn, msg *nats.Msg) (jetstream.PubAck, error) {
	reply, err := nc.RequestMsgWithContext(ctx, msg)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return jetstream.PubAck{}, jetstream.ErrNoStreamResponse
	case err != nil:
		return jetstream.PubAck{}, err
	}
	return Parse(reply.Data)
}

// Parse reads a stream's reply to a message: its acknowledgement, or the
// *jetstream.APIError that says why the message was refused. What is neither is
// jetstream.ErrInvalidJSAck.
func Parse(reply []byte) (jetstream.PubAck, error) {
	if a, ok := parsePlain(reply); ok {
		return a, nil
	}
	var a struct {
		Error *jetstream.APIError `json:"error"`
		*jetstream.PubAck
	}
	switch err := json.Unmarshal(reply, &a); {
	case err != nil:
		return jetstream.PubAck{}, jetstream.ErrInvalidJSAck
	case a.Error != nil:
		return jetstream.PubAck{}, fmt.Errorf("nats: %w", a.Error)
	case a.PubAck == nil || a.Stream == "":
		return jetstream.PubAck{}, jetstream.ErrInvalidJSAck
	default:
		return *a.PubAck, nil
	}
}

// parsePlain reads an acknowledgement in the form in which the server writes it:
//
//	{"stream":"S"[,"domain":"D"],"seq":1[,"duplicate": true]}
//
// It returns false for everything else.
func parsePlain(b []byte) (a jetstream.PubAck, ok bool) {
	if a.Stream, b, ok = cutText(b, `{"stream":"`); !ok || a.Stream == "" {
		return a, false
	}
	if domain, rest, ok := cutText(b, `,"domain":"`); ok {
		a.Domain, b = domain, rest
	}
	b, ok = bytes.CutPrefix(b, []byte(`,"seq":`))
	if !ok {
		return a, false
	}
	digits := 0
	for digits < len(b) && '0' <= b[digits] && b[digits] <= '9' {
		digits++
	}
	if digits == 0 || digits > 1 && b[0] == '0' {
		return a, false
	}
	var err error
	if a.Sequence, err = strconv.ParseUint(string(b[:digits]), 10, 64); err != nil {
		return a, false
	}
	switch string(b[digits:]) {
	case `}`:
		return a, true
	case `,"duplicate": true}`:
		a.Duplicate = true
		return a, true
	default:
		return a, false
	}
}

// cutText cuts prefix, a text and its closing quote off b. It returns false if
// the text has an escape or anything but printable ASCII.
func cutText(b []byte, prefix string) (text string, rest []byte, ok bool) {
	b, ok = bytes.CutPrefix(b, []byte(prefix))
	if !ok {
		return "", nil, false
	}
	for i, c := range b {
		switch {
		case c == '"':
			return string(b[:i]), b[i+1:], true
		case c == '\\' || c < ' ' || c > '~':
			return "", nil, false
		}
	}
	return "", nil, false
}
