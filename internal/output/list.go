package output

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// Stored is a recording as a list shows it.
type Stored struct {
	Name     string    `json:"name"`
	JobID    string    `json:"job_id"` // "": it was not stored by a worker
	Bytes    uint64    `json:"bytes"`
	StoredAt time.Time `json:"stored_at"`
	Digest   string    `json:"digest"`
}

// ListRecordings lists the complete recordings, newest first. What a session stores while it
// runs has no name of a recording yet. If the bucket does not exist, the error has
// jetstream.ErrBucketNotFound in its chain.
func ListRecordings(ctx context.Context, js jetstream.JetStream, names topology.Names) ([]Stored, error) {
	bucket := names.RecordingsBucket()
	store, err := js.ObjectStore(ctx, bucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", bucket, err)
	}
	objects, err := store.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, fmt.Errorf("bucket %s: %w", bucket, err)
	}
	list := []Stored{}
	for _, o := range objects {
		list = append(list, Stored{Name: o.Name, JobID: o.Metadata[MetaJobID], Bytes: o.Size, StoredAt: o.ModTime.UTC(), Digest: o.Digest})
	}
	slices.SortFunc(list, func(a, b Stored) int {
		return cmp.Or(b.StoredAt.Compare(a.StoredAt), cmp.Compare(a.Name, b.Name))
	})
	return list, nil
}
