package audio

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// JetStreamObjects opens objects of JetStream's object stores.
//
// It asks for one chunk (128 KiB unless its writer chose otherwise) at a time.
// The client's own Get has the server push the whole object, which then waits
// in memory when a session reads at real-time pace, and its Read can't be
// interrupted.
func JetStreamObjects(js jetstream.JetStream) ObjectOpener {
	return func(ctx context.Context, bucket, name string) (io.ReadCloser, int64, error) {
		info, err := objectInfo(ctx, js, bucket, name)
		if err != nil {
			return nil, 0, err
		}
		stream, err := js.Stream(ctx, "OBJ_"+info.Bucket)
		if err != nil {
			return nil, 0, err
		}
		r := &objectReader{
			ctx:     ctx,
			stream:  stream,
			subject: fmt.Sprintf("$O.%s.C.%s", info.Bucket, info.NUID),
			info:    info,
			digest:  sha256.New(),
		}
		return r, int64(info.Size), nil
	}
}

// objectInfo looks an object up, through one link.
func objectInfo(ctx context.Context, js jetstream.JetStream, bucket, name string) (*jetstream.ObjectInfo, error) {
	for range 2 {
		store, err := js.ObjectStore(ctx, bucket)
		if err != nil {
			return nil, objectError(err)
		}
		info, err := store.GetInfo(ctx, name)
		if err != nil {
			return nil, objectError(err)
		}
		if info.Opts == nil || info.Opts.Link == nil {
			return info, nil
		}
		bucket, name = info.Opts.Link.Bucket, info.Opts.Link.Name
	}
	return nil, errors.Join(ErrNoObject, errors.New("it is a link to a link"))
}

func objectError(err error) error {
	for _, none := range []error{
		jetstream.ErrBucketNotFound, jetstream.ErrObjectNotFound,
		jetstream.ErrInvalidStoreName, jetstream.ErrNameRequired,
	} {
		if errors.Is(err, none) {
			return errors.Join(ErrNoObject, err)
		}
	}
	return err
}

// objectReader reads an object chunk by chunk and compares its digest at the end.
type objectReader struct {
	ctx     context.Context
	stream  jetstream.Stream
	subject string
	info    *jetstream.ObjectInfo
	digest  hash.Hash

	chunk []byte // what is left of the chunk at hand
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
	msg, err := r.stream.GetMsg(r.ctx, r.seq+1, jetstream.WithGetMsgSubject(r.subject))
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

// Close implements io.Closer: nothing is held between two reads.
func (r *objectReader) Close() error { return nil }
