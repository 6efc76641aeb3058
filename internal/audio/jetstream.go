package audio

import (
	"context"
	"io"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
)

// JetStreamObjects opens objects of JetStream's object stores. It reads from the
// bucket's leader, because speech may be uploaded or replaced just before its job
// is published.
func JetStreamObjects(js jetstream.JetStream) ObjectOpener {
	return func(ctx context.Context, bucket, name string) (io.ReadCloser, int64, error) {
		info, err := objectInfo(ctx, js, bucket, name)
		if err != nil {
			return nil, 0, err
		}
		body, err := leader.OpenObject(ctx, js, info)
		if err != nil {
			return nil, 0, err
		}
		return io.NopCloser(body), int64(info.Size), nil
	}
}

// objectInfo looks an object up, following one link.
func objectInfo(ctx context.Context, js jetstream.JetStream, bucket, name string) (*jetstream.ObjectInfo, error) {
	for range 2 {
		info, err := leader.ObjectInfo(ctx, js, bucket, name)
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
