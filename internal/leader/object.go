package leader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// objectStream returns the stream that holds a bucket's objects.
func objectStream(bucket string) string { return "OBJ_" + bucket }

// ObjectInfo looks an object up; it follows no links. It returns
// jetstream.ErrObjectNotFound or jetstream.ErrBucketNotFound as the leader
// reports them, and jetstream.ErrInvalidStoreName or jetstream.ErrNameRequired
// for invalid names.
func ObjectInfo(ctx context.Context, js jetstream.JetStream, bucket, name string) (*jetstream.ObjectInfo, error) {
	switch {
	case bucket == "" || strings.ContainsFunc(bucket, notOfABucket):
		return nil, jetstream.ErrInvalidStoreName
	case name == "":
		return nil, jetstream.ErrNameRequired
	}
	subject := "$O." + bucket + ".M." + base64.URLEncoding.EncodeToString([]byte(name))
	msg, err := Last(ctx, js, objectStream(bucket), subject)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return nil, jetstream.ErrObjectNotFound
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return nil, jetstream.ErrBucketNotFound
	case err != nil:
		return nil, fmt.Errorf("look up object %s in bucket %s: %w", name, bucket, err)
	}
	info := &jetstream.ObjectInfo{}
	if err := json.Unmarshal(msg.Data, info); err != nil {
		return nil, fmt.Errorf("look up object %s in bucket %s: %w", name, bucket, errors.Join(jetstream.ErrBadObjectMeta, err))
	}
	if info.Deleted {
		return nil, jetstream.ErrObjectNotFound
	}
	info.ModTime = msg.Time
	return info, nil
}

func notOfABucket(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
}

// OpenObject reads the object that ObjectInfo found. Its Read ends when ctx does
// and compares the digest at the end; it needs no closing.
//
// It requests one chunk (128 KiB by default) at a time, from any replica first,
// because a chunk never changes. The client's own Get has the server push the
// whole object, which waits in memory if it is read slowly; its Read can't be
// interrupted; and it reads from one replica, which may not have the whole object
// yet.
func OpenObject(ctx context.Context, js jetstream.JetStream, info *jetstream.ObjectInfo) (io.Reader, error) {
	var stream jetstream.Stream
	err := Try(ctx, objectStream(info.Bucket), func(ctx context.Context) (err error) {
		stream, err = js.Stream(ctx, objectStream(info.Bucket))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", info.Bucket, err)
	}
	return &objectReader{
		ctx: ctx, js: js, stream: stream, info: info, digest: sha256.New(),
		subject: fmt.Sprintf("$O.%s.C.%s", info.Bucket, info.NUID),
	}, nil
}

type objectReader struct {
	ctx     context.Context
	js      jetstream.JetStream
	stream  jetstream.Stream
	subject string // of its chunks
	info    *jetstream.ObjectInfo
	digest  hash.Hash

	chunk []byte // the unread rest of the current chunk
	seq   uint64 // stream sequence of that chunk
	read  uint64
}

// Read implements io.Reader.
func (r *objectReader) Read(p []byte) (int, error) {
	for len(r.chunk) == 0 {
		if r.read >= r.info.Size {
			return 0, r.verify()
		}
		if err := r.fetch(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.chunk)
	r.chunk = r.chunk[n:]
	return n, nil
}

func (r *objectReader) fetch() error {
	msg, err := r.fromReplica()
	if err != nil || !r.genuine(msg) { // the replica lags behind or has failed
		msg, err = Next(r.ctx, r.js, objectStream(r.info.Bucket), r.seq+1, r.subject)
	}
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return fmt.Errorf("its bytes end after %d of %d: was it replaced or deleted meanwhile?", r.read, r.info.Size)
	}
	if err != nil {
		return err
	}
	r.seq, r.chunk = msg.Sequence, msg.Data
	r.read += uint64(len(msg.Data))
	_, err = r.digest.Write(msg.Data)
	return err
}

// fromReplica requests the next chunk from any replica, once.
func (r *objectReader) fromReplica() (msg *jetstream.RawStreamMsg, err error) {
	err = limited(r.ctx, func(ctx context.Context) (err error) {
		msg, err = r.stream.GetMsg(ctx, r.seq+1, jetstream.WithGetMsgSubject(r.subject))
		return err
	})
	return msg, err
}

// genuine reports whether the client parsed a reply correctly: it takes sequence
// and subject from the first headers of these names, which may be the
// publisher's. The leader's reply keeps the two apart.
func (r *objectReader) genuine(msg *jetstream.RawStreamMsg) bool {
	for _, name := range []string{jetstream.StreamHeader, jetstream.SubjectHeader, jetstream.SequenceHeader, jetstream.TimeStampHeaer} {
		if len(msg.Header[name]) > 1 {
			return false
		}
	}
	return msg.Sequence > r.seq
}

func (r *objectReader) verify() error {
	want, err := jetstream.DecodeObjectDigest(r.info.Digest)
	if err != nil {
		return err
	}
	if r.info.Size > 0 && !bytes.Equal(want, r.digest.Sum(nil)) {
		return jetstream.ErrDigestMismatch
	}
	return io.EOF
}
