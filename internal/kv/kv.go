// Package kv stores JSON values in a key-value bucket and, except by Note, changes
// them only by compare-and-set on their revision. It reads from the bucket's leader,
// because a lagging replica would mislead a caller that relies on what it reads. It
// owns the handling of conflicts and of writes whose reply was lost. It must not
// know what the values mean.
package kv

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/ack"
	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// ErrConflict means that the value was changed by another writer, or is gone.
var ErrConflict = errors.New("changed by another writer")

const (
	// RetryPause is the wait before a write or read without a reply is repeated.
	RetryPause = 100 * time.Millisecond
	// MaxStale is how often a read is repeated that returns less than an earlier
	// write stored. Only a newly elected leader can be behind.
	MaxStale = 30
	// markerLife is how long the marker of a removed key is kept, so that
	// watchers see it.
	markerLife = time.Minute
)

// Store is one bucket. It is safe for concurrent use.
type Store struct {
	js      jetstream.JetStream
	bucket  jetstream.KeyValue
	stream  string
	prefix  string // of the subjects that keys are published to
	timeout time.Duration
	buffers sync.Pool // of *[]byte, for values: the NATS client copies what it sends
}

// NewStore returns a store over bucket. timeout bounds one round trip; a call
// repeats it until there is an answer or its context ends.
func NewStore(js jetstream.JetStream, bucket jetstream.KeyValue, timeout time.Duration) *Store {
	prefix := subjectOf(bucket.Bucket(), "")
	if api := topology.APIPrefix(js); api != jetstream.DefaultAPIPrefix {
		prefix = api + prefix // as the client does for another domain or account
	}
	return &Store{js: js, bucket: bucket, stream: "KV_" + bucket.Bucket(), prefix: prefix, timeout: timeout}
}

func subjectOf(bucket, key string) string { return "$KV." + bucket + "." + key }

// Get reads key into v and returns its revision, 0 if the key has no value.
func (s *Store) Get(ctx context.Context, key string, v any) (revision uint64, err error) {
	msg, err := s.last(ctx, key)
	if err != nil || removed(msg) {
		return 0, err
	}
	if err := json.Unmarshal(msg.Data, v); err != nil {
		return 0, fmt.Errorf("%s in bucket %s is not what this version writes: %w", key, s.bucket.Bucket(), err)
	}
	return msg.Sequence, nil
}

// Stored returns the time at which the server stored the key's value, the zero
// time if the key has none.
func (s *Store) Stored(ctx context.Context, key string) (time.Time, error) {
	msg, err := s.last(ctx, key)
	if err != nil || removed(msg) {
		return time.Time{}, err
	}
	return msg.Time, nil
}

// Put writes v under key if the revision is still the given one (0: the key has
// no value) and returns the new revision, or ErrConflict. A write that timed out
// may have landed, so Put reads it back and tries again until ctx ends.
func (s *Store) Put(ctx context.Context, key string, v any, revision uint64) (uint64, error) {
	return s.PutTTL(ctx, key, v, revision, 0)
}

// PutTTL is Put of a value that the server removes after ttl, by its own clock.
// It is rounded up to seconds; 0 keeps the value as long as the bucket does.
func (s *Store) PutTTL(ctx context.Context, key string, v any, revision uint64, ttl time.Duration) (uint64, error) {
	buffer, _ := s.buffers.Get().(*[]byte)
	if buffer == nil {
		buffer = new([]byte)
	}
	defer s.buffers.Put(buffer)
	data, err := marshal(*buffer, v)
	if err != nil {
		return 0, fmt.Errorf("encode %s: %w", key, err)
	}
	*buffer = data
	ttl = (ttl + time.Second - 1).Truncate(time.Second)
	stale := 0
	for first := true; ; first = false {
		next, err := s.write(ctx, key, data, revision, ttl, !first)
		switch {
		case err == nil:
			return next, nil
		case lasting(err):
			return 0, fmt.Errorf("write %s: %w", key, err)
		case !conflicts(err):
			// It may have landed. If so, the next attempt conflicts with it.
			if err := retry.Pause(ctx, RetryPause, err); err != nil {
				return 0, err
			}
			continue
		case first:
			return 0, ErrConflict
		}
		msg, err := s.last(ctx, key)
		switch {
		case err != nil:
			return 0, err
		case msg != nil && !removed(msg) && bytes.Equal(msg.Data, data):
			return msg.Sequence, nil
		}
		if stale++; removed(msg) || msg.Sequence > revision || stale > MaxStale {
			return 0, ErrConflict
		}
		if err := retry.Pause(ctx, RetryPause, ErrConflict); err != nil {
			return 0, err
		}
	}
}

// appender is a value that writes its own JSON, with the bytes that json.Marshal
// would return.
type appender interface {
	AppendJSON(b []byte) ([]byte, error)
}

// sizeHint is about the size of a value that writes its own JSON, in bytes.
const sizeHint = 512

// marshal returns v as JSON, in buffer if it can.
func marshal(buffer []byte, v any) ([]byte, error) {
	if a, ok := v.(appender); ok {
		return a.AppendJSON(slices.Grow(buffer[:0], sizeHint))
	}
	return json.Marshal(v)
}

// Note writes v under key without waiting for an answer, and whatever is there. It
// may get lost.
func (s *Store) Note(key string, v any) {
	if data, err := marshal(nil, v); err == nil {
		_ = s.js.Conn().Publish(s.prefix+key, data) // the next one follows
	}
}

// lasting reports whether the same write can never succeed.
func lasting(err error) bool {
	return errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, jetstream.ErrInvalidKey) || errors.Is(err, nats.ErrConnectionClosed) || hasCode(err, codeTTLDisabled, codeTTLInvalid)
}

// write writes once; with insist, until there is an answer.
func (s *Store) write(ctx context.Context, key string, data []byte, revision uint64, ttl time.Duration, insist bool) (uint64, error) {
	next, err := s.publish(ctx, s.message(key, data, revision, ttl), insist)
	if revision != 0 || !conflicts(err) {
		return next, err
	}
	// A removed key has no value, but it still has a revision.
	msg, readErr := s.last(ctx, key)
	if readErr != nil || msg == nil || !removed(msg) {
		return 0, err
	}
	return s.publish(ctx, s.message(key, data, msg.Sequence, ttl), insist)
}

func (s *Store) message(key string, data []byte, revision uint64, ttl time.Duration) nats.Msg {
	header := nats.Header{jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(revision, 10)}}
	if ttl > 0 {
		header[jetstream.MsgTTLHeader] = []string{ttl.String()}
	}
	return nats.Msg{Subject: s.prefix + key, Data: data, Header: header}
}

func (s *Store) publish(ctx context.Context, msg nats.Msg, insist bool) (uint64, error) {
	if insist {
		return s.insist(ctx, msg)
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	stored, err := ack.Publish(ctx, s.js.Conn(), &msg)
	return stored.Sequence, err
}

// insist publishes msg again after each timeout, and takes the first answer to any of
// them: on a slow way each answer may take longer than that.
func (s *Store) insist(ctx context.Context, msg nats.Msg) (uint64, error) {
	nc := s.js.Conn()
	msg.Reply = nc.NewInbox()
	answers, err := nc.SubscribeSync(msg.Reply)
	if err != nil {
		return 0, err
	}
	defer func() { _ = answers.Unsubscribe() }() // fails only without a connection
	for {
		if err := nc.PublishMsg(&msg); err != nil {
			return 0, err
		}
		soon, cancel := context.WithTimeout(ctx, s.timeout)
		answer, err := answers.NextMsgWithContext(soon)
		cancel()
		switch {
		case err == nil:
			stored, err := ack.Parse(answer.Data)
			return stored.Sequence, err
		case errors.Is(err, nats.ErrNoResponders):
			return 0, jetstream.ErrNoStreamResponse
		case ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded):
			return 0, err
		}
	}
}

// Remove removes key if its revision is still the given one. It returns
// ErrConflict if the revision is another, or if the key has no value. A removal
// that timed out may have landed; the caller may repeat it.
func (s *Store) Remove(ctx context.Context, key string, revision uint64) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := s.bucket.Purge(ctx, key, jetstream.LastRevision(revision), jetstream.PurgeTTL(markerLife))
	if conflicts(err) {
		return ErrConflict
	}
	return err
}

// last reads the key's last message from the bucket's leader, or returns nil if
// there is none. It tries until a reply comes or ctx ends.
func (s *Store) last(ctx context.Context, key string) (*jetstream.RawStreamMsg, error) {
	msg, err := leader.Last(ctx, s.js, s.stream, subjectOf(s.bucket.Bucket(), key))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil //nolint:nilnil // nil means that there is no message
	}
	return msg, err
}

// removed reports whether msg holds no value of its key: it is nil, or the marker
// that a deletion or an expiry leaves in a bucket.
func removed(msg *jetstream.RawStreamMsg) bool {
	return msg == nil || msg.Header.Get("KV-Operation") != "" || msg.Header.Get("Nats-Marker-Reason") != ""
}

// Error codes of the JetStream API.
const (
	codeWrongLastSequence           = 10071
	codeWrongLastSequenceReplicated = 10164
	codeTTLInvalid                  = 10165
	codeTTLDisabled                 = 10166
)

// conflicts reports whether err is a refused compare-and-set. A replicated bucket
// refuses with another code than a bucket with one replica.
func conflicts(err error) bool {
	return hasCode(err, codeWrongLastSequence, codeWrongLastSequenceReplicated)
}

// hasCode reports whether err is an error of the JetStream API with one of the
// codes.
func hasCode(err error, codes ...jetstream.ErrorCode) bool {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	for _, code := range codes {
		if api.ErrorCode == code {
			return true
		}
	}
	return false
}
