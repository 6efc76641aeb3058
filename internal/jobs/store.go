package jobs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// ErrConflict says that somebody else changed what was to be changed.
var ErrConflict = errors.New("changed by somebody else")

// storePause is the wait before a write or read whose answer stayed out is
// tried again.
const storePause = 100 * time.Millisecond

// maxStale is how often a read is repeated that says less than a write before
// it: reads ask the bucket's leader, and only one that was elected just now may
// be behind.
const maxStale = 30

// Store keeps JSON values of one bucket and changes them only by
// compare-and-set on their revision.
type Store struct {
	kv      jetstream.KeyValue
	leader  nats.JetStreamContext // reads where the bucket's leader answers
	timeout time.Duration         // of one try
}

// NewStore returns a store over kv; timeout bounds one round trip.
func NewStore(js jetstream.JetStream, kv jetstream.KeyValue, timeout time.Duration) (*Store, error) {
	reader, err := js.Conn().JetStream(nats.APIPrefix(topology.APIPrefix(js)))
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", kv.Bucket(), err)
	}
	return &Store{kv: kv, leader: reader, timeout: timeout}, nil
}

// Get reads key into v and returns its revision, 0 if there is none. It tries
// until an answer comes or ctx ends.
func (s *Store) Get(ctx context.Context, key string, v any) (revision uint64, err error) {
	data, revision, err := s.read(ctx, key)
	if err != nil || revision == 0 {
		return 0, err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return 0, fmt.Errorf("%s in bucket %s is not what this version writes: %w", key, s.kv.Bucket(), err)
	}
	return revision, nil
}

// Put writes v under key if its revision is still the given one (0: there is
// no value yet) and returns the new revision. ErrConflict means that it is not.
// A write whose answer stayed out is unknown, not failed: it is read back, and
// tried again until an answer comes or ctx ends.
func (s *Store) Put(ctx context.Context, key string, v any, revision uint64) (uint64, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("encode %s: %w", key, err)
	}
	stale := 0
	for tried := false; ; tried = true {
		next, err := s.write(ctx, key, data, revision)
		switch {
		case err == nil:
			return next, nil
		case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, jetstream.ErrInvalidKey):
			return 0, fmt.Errorf("write %s: %w", key, err)
		case !conflicts(err):
			// Unknown: the write may have landed. Writing again tells, because
			// it conflicts with itself.
			if err := pause(ctx, storePause, err); err != nil {
				return 0, err
			}
			continue
		}
		if !tried {
			return 0, ErrConflict
		}
		stored, at, err := s.read(ctx, key)
		if err != nil {
			return 0, err
		}
		if bytes.Equal(stored, data) {
			return at, nil
		}
		if stale++; at == 0 || at > revision || stale > maxStale {
			return 0, ErrConflict // also where the value is gone
		}
		if err := pause(ctx, storePause, ErrConflict); err != nil {
			return 0, err
		}
	}
}

func (s *Store) write(ctx context.Context, key string, data []byte, revision uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	next, err := s.kv.Update(ctx, key, data, revision)
	if revision != 0 || !conflicts(err) {
		return next, err
	}
	// A key that somebody deleted has no value, but a revision all the same.
	msg, lookErr := s.last(ctx, key)
	if lookErr != nil || !deleted(msg) {
		return 0, err
	}
	return s.kv.Update(ctx, key, data, msg.Sequence)
}

// conflicts tells a refused compare-and-set. A replicated bucket refuses with
// another code than a single one.
func conflicts(err error) bool {
	return errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch)
}

// read returns the value of key and its revision, 0 if there is none.
func (s *Store) read(ctx context.Context, key string) ([]byte, uint64, error) {
	for {
		data, revision, err := s.get(ctx, key)
		if err == nil {
			return data, revision, nil
		}
		if err := pause(ctx, storePause, err); err != nil {
			return nil, 0, err
		}
	}
}

// get asks the bucket's leader. The client's own Get may be answered by any
// replica, and one that lags behind would mislead whoever decides by what it
// says.
func (s *Store) get(ctx context.Context, key string) ([]byte, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	msg, err := s.last(ctx, key)
	switch {
	case errors.Is(err, nats.ErrMsgNotFound):
		return nil, 0, nil
	case err != nil:
		return nil, 0, err
	case deleted(msg):
		return nil, 0, nil
	}
	return msg.Data, msg.Sequence, nil
}

func (s *Store) last(ctx context.Context, key string) (*nats.RawStreamMsg, error) {
	return s.leader.GetLastMsg("KV_"+s.kv.Bucket(), "$KV."+s.kv.Bucket()+"."+key, nats.Context(ctx))
}

// deleted tells the mark that a deletion or a purge leaves in a bucket.
func deleted(msg *nats.RawStreamMsg) bool { return msg.Header.Get("KV-Operation") != "" }

// pause waits, and returns what ended the wait early together with why there
// was something to wait for.
func pause(ctx context.Context, d time.Duration, why error) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), why)
	}
}
