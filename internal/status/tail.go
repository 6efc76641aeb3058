package status

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// bulk is how many sequences behind a tail reads through a consumer of its own:
	// that costs the server less than direct gets, but for making it.
	bulk = 4 * directBatch
	// tailBudget is how many messages a tail reads at a time once it has read all
	// there was: it must not keep what else there is to read from being read.
	tailBudget = 20 * directBatch
)

// tailed is a message of a stream that a tail reads.
type tailed struct {
	subject string
	header  nats.Header
	data    []byte // valid only during the call
	seq     uint64
	stored  time.Time
}

// tail reads what is new in a stream, again and again, and notices what became of
// the old: messages that expired, and a stream that was made again. It has no
// consumer between two reads, so that it costs the server nothing while nothing is
// new, and what is overwritten meanwhile is never read.
type tail struct {
	js      jetstream.JetStream
	stream  string
	subject string
	// since is when the first message of interest was stored at the earliest; nil:
	// all of them are of interest.
	since       func() time.Time
	headersOnly bool // the bodies are not needed
	// sparse means that most messages of the stream have other subjects, so that the
	// last one may have one. It may miss a message that a replica has only seconds
	// after the stream's leader.
	sparse bool

	reader  reader
	begun   bool
	created time.Time // of the stream
	next    uint64    // sequence that comes next at the earliest
	first   uint64    // messages before it are gone
	last    uint64    // sequence of the stream's last message at the read before
}

// follower is called by a tail with what happened, in this order.
type follower struct {
	reset   func()             // the stream was made again: nothing of before counts
	take    func([]tailed)     // new messages in order
	expired func(first uint64) // messages before that sequence are gone
}

// read reads what is new. more means that it stopped at its budget. at is the server's
// time.
func (t *tail) read(ctx context.Context, f follower) (at time.Time, more bool, err error) {
	stream, err := t.js.Stream(ctx, t.stream)
	if err != nil {
		return time.Time{}, false, fmt.Errorf("stream %s: %w", t.stream, err)
	}
	info := stream.CachedInfo()
	at = info.TimeStamp.UTC()
	state := info.State
	budget := tailBudget
	if !t.begun || !info.Created.Equal(t.created) || state.LastSeq+1 < t.next {
		f.reset()
		t.begun, t.created, t.next, t.first, t.last = true, info.Created, 0, 0, 0
		t.reader = reader{js: t.js, stream: t.stream}
		budget = int(state.Msgs) + bulk // #nosec G115 -- all there is
	}
	if state.Msgs == 0 {
		t.next = max(t.next, state.LastSeq+1)
	}
	if t.next <= state.LastSeq {
		if more, err = t.readFrom(ctx, stream, state, f, budget); err != nil {
			t.begun = t.next > 0 // a first read that failed begins again
			return at, false, fmt.Errorf("stream %s: %w", t.stream, err)
		}
	}
	if t.sparse && !more {
		t.next = max(t.next, t.last+1)
		t.last = state.LastSeq
	}
	if !more && state.FirstSeq > t.first {
		t.first = state.FirstSeq
		f.expired(t.first)
	}
	return at, more, nil
}

func (t *tail) readFrom(ctx context.Context, stream jetstream.Stream, state jetstream.StreamState, f follower, budget int) (more bool, err error) {
	if t.next == 0 && t.since != nil || min(state.Msgs, state.LastSeq-t.next) >= bulk {
		return t.scan(ctx, stream, f, budget)
	}
	for t.next <= state.LastSeq {
		found, err := t.reader.next(ctx, t.subject, t.next, directBatch)
		if err != nil || len(found) == 0 {
			return false, err
		}
		batch := make([]tailed, len(found))
		for i, raw := range found {
			batch[i] = tailed{subject: raw.Subject, header: raw.Header, data: raw.Data, seq: raw.Sequence, stored: raw.Time}
		}
		t.next = batch[len(batch)-1].seq + 1
		f.take(batch)
		if budget -= len(batch); budget <= 0 {
			return true, nil
		}
	}
	return false, nil
}

// scan reads through a consumer.
func (t *tail) scan(ctx context.Context, stream jetstream.Stream, f follower, budget int) (more bool, err error) {
	cfg := jetstream.ConsumerConfig{FilterSubject: t.subject, HeadersOnly: t.headersOnly, DeliverPolicy: jetstream.DeliverAllPolicy}
	switch {
	case t.next > 0:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, t.next
	case t.since != nil:
		since := t.since()
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	next := max(t.next, 1)
	batch := make([]tailed, 0, directBatch)
	err = Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		batch = append(batch, tailed{subject: msg.Subject(), header: msg.Headers(), data: msg.Data(), seq: meta.Sequence.Stream, stored: meta.Timestamp})
		next = meta.Sequence.Stream + 1
		if len(batch) == cap(batch) {
			f.take(batch)
			batch = batch[:0]
		}
		budget--
		return budget > 0
	})
	if err != nil {
		return false, err // what was taken is taken again, which does no harm
	}
	f.take(batch)
	t.next = next
	return budget <= 0, nil
}
