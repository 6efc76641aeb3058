package audio

import (
	"context"
	"io"
	"strings"

	"avatarworker/internal/errors"
)

// ObjectOpener opens an object of an object store for reading and says how many
// bytes it has (-1: not known). An error that Is ErrNoObject means that there
// is none, and never will be; any other is taken for a network fault. The
// reader's Read ends when ctx does.
type ObjectOpener func(ctx context.Context, bucket, name string) (body io.ReadCloser, size int64, err error)

// ErrNoObject is in the chain of an ObjectOpener's error where the bucket or
// the object does not exist.
var ErrNoObject = errors.New("no such object")

// checkObjectName refuses what no store can hold.
func checkObjectName(in *input) error {
	bucket, name, hasBucket := strings.Cut(in.Object, "/")
	if !hasBucket {
		return nil
	}
	if bucket == "" || name == "" {
		return invalid("%s.object: %q: give name or bucket/name", in.Field, shorten(in.Object))
	}
	for _, c := range []byte(bucket) {
		if !isBucketByte(c) {
			return invalid("%s.object: bucket %q: letters, digits, _ and - only (a name with a slash needs its bucket before it)", in.Field, shorten(bucket))
		}
	}
	return nil
}

func isBucketByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

func (o *Opener) openObject(ctx context.Context, in *input) (*Speech, error) {
	if o.opts.Objects == nil {
		return nil, in.unavailable("objects are not available: no object store is configured")
	}
	bucket, name, hasBucket := strings.Cut(in.Object, "/")
	if !hasBucket {
		bucket, name = o.opts.DefaultBucket, in.Object
	}
	src := o.remoteSource(ctx, in, shorten(bucket+"/"+name))
	src.fault = func(err error) error { return in.objectFault(src.name, err) }
	err := src.wait(func() (err error) {
		src.body, src.size, err = o.opts.Objects(src.ctx, bucket, name)
		return err
	})
	if err != nil {
		if src.ctx.Err() == nil {
			err = src.fault(err)
		}
		src.cancel(errClosed)
		return nil, err
	}
	return o.newSpeech(in, src)
}

func (in *input) objectFault(name string, err error) error {
	if errors.Is(err, ErrNoObject) {
		if bucket, rest, named := strings.Cut(in.Object, "/"); named {
			return in.unavailable("%s: no such object: looked for %s in bucket %s (a name with a slash needs its bucket before it)", name, shorten(rest), shorten(bucket))
		}
		return in.unavailable("%s: no such object", name)
	}
	return in.unreachable(err, "%s: the object store failed: %v", name, err)
}
