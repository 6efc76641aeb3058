package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// Sizes of what the worker writes for a no-op job; the table shows the stored
// bytes of both, so that anyone can check them.
const (
	recordBytes    = 420
	outcomeBytes   = 410
	startedBytes   = 240
	completedBytes = 275
)

// bareQueue does the JetStream operations that our promises need for each job,
// and nothing else: fetch, record created, started event, record updated,
// completed event, double ack.
type bareQueue struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	names   topology.Names
	handles topology.Handles
	slots   int
}

func (r *bareQueue) start(ctx context.Context, p params) (answer, error) {
	nc, js, err := connect(p.NATS)
	if err != nil {
		return answer{}, err
	}
	r.nc, r.js, r.slots = nc, js, p.Concurrency
	r.handles, _, err = topology.Ensure(ctx, js, r.names, topology.DefaultSettings())
	return answer{}, err
}

func (r *bareQueue) stop() { r.nc.Close() }

func (r *bareQueue) do(ctx context.Context, c command) (answer, error) {
	begun := time.Now()
	var (
		wg     sync.WaitGroup
		faults atomic.Pointer[error]
		free   = make(chan struct{}, r.slots)
	)
	for range r.slots {
		free <- struct{}{}
	}
	for left := c.N; left > 0 && faults.Load() == nil; {
		n := 1
		<-free
		for more := true; more && n < left; {
			select {
			case <-free:
				n++
			default:
				more = false
			}
		}
		batch, err := r.handles.Consumers["default"].Fetch(n, jetstream.FetchMaxWait(time.Second))
		if err != nil {
			return answer{}, err
		}
		got := 0
		for msg := range batch.Messages() {
			got++
			wg.Go(func() {
				if err := r.job(ctx, msg); err != nil {
					faults.Store(&err)
				}
				free <- struct{}{}
			})
		}
		left -= got
		for range n - got {
			free <- struct{}{}
		}
	}
	wg.Wait()
	if err := faults.Load(); err != nil {
		return answer{}, *err
	}
	return answer{Elapsed: time.Since(begun)}, nil
}

var (
	bareRecord    = make([]byte, recordBytes)
	bareOutcome   = make([]byte, outcomeBytes)
	bareStarted   = make([]byte, startedBytes)
	bareCompleted = make([]byte, completedBytes)
)

// job is one job's operations, in the order in which the worker has to do them.
func (r *bareQueue) job(ctx context.Context, msg jetstream.Msg) error {
	meta, err := msg.Metadata()
	if err != nil {
		return err
	}
	id := "bare" + strconv.FormatUint(meta.Sequence.Stream, 10)
	revision, err := r.handles.State.Create(ctx, id, bareRecord)
	if err != nil {
		return err
	}
	if _, err := r.js.PublishMsgAsync(r.event("started", id, bareStarted)); err != nil {
		return err
	}
	if _, err := r.handles.State.Update(ctx, id, bareOutcome, revision); err != nil {
		return err
	}
	if _, err := r.js.PublishMsg(ctx, r.event("completed", id, bareCompleted)); err != nil {
		return err
	}
	return msg.DoubleAck(ctx)
}

func (r *bareQueue) event(kind, id string, body []byte) *nats.Msg {
	name := id + ".run1.s1." + kind
	return &nats.Msg{
		Subject: r.names.Events(kind, id), Data: body,
		Header: nats.Header{
			"ce-specversion": {"1.0"}, "ce-id": {name}, "ce-source": {"/avatarworker/bench"}, "ce-subject": {id},
			"ce-type": {"avatar.job." + kind}, "ce-time": {"2026-01-01T00:00:00.123456789Z"},
			"Content-Type": {"application/json"}, jetstream.MsgIDHeader: {name},
		},
	}
}

// connect is as the worker connects.
func connect(url string) (*nats.Conn, jetstream.JetStream, error) {
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(4096))
	return nc, js, err
}

// stored is what a run has left in the streams.
type stored struct {
	Messages uint64 // ever, jobs themselves included
	Bytes    uint64 // of records and events that are kept
}

// storedIn counts over the streams that a job touches.
func storedIn(ctx context.Context, url string) (s stored, err error) {
	nc, js, err := connect(url)
	if err != nil {
		return s, err
	}
	defer nc.Close()
	names := topology.Names{}
	for _, name := range []string{names.JobsStream(), names.EventsStream(), "KV_" + names.StateBucket()} {
		stream, streamErr := js.Stream(ctx, name)
		if streamErr != nil {
			return s, errors.Join(err, streamErr)
		}
		state := stream.CachedInfo().State
		s.Messages += state.LastSeq
		s.Bytes += state.Bytes
	}
	return s, nil
}

// fill publishes n jobs to the default queue.
func fill(ctx context.Context, url string, n int, job func(i int) []byte) error {
	nc, js, err := connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	subject := topology.Names{}.Jobs("default")
	for i := range n {
		if _, err := js.PublishAsync(subject, job(i)); err != nil {
			return fmt.Errorf("job %d: %w", i, err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
