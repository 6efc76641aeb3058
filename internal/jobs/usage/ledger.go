package usage

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/leader"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

const (
	// headerIncrement is what a counter adds.
	headerIncrement = "Nats-Incr"
	// exact ends the id of a record that replaces an estimate.
	exact = ".exact"
	// tryTimeout bounds one publish; it is repeated with the same id.
	tryTimeout = 2 * time.Second
	tryPause   = 100 * time.Millisecond
	// clockSlack allows for workers that read the server's clock a little
	// differently.
	clockSlack = 5 * time.Second
)

// Options are what a Ledger is made of. All are required.
type Options struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Tariff Tariff
	Labels []string // names of the labels by which days are added up, sorted
	// Window is how long both streams recognise an id: the shorter of their
	// duplicate windows.
	Window time.Duration
	Now    func() time.Time // about the server's clock
}

// Ledger writes usage records and adds them to the counters, each session once.
type Ledger struct {
	o   Options
	seq atomic.Uint64
}

// NewLedger returns a Ledger.
func NewLedger(o Options) *Ledger { return &Ledger{o: o} }

// Credits is what so much connected time costs.
func (l *Ledger) Credits(connected time.Duration) int64 { return l.o.Tariff.Credits(connected) }

// Sequence is the newest sequence of the counters' stream that this Ledger knows
// of: who has followed it so far has seen all that was stored here.
func (l *Ledger) Sequence() uint64 { return l.seq.Load() }

// Store writes the record and counts it, and reports whether that is new. It may be
// repeated, also days later: notedAt is when the session was written into its job's
// record, before which it can't have been stored. Within the duplicate window the
// server knows its id; after it the streams are searched.
func (l *Ledger) Store(ctx context.Context, r Record, notedAt time.Time) (fresh bool, err error) {
	recorded, counted := false, false
	if l.o.Now().Sub(notedAt) > l.o.Window/2 {
		if recorded, counted, err = l.search(ctx, r, r.ID(), notedAt); err != nil {
			return false, err
		}
	}
	// Both are on their way before either is waited for.
	var writing, counting func(context.Context) (*jetstream.PubAck, error)
	if !recorded {
		if writing, err = l.record(r, r.ID()); err != nil {
			return false, err
		}
	}
	failpoint.Here("usage_record")
	if !counted {
		counting = l.count(r, r.Totals(), r.ID())
	}
	if writing != nil {
		ack, err := writing(ctx)
		if err != nil {
			return false, err
		}
		fresh = !ack.Duplicate
	}
	if counting != nil {
		if _, err := counting(ctx); err != nil {
			return fresh, err
		}
	}
	failpoint.Here("usage")
	return fresh, nil
}

// Correct replaces an estimate by what the session really used: a second record of
// the session, which is not estimated and counts instead of the first.
func (l *Ledger) Correct(ctx context.Context, estimate, r Record) error {
	id := r.ID() + exact
	writing, err := l.record(r, id)
	if err == nil {
		_, err = writing(ctx)
	}
	if err != nil {
		return err
	}
	// The counter of the estimate takes the difference; the day may be another.
	if Counter(l.o.Names, estimate, l.o.Labels) == Counter(l.o.Names, r, l.o.Labels) {
		_, err = l.count(r, r.Totals().Minus(estimate.Totals()), id)(ctx)
		return err
	}
	if _, err := l.count(estimate, Totals{}.Minus(estimate.Totals()), r.ID()+".void")(ctx); err != nil {
		return err
	}
	_, err = l.count(r, r.Totals(), id)(ctx)
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

// record sends a usage record; wait returns when it is stored.
func (l *Ledger) record(r Record, id string) (wait func(context.Context) (*jetstream.PubAck, error), err error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("usage record %s: %w", id, err)
	}
	return l.send(l.o.Names.UsageStream(), &nats.Msg{Subject: l.o.Names.Usage(r.AppID, r.Queue), Data: data, Header: nats.Header{}}, id), nil
}

// count sends an increment; wait returns when it is stored.
func (l *Ledger) count(r Record, add Totals, id string) (wait func(context.Context) (*jetstream.PubAck, error)) {
	msg := &nats.Msg{Subject: Counter(l.o.Names, r, l.o.Labels), Header: nats.Header{headerIncrement: {add.Number().String()}}}
	sent := l.send(l.o.Names.TotalsStream(), msg, id)
	return func(ctx context.Context) (*jetstream.PubAck, error) {
		ack, err := sent(ctx)
		for err == nil {
			known := l.seq.Load()
			if ack.Sequence <= known || l.seq.CompareAndSwap(known, ack.Sequence) {
				break
			}
		}
		return ack, err
	}
}

// send publishes; wait returns the answer. Without one it publishes again until
// there is: because of the id that is stored once.
func (l *Ledger) send(stream string, msg *nats.Msg, id string) (wait func(context.Context) (*jetstream.PubAck, error)) {
	sent, sendErr := l.o.JS.PublishMsgAsync(msg, jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0))
	return func(ctx context.Context) (ack *jetstream.PubAck, err error) {
		if err = sendErr; err == nil {
			if ack, err = answer(ctx, sent); err == nil {
				return ack, nil
			}
		}
		if !final(err) {
			ack, err = l.again(ctx, &nats.Msg{Subject: msg.Subject, Header: msg.Header, Data: msg.Data}, id)
		}
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", stream, err)
		}
		return ack, nil
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

// again publishes until there is an answer.
func (l *Ledger) again(ctx context.Context, msg *nats.Msg, id string) (ack *jetstream.PubAck, err error) {
	err = retry.Until(ctx, retry.Backoff{Initial: tryPause, Max: time.Second}, final, func() error {
		ctx, cancel := context.WithTimeout(ctx, tryTimeout)
		defer cancel()
		ack, err = l.o.JS.PublishMsg(ctx, msg, jetstream.WithMsgID(id), jetstream.WithRetryAttempts(0))
		return err
	})
	return ack, err
}

// final reports whether a publish is of no use again: the server has refused it.
func final(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrMaxPayload) || errors.As(err, &api) && api.Code < 500
}

// search looks whether a record and its increment were stored since a time.
func (l *Ledger) search(ctx context.Context, r Record, id string, since time.Time) (recorded, counted bool, err error) {
	var gone bool // increments that old may have been dropped
	err = Scan(ctx, l.o.JS, l.o.Names.UsageStream(), l.o.Names.Usage(r.AppID, r.Queue), since.Add(-clockSlack), func(msg jetstream.Msg) error {
		recorded = recorded || msg.Headers().Get(nats.MsgIdHdr) == id
		return nil
	})
	if err != nil {
		return false, false, err
	}
	kept := 0
	err = Scan(ctx, l.o.JS, l.o.Names.TotalsStream(), Counter(l.o.Names, r, l.o.Labels), time.Time{}, func(msg jetstream.Msg) error {
		if meta, err := msg.Metadata(); err == nil && kept == 0 {
			gone = meta.Timestamp.After(since)
		}
		kept++
		counted = counted || msg.Headers().Get(nats.MsgIdHdr) == id
		return nil
	})
	if err != nil {
		return false, false, err
	}
	// Where the counter no longer shows it, the record does: the two are written
	// one after the other.
	if !counted && gone && kept >= topology.TotalsHistory {
		counted = recorded
	}
	return recorded, counted, nil
}

// Scan hands over the messages of a stream under filter that were stored since a
// time, oldest first; the zero time stands for the first one. It ends with what is
// stored now.
func Scan(ctx context.Context, js jetstream.JetStream, stream, filter string, since time.Time, f func(jetstream.Msg) error) error {
	c := jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}}
	if !since.IsZero() {
		c.DeliverPolicy, c.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	return scan(ctx, js, stream, c, f)
}

// ScanLast is Scan of the last message of each subject.
func ScanLast(ctx context.Context, js jetstream.JetStream, stream, filter string, f func(jetstream.Msg) error) error {
	return scan(ctx, js, stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{filter}, DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy}, f)
}

// scanIdle is how long the next message may take.
const scanIdle = 10 * time.Second

func scan(ctx context.Context, js jetstream.JetStream, stream string, c jetstream.OrderedConsumerConfig, f func(jetstream.Msg) error) error {
	c.InactiveThreshold = scanIdle
	var consumer jetstream.Consumer
	err := leader.Try(ctx, stream, func(ctx context.Context) (err error) {
		consumer, err = js.OrderedConsumer(ctx, stream, c)
		return err
	})
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	pending := consumer.CachedInfo().NumPending
	if pending == 0 {
		return nil
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(4096))
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	defer messages.Stop()
	for range pending {
		next, cancel := context.WithTimeout(ctx, scanIdle)
		msg, err := messages.Next(jetstream.NextContext(next))
		cancel()
		if err != nil {
			return fmt.Errorf("stream %s: %w", stream, err)
		}
		if err := f(msg); err != nil {
			return err
		}
		if meta, err := msg.Metadata(); err == nil && meta.NumPending == 0 {
			return nil
		}
	}
	return nil
}
