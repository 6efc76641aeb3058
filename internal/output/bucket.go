package output

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
)

// requestTimeout bounds one request: a node that fails may take it along.
const requestTimeout = 5 * time.Second

// errChanged means that the operation is to be repeated: something else changed what
// was read, or a newly elected leader does not have everything yet.
var errChanged = errors.New("the bucket has changed meanwhile")

// publish stores a message if the last one on its subject has that sequence (0:
// there is none).
func (b *Recordings) publish(ctx context.Context, msg *nats.Msg, behind uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	msg.Header[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(behind, 10)}
	ack, err := b.js.PublishMsg(ctx, msg)
	if err != nil {
		return 0, err
	}
	return ack.Sequence, nil
}

// conflicts reports whether a publish was refused because of its expected
// sequence. A replicated stream refuses with another code than one with a single
// replica.
func conflicts(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) &&
		(api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func (b *Recordings) last(ctx context.Context, subject string) (*jetstream.RawStreamMsg, error) {
	return leader.Last(ctx, b.js, b.stream, subject)
}

// open looks the bucket's stream up, unless it was looked up before.
func (b *Recordings) open(ctx context.Context) (jetstream.Stream, error) {
	b.mu.Lock()
	handle := b.handle
	b.mu.Unlock()
	if handle != nil {
		return handle, nil
	}
	handle, err := b.js.Stream(ctx, b.stream)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", b.bucket, err)
	}
	b.mu.Lock()
	b.handle = handle
	b.mu.Unlock()
	return handle, nil
}

// request makes one request to the bucket's stream.
func (b *Recordings) request(ctx context.Context, f func(ctx context.Context, s jetstream.Stream) error) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	s, err := b.open(ctx)
	if err != nil {
		return err
	}
	return f(ctx, s)
}

// count returns the number of messages on a subject.
func (b *Recordings) count(ctx context.Context, subject string) (n int, err error) {
	err = b.request(ctx, func(ctx context.Context, s jetstream.Stream) error {
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(subject))
		if err == nil {
			n = int(info.State.Subjects[subject])
		}
		return err
	})
	return n, err
}

// purge removes the messages on a subject whose sequence is lower than before;
// 0: all.
func (b *Recordings) purge(ctx context.Context, subject string, before uint64) error {
	return b.request(ctx, func(ctx context.Context, s jetstream.Stream) error {
		return s.Purge(ctx, jetstream.WithPurgeSubject(subject), jetstream.WithPurgeSequence(before))
	})
}

// removeBetween removes the messages on a subject between two sequences, both
// exclusive. It tries until that is done, ctx ends, or the error is permanent.
func (b *Recordings) removeBetween(ctx context.Context, subject string, after, before uint64) error {
	if after == 0 {
		return retry(ctx, func(ctx context.Context) error { return b.purge(ctx, subject, before) })
	}
	for seq := after + 1; ; {
		msg, err := leader.Next(ctx, b.js, b.stream, seq, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Sequence >= before {
			return nil
		}
		if err != nil {
			return err
		}
		if err := retry(ctx, func(ctx context.Context) error { return b.remove(ctx, msg.Sequence) }); err != nil {
			return err
		}
		seq = msg.Sequence + 1
	}
}

// remove removes the message with that sequence if it exists.
func (b *Recordings) remove(ctx context.Context, seq uint64) error {
	err := b.request(ctx, func(ctx context.Context, s jetstream.Stream) error { return s.DeleteMsg(ctx, seq) })
	if err == nil {
		return nil
	}
	if _, lookErr := leader.Message(ctx, b.js, b.stream, seq); errors.Is(lookErr, jetstream.ErrMsgNotFound) {
		return nil
	}
	return err
}
