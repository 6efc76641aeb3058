package streams

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

const (
	// Batch and directBytes bound what one request for stored messages brings: one
	// may be nearly as large as the server's payload limit.
	Batch       = 1024
	directBytes = 4 << 20
	// directSilence without a message means that the rest of an answer is lost.
	directSilence = 2 * time.Second
)

// errNoDirect: the stream does not allow direct gets.
var errNoDirect = errors.New("the stream does not allow direct gets")

// Reader reads the messages of a stream without consuming them: many with one request
// if the stream allows direct gets, else one by one.
type Reader struct {
	js     jetstream.JetStream
	stream string
	single bool      // direct gets are not possible
	since  time.Time // when that was found
}

// NewReader returns a reader of the stream with this name.
func NewReader(js jetstream.JetStream, stream string) *Reader {
	return &Reader{js: js, stream: stream}
}

// Single reports whether each message takes a separate request.
func (r *Reader) Single() bool { return r.single }

// singleFor is how long a Reader does without direct gets: that there was no answer may
// have other reasons than that the stream or this user's permissions do not allow them.
const singleFor = time.Minute

// Next returns messages of the subject in order, the first with at least sequence
// seq, at most n; none if there are no more.
func (r *Reader) Next(ctx context.Context, subject string, seq uint64, n int) ([]*jetstream.RawStreamMsg, error) {
	if r.single && time.Since(r.since) > singleFor {
		r.single = false
	}
	if !r.single {
		found, err := r.batch(ctx, subject, seq, min(n, Batch))
		if !errors.Is(err, errNoDirect) {
			return found, err
		}
		r.single, r.since = true, time.Now()
	}
	msg, err := leader.Next(ctx, r.js, r.stream, seq, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []*jetstream.RawStreamMsg{msg}, nil
}

// Last returns the last message of each subject that has one, at most Batch of them.
func (r *Reader) Last(ctx context.Context, subjects []string) (found []*jetstream.RawStreamMsg, err error) {
	if len(subjects) == 0 {
		return nil, nil
	}
	if r.single {
		return r.lastEach(ctx, subjects)
	}
	for seq, left := uint64(1), true; left; {
		part, err := r.request(ctx, map[string]any{"seq": seq, "multi_last": subjects, "batch": Batch, "max_bytes": directBytes})
		if errors.Is(err, errNoDirect) {
			r.single, r.since = true, time.Now()
			return r.lastEach(ctx, subjects)
		}
		if err != nil {
			return nil, err
		}
		found, left = append(found, part...), false
		if len(part) > 0 { // they are in the stream's order
			end := part[len(part)-1]
			seq, left = end.Sequence+1, lastValue(end.Header, numPending) != "0"
		}
	}
	return found, nil
}

// numPending is how many messages the server has left after one.
const numPending = "Nats-Num-Pending"

func (r *Reader) lastEach(ctx context.Context, subjects []string) (found []*jetstream.RawStreamMsg, err error) {
	stream, err := r.js.Stream(ctx, r.stream)
	if err != nil {
		return nil, err
	}
	for _, subject := range subjects {
		msg, err := stream.GetLastMsgForSubject(ctx, subject)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return nil, fmt.Errorf("read stream %s: %w", r.stream, err)
		default:
			found = append(found, msg)
		}
	}
	return found, nil
}

// batch makes one batched direct get.
func (r *Reader) batch(ctx context.Context, subject string, seq uint64, n int) ([]*jetstream.RawStreamMsg, error) {
	return r.request(ctx, map[string]any{"seq": max(seq, 1), "next_by_subj": subject, "batch": n, "max_bytes": directBytes})
}

// request makes a direct get that is answered by several messages.
func (r *Reader) request(ctx context.Context, query map[string]any) ([]*jetstream.RawStreamMsg, error) {
	body, err := json.Marshal(query)
	if err != nil {
		return nil, err
	}
	nc := r.js.Conn()
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe() //nolint:errcheck // the connection's end does it too
	if err := nc.PublishRequest(topology.APIPrefix(r.js)+"DIRECT.GET."+r.stream, inbox, body); err != nil {
		return nil, err
	}
	var found []*jetstream.RawStreamMsg
	for {
		msg, err := nextReply(ctx, sub)
		if errors.Is(err, nats.ErrNoResponders) { // or a stored message without a body that looks so
			return nil, errNoDirect
		}
		if err != nil && len(found) == 0 && ctx.Err() == nil { // this user may not ask for it
			return nil, errNoDirect
		}
		if err != nil {
			return nil, fmt.Errorf("read stream %s: %w", r.stream, err)
		}
		// What the server says by itself has no stream in it; a stored message
		// has, whatever headers its publisher gave it.
		if lastValue(msg.Header, jetstream.StreamHeader) == "" {
			return found, r.ended(msg)
		}
		stored, err := storedMessage(msg)
		if err != nil {
			return nil, fmt.Errorf("read stream %s: %w", r.stream, err)
		}
		found = append(found, stored)
	}
}

func nextReply(ctx context.Context, sub *nats.Subscription) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, directSilence)
	defer cancel()
	return sub.NextMsgWithContext(ctx)
}

// ended reads why a batch is over; nil: all of it has come, or there is no more.
func (r *Reader) ended(msg *nats.Msg) error {
	switch status := msg.Header.Get("Status"); status {
	case "204", "404":
		return nil
	default:
		return fmt.Errorf("read stream %s: %s %s", r.stream, status, msg.Header.Get("Description"))
	}
}

// storedMessage is a message as the answer to a direct get has it. The server adds
// its headers after those of the publisher.
func storedMessage(msg *nats.Msg) (*jetstream.RawStreamMsg, error) {
	seq, err := strconv.ParseUint(lastValue(msg.Header, jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return nil, err
	}
	at, err := time.Parse(time.RFC3339Nano, lastValue(msg.Header, jetstream.TimeStampHeaer))
	if err != nil {
		return nil, err
	}
	return &jetstream.RawStreamMsg{Subject: lastValue(msg.Header, jetstream.SubjectHeader), Sequence: seq, Time: at, Header: msg.Header, Data: msg.Data}, nil
}

func lastValue(h nats.Header, key string) string {
	if values := h[key]; len(values) > 0 {
		return values[len(values)-1]
	}
	return ""
}
