package streams

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// bulk is how many sequences behind a Tail reads through its own consumer:
	// that costs the server less than direct gets, but for making it.
	bulk = 4 * Batch
	// TailBudget is how many messages a Tail reads at a time once it has read all
	// there was: it must not keep what else there is to read from being read.
	TailBudget = 20 * Batch
)

// Message is one of a stream that a Tail reads.
type Message struct {
	Subject string
	Header  nats.Header
	Data    []byte // valid only during the call
	Seq     uint64
	Stored  time.Time
}

// Tail reads what is new in a stream, again and again, and notices what became of
// the old: messages that expired, and a stream that was made again. It has no
// consumer between two reads, so that it costs the server nothing while nothing is
// new, and what is overwritten meanwhile is never read.
type Tail struct {
	JS      jetstream.JetStream
	Stream  string
	Subject string
	// Since is when the first message of interest was stored at the earliest; nil:
	// all of them are of interest.
	Since       func() time.Time
	HeadersOnly bool // the bodies are not needed
	// Sparse means that most messages of the stream have other subjects, so that the
	// last one may have one. It may miss a message that a replica has only seconds
	// after the stream's leader.
	Sparse bool

	reader  *Reader
	begun   bool
	created time.Time // of the stream
	next    uint64    // sequence that comes next at the earliest
	first   uint64    // messages before it are gone
	last    uint64    // sequence of the stream's last message at the read before
}

// Follower is called by a Tail with what happened, in this order.
type Follower struct {
	Reset   func()             // the stream was made again: nothing of before counts
	Take    func([]Message)    // new messages in order
	Expired func(first uint64) // messages before that sequence are gone
}

// Read reads what is new. more means that it stopped at its budget. at is the server's
// time.
func (t *Tail) Read(ctx context.Context, f Follower) (at time.Time, more bool, err error) {
	stream, err := t.JS.Stream(ctx, t.Stream)
	if err != nil {
		return time.Time{}, false, fmt.Errorf("stream %s: %w", t.Stream, err)
	}
	info := stream.CachedInfo()
	at = info.TimeStamp.UTC()
	state := info.State
	budget := TailBudget
	if !t.begun || !info.Created.Equal(t.created) || state.LastSeq+1 < t.next {
		f.Reset()
		t.begun, t.created, t.next, t.first, t.last = true, info.Created, 0, 0, 0
		t.reader = NewReader(t.JS, t.Stream)
		budget = int(state.Msgs) + bulk // #nosec G115 -- all there is
	}
	if state.Msgs == 0 {
		t.next = max(t.next, state.LastSeq+1)
	}
	if t.next <= state.LastSeq {
		if more, err = t.readFrom(ctx, stream, state, f, budget); err != nil {
			t.begun = t.next > 0 // a first read that failed begins again
			return at, false, fmt.Errorf("stream %s: %w", t.Stream, err)
		}
	}
	if t.Sparse && !more {
		t.next = max(t.next, t.last+1)
		t.last = state.LastSeq
	}
	if !more && state.FirstSeq > t.first {
		t.first = state.FirstSeq
		f.Expired(t.first)
	}
	return at, more, nil
}

func (t *Tail) readFrom(ctx context.Context, stream jetstream.Stream, state jetstream.StreamState, f Follower, budget int) (more bool, err error) {
	if t.next == 0 && t.Since != nil || min(state.Msgs, state.LastSeq-t.next) >= bulk {
		return t.scan(ctx, stream, f, budget)
	}
	for t.next <= state.LastSeq {
		found, err := t.reader.Next(ctx, t.Subject, t.next, Batch)
		if err != nil || len(found) == 0 {
			return false, err
		}
		batch := make([]Message, len(found))
		for i, raw := range found {
			batch[i] = Message{Subject: raw.Subject, Header: raw.Header, Data: raw.Data, Seq: raw.Sequence, Stored: raw.Time}
		}
		t.next = batch[len(batch)-1].Seq + 1
		f.Take(batch)
		if budget -= len(batch); budget <= 0 {
			return true, nil
		}
	}
	return false, nil
}

// scan reads through a consumer.
func (t *Tail) scan(ctx context.Context, stream jetstream.Stream, f Follower, budget int) (more bool, err error) {
	cfg := jetstream.ConsumerConfig{FilterSubject: t.Subject, HeadersOnly: t.HeadersOnly, DeliverPolicy: jetstream.DeliverAllPolicy}
	switch {
	case t.next > 0:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, t.next
	case t.Since != nil:
		since := t.Since()
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	next := max(t.next, 1)
	batch := make([]Message, 0, Batch)
	err = Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		batch = append(batch, Message{Subject: msg.Subject(), Header: msg.Headers(), Data: msg.Data(), Seq: meta.Sequence.Stream, Stored: meta.Timestamp})
		next = meta.Sequence.Stream + 1
		if len(batch) == cap(batch) {
			f.Take(batch)
			batch = batch[:0]
		}
		budget--
		return budget > 0
	})
	if err != nil {
		return false, err // what was taken is taken again, which does no harm
	}
	f.Take(batch)
	t.next = next
	return budget <= 0, nil
}
