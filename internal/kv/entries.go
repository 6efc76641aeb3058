package kv

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Entries returns the values that the bucket has now under the keys that match
// one of the filters. A key may be in it twice if it changes meanwhile; the later
// one is the newer.
func Entries(ctx context.Context, bucket jetstream.KeyValue, filters ...string) ([]jetstream.KeyValueEntry, error) {
	watcher, err := bucket.WatchFiltered(ctx, filters, jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", bucket.Bucket(), err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	var entries []jetstream.KeyValueEntry
	for {
		select {
		case entry, open := <-watcher.Updates():
			if !open {
				return nil, fmt.Errorf("bucket %s: %w", bucket.Bucket(), errors.Join(errors.New("the watch ended early"), ctx.Err()))
			}
			if entry == nil { // all there is
				return entries, nil
			}
			entries = append(entries, entry)
		case <-ctx.Done():
			return nil, fmt.Errorf("bucket %s: %w", bucket.Bucket(), ctx.Err())
		}
	}
}
