package kv

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// watchTimeout bounds the start of a watch, in round trips: the client waits forever
// for the reply to a lost request. sameCheck is how often a watch checks that its bucket
// is still the same, on average.
const (
	watchTimeout = 5
	sameCheck    = 5
)

// Watch is a watch of a bucket, which Store.Watch opens.
type Watch struct {
	// Created is when the bucket was created.
	Created time.Time

	watcher jetstream.KeyWatcher
	end     context.CancelFunc
	check   sync.WaitGroup
}

// Watch follows the keys that match the filter. As the client's watch does, it first
// reports the values there are, then nil, then the changes. It ends with ctx, with Stop,
// and if the bucket was deleted and made again: revisions begin again in the new one,
// and the client would wait until they pass those it has seen.
func (s *Store) Watch(ctx context.Context, filter string) (*Watch, error) {
	created, err := s.created(ctx)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", s.bucket.Bucket(), err)
	}
	ctx, end := context.WithCancel(ctx)
	stuck := time.AfterFunc(watchTimeout*s.timeout, end)
	watcher, err := s.bucket.Watch(ctx, filter)
	stuck.Stop()
	if err != nil {
		end()
		return nil, fmt.Errorf("bucket %s: %w", s.bucket.Bucket(), err)
	}
	w := &Watch{Created: created, watcher: watcher, end: end}
	w.check.Go(func() { s.endWhenMadeAgain(ctx, w) })
	return w, nil
}

// endWhenMadeAgain ends the watch once its bucket is another one.
func (s *Store) endWhenMadeAgain(ctx context.Context, w *Watch) {
	every := s.timeout*sameCheck/2 + rand.N(s.timeout*sameCheck) // so that workers don't check at the same moment
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if created, err := s.created(ctx); err == nil && !created.Equal(w.Created) {
				_ = w.watcher.Stop() // fails only if it has ended
				return
			}
		}
	}
}

// created returns when the bucket was created.
func (s *Store) created(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	status, err := s.bucket.Status(ctx)
	if err != nil {
		return time.Time{}, err
	}
	bucket, ok := status.(*jetstream.KeyValueBucketStatus)
	if !ok {
		return time.Time{}, fmt.Errorf("a bucket of the kind %T has no stream", status)
	}
	return bucket.StreamInfo().Created, nil
}

// Updates returns the channel of what the watch reports. It is closed when the watch
// ends.
func (w *Watch) Updates() <-chan jetstream.KeyValueEntry { return w.watcher.Updates() }

// Stop ends the watch. It may be called again, and after the watch has ended.
func (w *Watch) Stop() {
	w.end()
	w.check.Wait()
	_ = w.watcher.Stop() // fails only if it has ended
}
