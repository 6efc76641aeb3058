package fetch

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// retiredFor is how long messages that arrive late at an old inbox are returned.
const retiredFor = 10 * time.Second

// errDisconnected means that the connection broke, and the reply was lost with
// it.
var errDisconnected = errors.New("the connection to NATS broke while messages were requested")

// inboxes are the subscriptions for replies to requests. A message does not say
// which request it answers, only which consumer it comes from. So a request that
// was not fully answered is followed by a new inbox, and whatever arrives at the
// old one is known to be late.
type inboxes struct {
	current *inbox // nil: not yet made
	retired []*inbox
}

type inbox struct {
	prefix     string // of reply subjects, with its last dot
	sub        *nats.Subscription
	reconnects uint64 // of the connection, when it was made
	until      time.Time
}

// inbox returns the inbox for the next requests.
func (f *Fetcher) inbox() (*inbox, error) {
	if f.current != nil {
		return f.current, nil
	}
	in := &inbox{prefix: f.nc.NewInbox() + ".", reconnects: f.nc.Stats().Reconnects}
	sub, err := f.nc.Subscribe(in.prefix+">", func(msg *nats.Msg) { f.receive(in, msg) })
	if err != nil {
		return nil, fmt.Errorf("subscribe to an inbox: %w", err)
	}
	// No more messages arrive than slots were requested, but they may be large.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, errors.Join(fmt.Errorf("lift the limits of an inbox: %w", err), sub.Unsubscribe())
	}
	in.sub, f.current = sub, in
	return in, nil
}

// retire takes an inbox out of use.
func (f *Fetcher) retire(in *inbox, now time.Time) {
	if in == f.current {
		in.until = now.Add(max(min(f.o.Window, retiredFor), f.poll+f.grace))
		f.retired, f.current = append(f.retired, in), nil
	}
}

// closeRetired closes the inboxes at which nothing arrives any more, and returns
// when the next one is due.
func (f *Fetcher) closeRetired(now time.Time) time.Time {
	for len(f.retired) > 0 {
		if in := f.retired[0]; now.Before(in.until) {
			return in.until
		}
		f.close(f.retired[0])
		f.retired = f.retired[1:]
	}
	return time.Time{}
}

func (f *Fetcher) closeInboxes() {
	if f.current != nil {
		f.close(f.current)
	}
	for _, in := range f.retired {
		f.close(in)
	}
}

func (f *Fetcher) close(in *inbox) {
	if err := in.sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		f.o.Log.Warn().Err(err).Msg("cannot close an inbox")
	}
}

// open reserves the slots of a request that is about to be published.
func (f *Fetcher) open(r request, in *inbox, now time.Time) {
	q := r.queue
	f.serial++
	q.requested, q.open, q.waiting = true, true, r.wait > 0
	q.in, q.serial, q.want, q.got = in, f.serial, r.slots, 0
	q.from, q.deadline = now, now.Add(r.wait+f.grace)
	f.free -= r.slots
}

// publish sends an opened request.
func (f *Fetcher) publish(r request, in *inbox) {
	q := r.queue
	reply := make([]byte, 0, len(in.prefix)+24)
	reply = append(reply, in.prefix...)
	reply = strconv.AppendInt(reply, int64(q.index), 10)
	reply = append(reply, '.')
	reply = strconv.AppendUint(reply, q.serial, 10)
	body := make([]byte, 0, 48)
	body = append(body, `{"batch":`...)
	body = strconv.AppendInt(body, int64(r.slots), 10)
	if r.wait > 0 {
		body = append(body, `,"expires":`...)
		body = strconv.AppendInt(body, r.wait.Nanoseconds(), 10)
		body = append(body, '}')
	} else {
		body = append(body, `,"no_wait":true}`...)
	}
	if err := f.nc.PublishRequest(f.subject+q.Name, string(reply), body); err != nil {
		f.retire(in, q.from) // it may have been sent despite the error
		f.fail(q, q.serial, fmt.Errorf("request messages: %w", err))
	}
}

// expire ends the requests whose reply is overdue, and returns when to check for
// the next one.
func (f *Fetcher) expire(now time.Time) (next time.Time) {
	var over []*queue
	f.mu.Lock()
	for _, q := range f.queues {
		switch {
		case !q.open:
		case now.Before(q.deadline):
			next = earlier(next, q.deadline)
		default:
			over = append(over, q)
		}
	}
	f.mu.Unlock()
	for _, q := range over {
		err := f.noReplyError(q)
		f.retire(q.in, now)
		f.fail(q, q.serial, err)
	}
	return next
}

// noReplyError returns why a request was not answered.
func (f *Fetcher) noReplyError(q *queue) error {
	if !f.nc.IsConnected() || f.nc.Stats().Reconnects != q.in.reconnects {
		return errDisconnected
	}
	return fmt.Errorf("the server did not answer a request for messages: check that this user may publish to %s%s and subscribe to %s>", f.subject, q.Name, q.in.prefix)
}

// receive handles whatever arrives at an inbox.
func (f *Fetcher) receive(in *inbox, msg *nats.Msg) {
	if !strings.HasPrefix(msg.Reply, ackPrefix) {
		f.receiveStatus(in, msg)
		return
	}
	meta, err := parseAck(msg.Reply)
	if err != nil {
		f.o.Log.Warn().Err(err).Str("subject", msg.Subject).Msg("a message arrived that can't be acknowledged; it is ignored")
		return
	}
	f.deliver(in, Delivery{msg: msg, meta: meta, nc: f.nc})
}

// deliver passes a message on, or returns it if its request is over.
func (f *Fetcher) deliver(in *inbox, d Delivery) {
	f.mu.Lock()
	q := f.byName[d.meta.Consumer]
	if q == nil || !q.open || q.in != in {
		f.mu.Unlock()
		err := d.Nak()
		f.o.Log.Debug().Err(err).Str("queue", d.meta.Consumer).Uint64("stream_seq", d.meta.Sequence.Stream).Msg("returned a message that arrived after its request")
		return
	}
	q.start(f.queues)
	d.Queue, d.From = q.Name, q.from
	q.open = q.got < q.want
	last := !q.open
	f.handling.Add(1)
	f.mu.Unlock()

	f.o.Handle(d)
	if last {
		f.end(q, result{})
	}
	if f.handling.Add(-1) == 0 && f.ended.Load() {
		f.signal()
	}
}

// receiveStatus handles a status message of the server.
func (f *Fetcher) receiveStatus(in *inbox, msg *nats.Msg) {
	e, over := readStatus(msg.Header)
	index, number, _ := strings.Cut(strings.TrimPrefix(msg.Subject, in.prefix), ".")
	i, err := strconv.Atoi(index)
	if err != nil || i < 0 || i >= len(f.queues) || !over {
		return
	}
	serial, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return
	}
	if q := f.queues[i]; f.closeRequest(q, serial) {
		f.end(q, e)
	}
}

// result is the result of a request.
type result struct {
	err   error
	moved bool // the consumer has, or will have, another leader
	most  int  // what the consumer gives to one request; 0: as much as is asked for
}

// tooMany is how the server refuses a request for more than the consumer gives.
const tooMany = "exceeded maxrequestbatch of "

// readStatus parses the server's status. over is false if the request goes on.
func readStatus(header nats.Header) (e result, over bool) {
	status, text := header.Get("Status"), header.Get("Description")
	switch status {
	case "", "100":
		return result{}, false
	case "404", "408": // no messages, or fewer than requested
		return result{}, true
	case "503":
		return result{err: fmt.Errorf("request messages: no JetStream server or no such consumer: %w", nats.ErrNoResponders)}, true
	}
	switch lower := strings.ToLower(text); {
	case status != "409":
	case strings.Contains(lower, "leadership change"), strings.Contains(lower, "server shutdown"):
		return result{moved: true}, true
	case strings.HasPrefix(lower, tooMany):
		if most, err := strconv.Atoi(lower[len(tooMany):]); err == nil && most > 0 {
			return result{most: most}, true
		}
	case strings.Contains(lower, "consumer deleted"):
		return result{err: fmt.Errorf("request messages: %w", jetstream.ErrConsumerDeleted)}, true
	}
	return result{err: fmt.Errorf("request messages: the server answered %s %s", status, text)}, true
}

// closeRequest closes a request to further messages. It returns false if it was
// closed before.
func (f *Fetcher) closeRequest(q *queue, serial uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	open := q.open && q.serial == serial
	if open {
		q.open = false
	}
	return open
}

// fail ends a request with an error, unless it has ended.
func (f *Fetcher) fail(q *queue, serial uint64, err error) {
	if f.closeRequest(q, serial) {
		f.end(q, result{err: err})
	}
}

// end frees the unused slots of a request.
func (f *Fetcher) end(q *queue, e result) {
	f.report(q, e.err)
	now := time.Now()
	f.mu.Lock()
	q.finish(now, f.rest)
	q.requested = false
	f.free += q.want - q.got
	q.refused = false
	switch {
	case errors.Is(e.err, errDisconnected):
		q.idle, q.ready, q.retryAt = true, false, now
	case e.err != nil:
		q.idle, q.ready, q.retryAt, q.refused = true, false, now.Add(max(failurePause, f.rest)), true
	case e.moved:
		q.ready, q.retryAt = false, now.Add(movedPause)
	case e.most > 0:
		q.most, q.idle, q.rest, q.due = e.most, false, 0, now
	}
	f.mu.Unlock()
	f.signal()
}
