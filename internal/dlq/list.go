package dlq

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/topology"
)

const (
	minBatch = 32
	maxBatch = 512
	// minWindow and maxWindow are how many sequences are read at a time on the
	// way from the newest: more each time that little was found.
	minWindow = 256
	maxWindow = 8192
	// clockSlack is how much earlier than it failed a letter may have been
	// stored by the server's clock.
	clockSlack = 5 * time.Minute

	consumerLife = time.Minute
	cleanupTime  = 2 * time.Second
)

// lister reads headers through consumers of its own. The server filters for them, and
// removes those that are left behind. None is open while the caller works on a letter,
// which may take longer than the server keeps an idle consumer.
type lister struct {
	js     jetstream.JetStream
	stream jetstream.Stream
	names  topology.Names
	filter Filter
	limit  int
}

// oldest walks from the oldest letter until keep returns false, a batch at a time.
func (l lister) oldest(ctx context.Context, keep func(Entry) bool) error {
	cfg := jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	if !l.filter.After.IsZero() {
		from := l.filter.After.Add(-clockSlack)
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &from
	}
	batch := l.batch()
	for {
		var found []Entry
		if err := l.read(ctx, cfg, batch, func(e Entry) bool {
			found = append(found, e)
			return len(found) < batch
		}); err != nil {
			return err
		}
		for _, e := range found {
			if !keep(e) {
				return nil
			}
		}
		if len(found) < batch {
			return nil
		}
		cfg = jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: found[batch-1].Seq + 1}
	}
}

func (l lister) batch() int {
	if l.limit <= 0 {
		return maxBatch
	}
	return min(max(l.limit, minBatch), maxBatch)
}

// newest walks from the newest letter until keep returns false: window by
// window, since JetStream delivers forwards only.
func (l lister) newest(ctx context.Context, keep func(Entry) bool) error {
	info, err := l.stream.Info(ctx)
	if err != nil {
		return err
	}
	first, end := max(info.State.FirstSeq, 1), info.State.LastSeq+1 // 0: there was never a letter
	window := uint64(minWindow)
	for end > first {
		start := max(first, end-min(window, end))
		found, err := l.window(ctx, start, end)
		if err != nil {
			return err
		}
		for _, e := range slices.Backward(found) {
			if !keep(e) {
				return nil
			}
		}
		end = start
		window = min(window*4, maxWindow)
	}
	return nil
}

// window gives the letters with start <= sequence < end, oldest first.
func (l lister) window(ctx context.Context, start, end uint64) ([]Entry, error) {
	cfg := jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: start}
	var found []Entry
	err := l.read(ctx, cfg, int(min(end-start, maxBatch)), func(e Entry) bool {
		if e.Seq < end {
			found = append(found, e)
		}
		return e.Seq+1 < end
	})
	return found, err
}

// read passes on what the consumer delivers until keep returns false or all
// there is has been read.
func (l lister) read(ctx context.Context, cfg jetstream.ConsumerConfig, batch int, keep func(Entry) bool) error {
	cfg.FilterSubjects = l.filter.subjects(l.names)
	cfg.AckPolicy = jetstream.AckNonePolicy
	cfg.HeadersOnly, cfg.MemoryStorage, cfg.Replicas = true, true, 1
	cfg.InactiveThreshold = consumerLife
	c, err := l.stream.CreateConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	defer l.forget(ctx, c)
	p, err := newPuller(l.js, c.CachedInfo(), batch)
	if err != nil {
		return err
	}
	defer p.close()
	var received uint64
	for {
		n, more, err := l.fetch(ctx, p, received, keep)
		if err != nil || !more {
			return err
		}
		received += uint64(n)
		if n == batch {
			continue
		}
		if done, err := atEnd(ctx, c, received); err != nil || done {
			return err
		}
	}
}

// forget removes the consumer, also when ctx is done; where that fails the
// server does it a minute later.
func (l lister) forget(ctx context.Context, c jetstream.Consumer) {
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	_ = l.stream.DeleteConsumer(short, c.CachedInfo().Name) // see above
}

// fetch passes on one batch. Deliveries are numbered one after the other:
// a gap is a message that was lost on its way.
func (l lister) fetch(ctx context.Context, p *puller, received uint64, keep func(Entry) bool) (int, bool, error) {
	if err := p.request(); err != nil {
		return 0, false, err
	}
	n := 0
	for n < p.batch {
		msg, err := p.next(ctx)
		if err != nil || msg == nil {
			return n, true, err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return n, false, err
		}
		n++
		if meta.Sequence.Consumer != received+uint64(n) {
			return n, false, errInterrupted()
		}
		e := entry(l.names, stored{
			seq: meta.Sequence.Stream, subject: msg.Subject, header: msg.Header, time: meta.Timestamp, size: number(msg.Header, nats.MsgSize),
		})
		if !keep(e) {
			return n, false, nil
		}
	}
	return n, true, nil
}

// atEnd reports whether an incomplete batch was the last one.
func atEnd(ctx context.Context, c jetstream.Consumer, received uint64) (bool, error) {
	info, err := c.Info(ctx)
	if err != nil {
		return false, err
	}
	if info.Delivered.Consumer != received {
		return false, errInterrupted()
	}
	return info.NumPending == 0, nil
}

func errInterrupted() error {
	return fmt.Errorf("the connection to NATS was interrupted and the list is incomplete: run the command again")
}
