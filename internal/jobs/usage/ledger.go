package usage

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
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
}

// NewLedger returns a Ledger.
func NewLedger(o Options) *Ledger { return &Ledger{o: o} }

// Credits is what so much connected time costs.
func (l *Ledger) Credits(connected time.Duration) int64 { return l.o.Tariff.Credits(connected) }

// Sequence is the sequence of the newest usage record that this Ledger has stored:
// who has followed the stream so far has seen all of them.
func (l *Ledger) Sequence() uint64 { return l.seq.Load() }

// Store writes the record, and reports whether that is new. It may be repeated, also
// days later: within the duplicate window the server knows its id, and after it the
// stream is searched from the end of the session on.
func (l *Ledger) Store(ctx context.Context, r Record) (fresh bool, err error) {
	if l.o.Now().Sub(r.Ended()) > l.o.Window/2 {
		stored, err := l.search(ctx, r, r.ID(), r.Ended())
		if err != nil || stored {
			return false, err
		}
	}
	failpoint.Here("usage_record")
	ack, err := l.send(ctx, r, r.ID(), nil)
	if err != nil {
		return false, err
	}
	failpoint.Here("usage")
	return !ack.Duplicate, nil
}

// Correct replaces an estimate by what the session really used: a second record of
// the session, which is not estimated and counts instead of the first.
func (l *Ledger) Correct(ctx context.Context, estimate, r Record) error {
	replaced, err := json.Marshal(estimate)
	if err != nil {
		return err
	}
	_, err = l.send(ctx, r, r.ID()+exact, nats.Header{HeaderReplaces: {string(replaced)}})
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

// send publishes a record. Without an answer it publishes it again until there is
// one: because of the id it is stored once.
func (l *Ledger) send(ctx context.Context, r Record, id string, header nats.Header) (*jetstream.PubAck, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("usage record %s: %w", id, err)
	}
	ack, err := publish(ctx, l.o.JS, &nats.Msg{Subject: l.o.Names.Usage(r.AppID, r.Queue), Header: header, Data: data}, id)()
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

// publish sends a message; wait returns the answer. Without one it publishes again
// until there is.
func publish(ctx context.Context, js jetstream.JetStream, msg *nats.Msg, id string) (wait func() (*jetstream.PubAck, error)) {
	if msg.Header == nil {
		msg.Header = nats.Header{}
	}
	sent, sendErr := js.PublishMsgAsync(msg, jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0))
	return func() (ack *jetstream.PubAck, err error) {
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
