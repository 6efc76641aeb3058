// Package fetch fetches messages from the queues of a work-queue stream, as many
// as there are free slots, and divides the slots among the queues by weight.
//
// It owns the pull requests, their reply inboxes, and the choice of the next
// queue. It must not know what a message means: neither jobs nor their records.
// Whatever has an ack subject as its reply subject is a message of the stream,
// whatever its headers say; everything else comes from the server itself.
package fetch

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

const (
	// minPoll is how long a request waits at an empty queue. Requests are never
	// cancelled, so it also bounds how long one queue keeps slots from another.
	minPoll = time.Second
	// maxGrace is how long an overdue reply is waited for. Together with the wait
	// at an empty queue it stays below the 2 s for which one queue may keep a
	// free slot from another.
	maxGrace = 1500 * time.Millisecond

	// minRest is how long a queue that was just found empty is skipped. The time
	// doubles each time the queue is still empty, up to maxRest.
	minRest = 50 * time.Millisecond
	// idleCheckInterval is the average time between checks of idle queues: 200 a
	// second.
	idleCheckInterval = 5 * time.Millisecond

	// failurePause is the wait after a failed request or lookup.
	failurePause = time.Second
	// movedPause is the wait before looking up a consumer whose leader changed.
	movedPause = 250 * time.Millisecond
	// lookupTimeout bounds one lookup of a consumer. At most maxLookups run at a
	// time.
	lookupTimeout = 10 * time.Second
	maxLookups    = 16

	// maxSleep is how long Run sleeps if there is nothing to wait for.
	maxSleep = time.Minute
)

// maxPoll returns how long a request may wait at an empty queue if its messages
// have that ack wait. The ack wait counts from before the request, so the request
// may use only a part of it. If several hundred queues wait, each asks less
// often.
func maxPoll(window time.Duration, queues int) time.Duration {
	return min(max(minPoll, idleCheckInterval*time.Duration(queues)), maxGrace, window/4)
}

// maxRest returns how long one of that many queues may be skipped.
func maxRest(queues int) time.Duration {
	return min(max(idleCheckInterval*time.Duration(queues), 5*minRest), maxGrace)
}

var errNotConnected = errors.New("not connected to NATS")

// Queue is one queue to fetch from. Its durable pull consumer has the same name.
type Queue struct {
	Name   string
	Weight int // share of the starts while every queue has messages; below 1: 1
}

// Options configure a Fetcher. All fields are required.
type Options struct {
	JS     jetstream.JetStream // its connection and API prefix are used
	Stream string
	Queues []Queue
	Slots  int           // how many messages may be held at a time
	Window time.Duration // ack wait of the consumers

	// Consumer ensures that the consumer of a queue exists. It is called before
	// the first request and after each failed one.
	Consumer func(ctx context.Context, queue string) error
	// Handle is called with each message. It must not block, because all queues
	// wait for it. The message holds a slot until Done is called.
	Handle func(Delivery)
	// Health is called with the error that keeps a queue from being served, and
	// with nil once it is served again.
	Health func(queue string, err error)
	Log    zerolog.Logger
}

// Fetcher fetches only messages that can start now. While every queue has
// messages, queues take turns by weight; the share of an idle queue goes to the
// others.
type Fetcher struct {
	o       Options
	nc      *nats.Conn
	subject string        // of requests, up to the consumer's name
	poll    time.Duration // maximum wait at an empty queue
	grace   time.Duration // how long a reply may be overdue
	rest    time.Duration // how long an empty queue is skipped at most
	byName  map[string]*queue

	wake     chan struct{}
	lookups  sync.WaitGroup
	ended    atomic.Bool  // Run's context has ended
	handling atomic.Int64 // calls of Handle

	mu             sync.Mutex
	queues         []*queue
	free           int
	wantsSlot      bool   // a queue would be requested from if a slot were free
	pauses         int    // fetching stops while it is above 0
	lookupsRunning int    // lookups in progress
	serial         uint64 // of the last request

	inboxes // of Run's goroutine
}

// New returns a Fetcher; Run starts it.
func New(o Options) *Fetcher {
	f := &Fetcher{
		o: o, nc: o.JS.Conn(), subject: topology.APIPrefix(o.JS) + "CONSUMER.MSG.NEXT." + o.Stream + ".",
		poll: maxPoll(o.Window, len(o.Queues)), grace: min(maxGrace, o.Window/4), rest: maxRest(len(o.Queues)),
		byName: make(map[string]*queue, len(o.Queues)), wake: make(chan struct{}, 1), free: o.Slots,
	}
	for i, q := range o.Queues {
		q.Weight = max(q.Weight, 1)
		queue := &queue{Queue: q, index: i}
		f.queues = append(f.queues, queue)
		f.byName[q.Name] = queue
	}
	return f
}

// Run fetches until ctx ends, then waits for requests in flight. Messages that
// they still bring go to Handle as well. Handle is not called after Run has
// returned.
func (f *Fetcher) Run(ctx context.Context) {
	defer f.closeInboxes()
	defer f.lookups.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	done := ctx.Done()
	for {
		if ctx.Err() != nil {
			done = nil
			f.ended.Store(true)
		}
		now := time.Now()
		next := f.expire(now)
		if f.ended.Load() {
			if f.idle() {
				return
			}
		} else {
			next = earlier(next, f.dispatch(ctx, now))
		}
		next = earlier(next, f.closeRetired(now))
		sleep := maxSleep
		if !next.IsZero() {
			sleep = max(min(sleep, time.Until(next)), 0)
		}
		timer.Reset(sleep)
		select {
		case <-done:
		case <-f.wake:
		case <-timer.C:
		}
	}
}

// earlier returns the earlier of two times, ignoring a zero time.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Pause stops or resumes fetching; requests in flight continue. Fetching resumes
// after as many calls with false as with true.
func (f *Fetcher) Pause(on bool) {
	f.mu.Lock()
	if on {
		f.pauses++
	} else {
		f.pauses--
	}
	f.mu.Unlock()
	f.signal()
}

// Done frees the slot of a message.
func (f *Fetcher) Done() {
	f.mu.Lock()
	f.free++
	hungry := f.wantsSlot
	f.mu.Unlock()
	if hungry {
		f.signal()
	}
}

func (f *Fetcher) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// idle reports whether no request and no call of Handle is in flight.
func (f *Fetcher) idle() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, q := range f.queues {
		if q.requested {
			return false
		}
	}
	return f.handling.Load() == 0
}

// dispatch sends the requests that can be sent, and returns when to try again if
// nothing happens until then. The zero time means only when something happens.
func (f *Fetcher) dispatch(ctx context.Context, now time.Time) time.Time {
	connected := f.nc.IsConnected()
	in, err := f.inbox()
	f.mu.Lock()
	next := f.startLookups(ctx, connected, now)
	asks, later := f.choose(now)
	for _, r := range asks {
		f.open(r, in, now)
		next = earlier(next, r.queue.deadline)
	}
	f.wantsSlot = slices.ContainsFunc(f.queues, func(q *queue) bool { return q.ready && !q.requested })
	f.mu.Unlock()
	for _, r := range asks {
		if err == nil {
			f.publish(r, in)
		} else {
			f.fail(r.queue, r.queue.serial, err)
		}
	}
	return earlier(next, later)
}

// request is a planned request to a queue.
type request struct {
	queue *queue
	slots int
	wait  time.Duration // at an empty queue; 0: return only what is there
}

// choose decides which queues to request from, and returns when to decide again.
func (f *Fetcher) choose(now time.Time) (asks []request, next time.Time) {
	if f.free == 0 || f.pauses > 0 {
		return nil, time.Time{}
	}
	var idle, due, contending []*queue
	for _, q := range f.queues {
		switch {
		case q.requested && !q.waiting:
			contending = append(contending, q)
		case q.requested || !q.ready:
		case now.Before(q.due) || len(f.queues) == 1:
			idle, next = append(idle, q), earlier(next, q.due)
		default:
			due = append(due, q)
		}
	}
	if len(due) > 0 {
		// A slot that falls to a queue with a reply pending waits for that reply;
		// otherwise the others would get more than their share.
		share := make([]int, len(due)+len(contending))
		all := append(due, contending...)
		divide(f.queues, all, share, f.free)
		for i, q := range due {
			if share[i] > 0 {
				asks = append(asks, request{queue: q, slots: q.atMost(share[i]), wait: q.checkWait()})
			}
		}
		return asks, next
	}
	if len(contending) > 0 || len(idle) == 0 || len(idle) > f.free {
		return nil, next
	}
	// All queues are idle, and there is a slot for each to wait with.
	share := make([]int, len(idle))
	for i := range share {
		share[i] = 1
	}
	divide(f.queues, idle, share, f.free-len(idle))
	for i, q := range idle {
		asks = append(asks, request{queue: q, slots: q.atMost(share[i]), wait: f.poll})
	}
	return asks, time.Time{}
}

// startLookups looks up the consumers that are not known to exist, without using
// a slot, and returns when to do so again.
func (f *Fetcher) startLookups(ctx context.Context, connected bool, now time.Time) (next time.Time) {
	for _, q := range f.queues {
		if !connected && !q.requested {
			q.ready = false
		}
		switch {
		case q.ready || q.requested || q.lookingUp:
		case now.Before(q.retryAt):
			next = earlier(next, q.retryAt)
		case f.lookupsRunning < maxLookups:
			q.lookingUp = true
			f.lookupsRunning++
			f.lookups.Go(func() { f.runLookup(ctx, q) })
		}
	}
	return next
}

func (f *Fetcher) runLookup(ctx context.Context, q *queue) {
	err := errNotConnected
	if f.nc.IsConnected() {
		limited, cancel := context.WithTimeout(ctx, lookupTimeout)
		err = f.o.Consumer(limited, q.Name)
		cancel()
	}
	if err != nil || !q.refused {
		f.report(q, err)
	}
	f.mu.Lock()
	q.lookingUp = false
	f.lookupsRunning--
	q.ready = err == nil
	if err != nil {
		q.idle, q.retryAt = true, time.Now().Add(max(failurePause, f.rest))
	}
	f.mu.Unlock()
	f.signal()
}

// report reports a queue's health. Each queue has one caller at a time: its
// request or its lookup.
func (f *Fetcher) report(q *queue, err error) {
	if f.ended.Load() || err == nil && !q.unhealthy {
		return
	}
	q.unhealthy = err != nil
	f.o.Health(q.Name, err)
}
