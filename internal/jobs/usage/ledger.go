package usage

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

const (
	// HeaderReplaces is of a record that replaces an estimate: what the estimate
	// says, as JSON of a Record.
	HeaderReplaces = "Avatar-Replaces"
	// exact ends the id of a record that replaces an estimate.
	exact = ".exact"
	// tryTimeout bounds one publish; it is repeated with the same id.
	tryTimeout = 2 * time.Second
	tryPause   = 100 * time.Millisecond
	// clockSlack allows for workers that read the server's clock a little
	// differently.
	clockSlack = 5 * time.Second
)

// Options configure a Ledger. All are required.
type Options struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Tariff Tariff
	Window time.Duration    // how long the stream recognises an id: its duplicate window
	Now    func() time.Time // about the server's clock
}

// Ledger writes usage records, each session once.
type Ledger struct {
	o   Options
	seq atomic.Uint64

	mu    sync.Mutex
	asked time.Time         // when Own was called last; zero: never
	own   map[uint64]Stored // what was stored since, by sequence
}

// NewLedger returns a Ledger.
func NewLedger(o Options) *Ledger { return &Ledger{o: o} }

// Credits is what so much connected time costs.
func (l *Ledger) Credits(connected time.Duration) int64 { return l.o.Tariff.Credits(connected) }

// Sequence is the sequence of the newest usage record that this Ledger has stored:
// who has followed the stream so far has seen all of them.
func (l *Ledger) Sequence() uint64 { return l.seq.Load() }

const (
	// ownFor is how long records are kept for Own after it was called last, and
	// maxOwn how many.
	ownFor = time.Minute
	maxOwn = 1 << 14
)

// Own returns the records after from up to upto, if this Ledger has stored them all
// and still knows them. It is for a caller that asks again and again: records are
// kept from the first time on.
func (l *Ledger) Own(from, upto uint64) (records []Stored, all bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = time.Now()
	if l.own == nil {
		l.own = make(map[uint64]Stored)
	}
	all = upto-from <= uint64(len(l.own))
	for seq := from + 1; all && seq <= upto; seq++ {
		var s Stored
		if s, all = l.own[seq]; all {
			records = append(records, s)
		}
	}
	for seq := range l.own {
		if seq <= upto {
			delete(l.own, seq)
		}
	}
	return records, all
}

// keep has Own know of a record.
func (l *Ledger) keep(s Stored) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.own == nil:
	case time.Since(l.asked) > ownFor || len(l.own) >= maxOwn:
		l.own = nil
	default:
		l.own[s.Seq] = s
	}
}

// Store writes the record, and reports whether that is new. It may be repeated, also
// days later: within the duplicate window the server knows its id, and after it the
// stream is searched for it.
func (l *Ledger) Store(ctx context.Context, r Record) (fresh bool, err error) {
	return l.Send(ctx, r)(ctx)
}

// Send is Store that does not wait: wait does.
func (l *Ledger) Send(ctx context.Context, r Record) (wait func(context.Context) (fresh bool, err error)) {
	// The record of a session that ended in good order can't be stored before its
	// end. An estimate's end is after that, and the worker may have written the truth.
	since := r.ended()
	if r.Estimated {
		since = r.ConfirmedAt
	}
	if l.o.Now().Sub(since) > l.o.Window/2 {
		stored, err := l.search(ctx, r, r.ID(), since)
		if err != nil || stored {
			return func(context.Context) (bool, error) { return false, err }
		}
	}
	failpoint.Here("usage_record")
	answer := l.send(r, r.ID(), nil)
	return func(ctx context.Context) (bool, error) {
		ack, err := answer(ctx)
		if err != nil {
			return false, err
		}
		failpoint.Here("usage")
		if !ack.Duplicate {
			l.keep(Stored{Seq: ack.Sequence, ID: r.ID(), Record: r})
		}
		return !ack.Duplicate, nil
	}
}

// Correct replaces an estimate by what the session actually used: a second record of
// the session, which is not estimated and counts instead of the first.
func (l *Ledger) Correct(ctx context.Context, estimate, r Record) error {
	replaced, err := json.Marshal(estimate)
	if err != nil {
		return err
	}
	_, err = l.send(r, r.ID()+exact, nats.Header{HeaderReplaces: {string(replaced)}})(ctx)
	return err
}

// Find looks for the records of a session that were stored since a time; estimate
// and exactly are nil where there is none.
func (l *Ledger) Find(ctx context.Context, r Record, since time.Time) (estimate, exactly *Record, err error) {
	err = Scan(ctx, l.o.JS, l.o.Names.UsageStream(), l.o.Names.Usage(r.AppID, r.Queue), since.Add(-clockSlack), func(msg jetstream.Msg) error {
		var found Record
		if json.Unmarshal(msg.Data(), &found) != nil || found.ID() != r.ID() {
			return nil
		}
		if found.Estimated {
			estimate = &found
		} else {
			exactly = &found
		}
		return nil
	})
	return estimate, exactly, err
}

// send publishes a record; wait returns the answer. Without one it publishes it again
// until there is: because of the id it is stored once.
func (l *Ledger) send(r Record, id string, header nats.Header) (wait func(context.Context) (*jetstream.PubAck, error)) {
	data, err := json.Marshal(r)
	if err != nil {
		return func(context.Context) (*jetstream.PubAck, error) {
			return nil, fmt.Errorf("usage record %s: %w", id, err)
		}
	}
	answer := publish(l.o.JS, &nats.Msg{Subject: l.o.Names.Usage(r.AppID, r.Queue), Header: header, Data: data}, id)
	return func(ctx context.Context) (*jetstream.PubAck, error) {
		ack, err := answer(ctx)
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", l.o.Names.UsageStream(), err)
		}
		for {
			known := l.seq.Load()
			if ack.Sequence <= known || l.seq.CompareAndSwap(known, ack.Sequence) {
				return ack, nil
			}
		}
	}
}

// publish sends a message; wait returns the answer. Without one it publishes again
// until there is.
func publish(js jetstream.JetStream, msg *nats.Msg, id string) (wait func(context.Context) (*jetstream.PubAck, error)) {
	if msg.Header == nil {
		msg.Header = nats.Header{}
	}
	sent, sendErr := js.PublishMsgAsync(msg, jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0))
	return func(ctx context.Context) (ack *jetstream.PubAck, err error) {
		if err = sendErr; err == nil {
			if ack, err = answer(ctx, sent); err == nil {
				return ack, nil
			}
		}
		if final(err) {
			return nil, err
		}
		again := &nats.Msg{Subject: msg.Subject, Header: msg.Header, Data: msg.Data}
		err = retry.Until(ctx, retry.Backoff{Initial: tryPause, Max: time.Second}, final, func() error {
			ctx, cancel := context.WithTimeout(ctx, tryTimeout)
			defer cancel()
			ack, err = js.PublishMsg(ctx, again, jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0))
			return err
		})
		return ack, err
	}
}

func answer(ctx context.Context, sent jetstream.PubAckFuture) (*jetstream.PubAck, error) {
	timer := time.NewTimer(tryTimeout)
	defer timer.Stop()
	select {
	case ack := <-sent.Ok():
		return ack, nil
	case err := <-sent.Err():
		return nil, err
	case <-timer.C:
		return nil, errUnanswered
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

var errUnanswered = errors.New("the publish was not acknowledged in time")

// codeStoreFailed is what a stream answers that is full.
const codeStoreFailed jetstream.ErrorCode = 10077

// final reports whether a publish is of no use again: the server has refused it.
func final(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrMaxPayload) ||
		errors.As(err, &api) && (api.Code < http.StatusInternalServerError || api.ErrorCode == codeStoreFailed)
}

// search looks whether a record was stored since a time.
func (l *Ledger) search(ctx context.Context, r Record, id string, since time.Time) (stored bool, err error) {
	err = Scan(ctx, l.o.JS, l.o.Names.UsageStream(), l.o.Names.Usage(r.AppID, r.Queue), since.Add(-clockSlack), func(msg jetstream.Msg) error {
		stored = stored || msg.Headers().Get(nats.MsgIdHdr) == id
		return nil
	})
	return stored, err
}
