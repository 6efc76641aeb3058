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

	"avatarworker/internal/ack"
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

// Options configure a Ledger. All are required but Unanswered.
type Options struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Tariff Tariff
	Window time.Duration    // how long the stream recognises an id: its duplicate window
	Now    func() time.Time // by the server's clock
	// Unanswered is called when the stream did not take a record at the first attempt,
	// or could not be searched for one; nil: nothing is.
	Unanswered func()
}

// Ledger writes usage records, each session once.
type Ledger struct {
	o      Options
	sender *ack.Sender
	seq    atomic.Uint64

	mu    sync.Mutex
	asked time.Time         // when Own was called last; zero: never
	own   map[uint64]Stored // what was stored since, by sequence
}

// NewLedger returns a Ledger.
func NewLedger(o Options) *Ledger { return &Ledger{o: o, sender: ack.NewSender(o.JS.Conn())} }

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
	return l.Send(r)(ctx, 0)
}

// Send is Store that does not wait: wait does, at most for limit; 0: until ctx ends. A
// record for which the stream has to be searched is sent by wait too.
func (l *Ledger) Send(r Record) (wait func(ctx context.Context, limit time.Duration) (fresh bool, err error)) {
	// The record of a session that ended in good order can't be stored before its
	// end. An estimate's end is after that, and the worker may have written the truth.
	since := r.ended()
	if r.Estimated {
		since = r.ConfirmedAt
	}
	if l.o.Now().Sub(since) > l.o.Window/2 {
		return l.searchFirst(r, since)
	}
	failpoint.Here("usage_record")
	return l.send(r, r.ID(), nil).wait
}

// searchFirst is Send of a record that the stream may have had for longer than it
// recognises the id.
func (l *Ledger) searchFirst(r Record, since time.Time) (wait func(ctx context.Context, limit time.Duration) (fresh bool, err error)) {
	return func(ctx context.Context, limit time.Duration) (fresh bool, err error) {
		if limit > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit)
			defer cancel()
		}
		stored, err := l.search(ctx, r, r.ID(), since)
		if err != nil {
			l.unanswered()
		}
		if err != nil || stored {
			return false, err
		}
		failpoint.Here("usage_record")
		return l.send(r, r.ID(), nil).wait(ctx, 0)
	}
}

// Correct replaces an estimate by what the session actually used: a second record of
// the session, which is not estimated and counts instead of the first.
func (l *Ledger) Correct(ctx context.Context, estimate, r Record) error {
	replaced, err := estimate.AppendJSON(nil)
	if err != nil {
		return err
	}
	_, err = l.send(r, r.ID()+exact, nats.Header{HeaderReplaces: {string(replaced)}}).stored(ctx, 0)
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

// pending is a usage record that was sent.
type pending struct {
	l      *Ledger
	record Record
	id     string
	publication
}

func (l *Ledger) unanswered() {
	if l.o.Unanswered != nil {
		l.o.Unanswered()
	}
}

func (l *Ledger) send(r Record, id string, header nats.Header) *pending {
	p := &pending{l: l, record: r, id: id, publication: publication{unanswered: l.unanswered}}
	data, err := r.AppendJSON(make([]byte, 0, sizeHint))
	if err != nil {
		p.err = fmt.Errorf("%w: usage record %s: %w", errInvalid, id, err)
		return p
	}
	p.send(l.sender, &nats.Msg{Subject: l.o.Names.Usage(r.AppID, r.Queue), Header: header, Data: data}, id)
	return p
}

// wait reports whether the record is new.
func (p *pending) wait(ctx context.Context, limit time.Duration) (fresh bool, err error) {
	stored, err := p.stored(ctx, limit)
	if err != nil {
		return false, err
	}
	failpoint.Here("usage")
	if !stored.Duplicate {
		p.l.keep(Stored{Seq: stored.Sequence, ID: p.id, Record: p.record})
	}
	return !stored.Duplicate, nil
}

func (p *pending) stored(ctx context.Context, limit time.Duration) (jetstream.PubAck, error) {
	stored, err := p.publication.stored(ctx, p.l.o.JS.Conn(), limit)
	if err != nil {
		return stored, fmt.Errorf("stream %s: %w", p.l.o.Names.UsageStream(), err)
	}
	for {
		known := p.l.seq.Load()
		if stored.Sequence <= known || p.l.seq.CompareAndSwap(known, stored.Sequence) {
			return stored, nil
		}
	}
}

// publication is a message on its way to a stream that recognises its id.
type publication struct {
	msg  *nats.Msg
	sent ack.Sent
	err  error // of sending it
	// unanswered is called when the first attempt failed; nil: nothing is.
	unanswered func()
}

// send sends the message and does not wait.
func (p *publication) send(sender *ack.Sender, msg *nats.Msg, id string) {
	if msg.Header == nil {
		msg.Header = make(nats.Header, 1)
	}
	msg.Header[jetstream.MsgIDHeader] = []string{id}
	p.msg = msg
	p.sent, p.err = sender.Send(msg)
}

// stored waits for the answer. Without one it publishes the message again until there
// is one, ctx ends, or limit, unless it is 0, has passed: because of its id it is stored
// once. An answer that is there already costs neither a context nor a timer.
func (p *publication) stored(ctx context.Context, nc *nats.Conn, limit time.Duration) (stored jetstream.PubAck, err error) {
	begun, first := time.Now(), tryTimeout
	if limit > 0 {
		first = min(limit, first)
	}
	if err = p.err; err == nil {
		if stored, err = p.sent.Wait(ctx, first); err == nil {
			return stored, nil
		}
	}
	if p.unanswered != nil {
		p.unanswered()
	}
	if final(err) {
		return stored, err
	}
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, begun.Add(limit))
		defer cancel()
	}
	err = retry.Until(ctx, retry.Backoff{Initial: tryPause, Max: time.Second}, final, func() error {
		ctx, cancel := context.WithTimeout(ctx, tryTimeout)
		defer cancel()
		stored, err = ack.Publish(ctx, nc, p.msg)
		return err
	})
	return stored, err
}

// errInvalid: the record can't be written as JSON.
var errInvalid = errors.New("not a usage record")

// codeStoreFailed is what a stream answers that is full.
const codeStoreFailed jetstream.ErrorCode = 10077

// final reports whether a publish is of no use again: the server has refused it.
func final(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, errInvalid) || errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrMaxPayload) ||
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
