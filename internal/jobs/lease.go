package jobs

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// ErrLeaseLost is the cause with which work is cancelled whose lease could not
// be extended in time.
var ErrLeaseLost = errors.New("the lease could not be extended in time")

// Leases extends the leases of all messages that a worker holds, from one
// place. An extension counts from the moment it was sent, and only once the
// server has confirmed it. A node of a cluster that was cut off with its worker
// goes on confirming, though, until it notices, and meanwhile the others give
// the message to somebody else: so no lease lasts longer than a window from the
// last moment of which is known that most of the cluster could hear this worker.
type Leases struct {
	nc       *nats.Conn
	window   time.Duration // ack wait
	margin   time.Duration // a lease is given up this long before it ends
	observe  func(ok bool)
	log      zerolog.Logger
	inbox    string // <inbox>.<lease>.<time sent, ns since start>
	sub      *nats.Subscription
	start    time.Time // monotonic
	stop     chan struct{}
	wg       sync.WaitGroup
	toExtend chan []uint64 // ids, from who looks to who sends
	// sending is held while one extension is sent, which may last as long as
	// the connection takes nothing.
	sending  sync.Mutex
	mu       sync.Mutex // guards what follows, never held while something is sent
	leases   map[uint64]*Lease
	sequence uint64
	heard    time.Time // see Heard; zero: nobody tells
}

// Lease is one message held.
type Lease struct {
	all     *Leases
	id      uint64
	subject string // the message's reply subject
	from    time.Time
	until   time.Time
	sent    time.Time
	open    bool // the last extension is not confirmed yet
	cancel  context.CancelCauseFunc
}

// NewLeases starts extending. window is the consumers' ack wait; observe is
// told of each extension, whether it was confirmed or given up.
func NewLeases(nc *nats.Conn, window time.Duration, observe func(ok bool), log zerolog.Logger) (*Leases, error) {
	l := &Leases{
		nc:       nc,
		window:   window,
		margin:   leaseMargin(window),
		observe:  observe,
		log:      log,
		inbox:    nc.NewInbox(),
		start:    time.Now(),
		stop:     make(chan struct{}),
		toExtend: make(chan []uint64),
		leases:   make(map[uint64]*Lease),
	}
	sub, err := nc.Subscribe(l.inbox+".>", l.confirmed)
	if err != nil {
		return nil, err
	}
	l.sub = sub
	l.wg.Go(l.run)
	l.wg.Go(l.send)
	return l, nil
}

// leaseMargin leaves time to close a session (a second at most) before its
// lease ends.
func leaseMargin(window time.Duration) time.Duration {
	return min(window/3, 3*time.Second)
}

// Hold extends the lease of the message with this reply subject until Release.
// from is a moment before the server can have delivered it. When the lease is
// as good as lost the returned context is cancelled with ErrLeaseLost.
func (l *Leases) Hold(ctx context.Context, reply string, from time.Time) (context.Context, *Lease) {
	ctx, cancel := context.WithCancelCause(ctx)
	now := time.Now()
	l.mu.Lock()
	l.sequence++
	lease := &Lease{all: l, id: l.sequence, subject: reply, from: from, until: from.Add(l.window), cancel: cancel, sent: now, open: true}
	l.leases[lease.id] = lease
	l.mu.Unlock()
	// At once: a delivery is remembered with the time the job was published,
	// so a job that queued for long would be delivered again to somebody else
	// as soon as the consumer's leader changes. Nobody waits for this one to be
	// confirmed, since the window has just begun; it stays open, so that the next
	// comes soon where the job lives that long. Not under the lock: where many
	// jobs begin together, each would wait for the others' writes.
	_ = l.nc.Publish(reply, ackProgress) // as in ask
	return ctx, lease
}

// Heard says that most of the cluster has heard this worker since then: a write
// that was sent at that time was acknowledged. What lasts no longer is given up
// before, even if nobody has looked since.
func (l *Leases) Heard(since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.giveUp(time.Now())
	if since.After(l.heard) {
		l.heard = since
	}
}

// end is when a lease ends. Its first window needs nobody to have heard: without
// most of the cluster nothing can be taken over in it.
func (l *Leases) end(x *Lease) time.Time {
	heard := l.heard
	if heard.Before(x.from) {
		heard = x.from
	}
	if bound := heard.Add(l.window); !l.heard.IsZero() && bound.Before(x.until) {
		return bound
	}
	return x.until
}

// giveUp gives up the leases that are about to end.
func (l *Leases) giveUp(now time.Time) {
	for id, lease := range l.leases {
		if l.end(lease).Sub(now) <= l.margin {
			delete(l.leases, id)
			lease.cancel(ErrLeaseLost)
			l.observe(false)
		}
	}
}

// Release ends the extension; the message is acknowledged or handed back next.
// No extension is on its way any more when it returns: one that came after a
// delayed hand-back would put off the delivery.
func (x *Lease) Release() {
	x.all.sending.Lock()
	x.all.mu.Lock()
	delete(x.all.leases, x.id)
	x.all.mu.Unlock()
	x.all.sending.Unlock()
	x.cancel(nil)
}

// Close ends all extensions and waits until the worker's side is still.
func (l *Leases) Close() {
	close(l.stop)
	l.wg.Wait()
	if err := l.sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		l.log.Debug().Err(err).Msg("unsubscribe lease confirmations")
	}
}

// run gives leases up and says which are to be extended. It never waits for
// the connection: a link that takes nothing would keep it from giving up.
func (l *Leases) run() {
	defer close(l.toExtend)
	ticker := time.NewTicker(min(max(l.window/30, 20*time.Millisecond), time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-ticker.C:
			l.sweep(time.Now())
		}
	}
}

// sweep gives up the leases that are about to end and has those extended that
// are due. It is cheap: one pass, no allocation but for what is sent.
func (l *Leases) sweep(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.giveUp(now)
	var due []uint64
	for id, lease := range l.leases {
		if now.Sub(lease.sent) >= l.due(lease) {
			due = append(due, id)
		}
	}
	if len(due) == 0 {
		return
	}
	select {
	case l.toExtend <- due:
	default: // the last ones are not out yet: these are due the next time, too
	}
}

// due is the wait before the next extension: short after one that was not
// confirmed, since it may have been lost with a connection.
func (l *Leases) due(lease *Lease) time.Duration {
	if lease.open {
		return l.window / 10
	}
	return l.window / 3
}

// send asks the server for another window for each lease that it is told.
func (l *Leases) send() {
	for due := range l.toExtend {
		for _, id := range due {
			l.extend(id)
		}
	}
}

// extend sends one extension, unless the lease ended meanwhile.
func (l *Leases) extend(id uint64) {
	l.sending.Lock()
	defer l.sending.Unlock()
	now := time.Now()
	l.mu.Lock()
	lease := l.leases[id]
	if lease != nil {
		lease.sent, lease.open = now, true
	}
	l.mu.Unlock()
	if lease != nil {
		l.ask(lease.subject, id, now)
	}
}

// ask sends the extension of a lease. The answer names the lease and the time
// of asking, so that the window counts from then.
func (l *Leases) ask(subject string, id uint64, now time.Time) {
	token := make([]byte, 0, len(l.inbox)+32)
	token = append(token, l.inbox...)
	token = append(token, '.')
	token = strconv.AppendUint(token, id, 36)
	token = append(token, '.')
	token = strconv.AppendInt(token, int64(now.Sub(l.start)), 36)
	// Without a connection it fails at once, which is like one that gets lost:
	// it is tried again soon, while the lease stands.
	_ = l.nc.PublishRequest(subject, string(token), ackProgress)
}

// ackProgress is the acknowledgement that extends a lease; with a reply subject
// the server confirms it.
var ackProgress = []byte("+WPI")

func (l *Leases) confirmed(msg *nats.Msg) {
	id, sent, ok := parseConfirmation(strings.TrimPrefix(msg.Subject, l.inbox+"."))
	if !ok || len(msg.Header) > 0 && msg.Header.Get("Status") != "" {
		return // no responders: the server is not there
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	lease := l.leases[id]
	// An answer that comes after the end may be one to a lease that ran out:
	// the server confirms those too. So a process that was frozen past its
	// lease has lost it, whatever waits for it when it wakes.
	if lease == nil || !time.Now().Before(l.end(lease)) {
		return
	}
	if until := l.start.Add(sent).Add(l.window); until.After(lease.until) {
		lease.until, lease.open = until, false
		l.observe(true)
	}
}

func parseConfirmation(token string) (id uint64, sent time.Duration, ok bool) {
	first, second, found := strings.Cut(token, ".")
	if !found {
		return 0, 0, false
	}
	id, err1 := strconv.ParseUint(first, 36, 64)
	ns, err2 := strconv.ParseInt(second, 36, 64)
	return id, time.Duration(ns), err1 == nil && err2 == nil
}
