package fetch_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/natsserver/natstest"
)

// BenchmarkFetch compares a Fetcher with the library's Fetch, which waits for a
// batch to be complete before it asks for the next one.
func BenchmarkFetch(b *testing.B) {
	for _, places := range []int{1, 4, 16, 256} {
		b.Run(fmt.Sprintf("places=%d/fetcher", places), func(b *testing.B) { benchmark(b, places, fetcher) })
		b.Run(fmt.Sprintf("places=%d/library", places), func(b *testing.B) { benchmark(b, places, library) })
	}
}

func benchmark(b *testing.B, places int, fetch func(b *testing.B, e *env, places int)) {
	js, err := jetstream.New(natstest.Connect(b, natstest.Start(b)), jetstream.WithPublishAsyncMaxPending(1000))
	if err != nil {
		b.Fatal(err)
	}
	e := newEnv(b, js, "a")
	e.publish("a", b.N, nil, "x")
	b.ReportAllocs()
	b.ResetTimer()
	fetch(b, e, places)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
	b.StopTimer()
}

func fetcher(b *testing.B, e *env, places int) {
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	o := e.options(places, "a")
	o.Consumer = func(context.Context, string) error { return nil }
	var f *fetch.Fetcher
	left := b.N
	o.Handle = func(d fetch.Delivery) {
		if err := d.Ack(); err != nil {
			b.Error(err)
		}
		f.Done()
		if left--; left == 0 {
			b.StopTimer()
			cancel()
		}
	}
	f = fetch.New(o)
	f.Run(ctx)
}

func library(b *testing.B, e *env, places int) {
	c, err := e.js.Consumer(b.Context(), "S", "a")
	if err != nil {
		b.Fatal(err)
	}
	for left := b.N; left > 0; {
		batch, err := c.Fetch(min(places, left), jetstream.FetchMaxWait(time.Second))
		if err != nil {
			b.Fatal(err)
		}
		for msg := range batch.Messages() {
			if err := msg.Ack(); err != nil {
				b.Error(err)
			}
			left--
		}
	}
}
