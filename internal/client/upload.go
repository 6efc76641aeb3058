package client

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
)

// Upload is a file of speech and the object that it becomes. A job names the
// object in audio.object.
type Upload struct {
	File   string
	Object string
}

// NewUpload returns an upload of file under an object name that no other upload
// has and that still shows which file it was.
func NewUpload(file string) Upload {
	base := strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) || unicode.IsControl(r) || r == '/' || r == '\\' {
			return '_'
		}
		return r
	}, filepath.Base(file))
	if len(base) > 100 {
		base = strings.ToValidUTF8(base[len(base)-100:], "")
	}
	return Upload{File: file, Object: nuid.Next() + "-" + base}
}

// Upload stores all files in the bucket of uploaded speech, or none: after an
// error it removes those that it had stored.
func (c *Client) Upload(ctx context.Context, uploads []Upload) error {
	if len(uploads) == 0 {
		return nil
	}
	bucket := c.names.AudioFilesBucket()
	store, err := c.js.ObjectStore(ctx, bucket)
	if err != nil {
		return c.names.Unavailable("bucket "+bucket, err)
	}
	for i, u := range uploads {
		if err := putFile(ctx, store, u); err != nil {
			c.RemoveUploads(ctx, uploads[:i])
			return fmt.Errorf("uploading %s to bucket %s: %w", u.File, bucket, err)
		}
	}
	return nil
}

func putFile(ctx context.Context, store jetstream.ObjectStore, u Upload) error {
	f, err := os.Open(u.File)
	if err != nil {
		return err
	}
	defer f.Close() // it was only read
	_, err = store.Put(ctx, jetstream.ObjectMeta{Name: u.Object, Description: "Speech of a job"}, f)
	return err
}

// RemoveUploads removes objects that no job names. It takes at most 5 s, also
// when ctx has ended. Where it fails, the objects age out.
func (c *Client) RemoveUploads(ctx context.Context, uploads []Upload) {
	if len(uploads) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	store, err := c.js.ObjectStore(ctx, c.names.AudioFilesBucket())
	if err != nil {
		return
	}
	for _, u := range uploads {
		if err := store.Delete(ctx, u.Object); err != nil {
			c.log.Debug().Err(err).Str("object", u.Object).Msg("could not remove an upload; it ages out")
		}
	}
}
