// Package fetch brings messages from the queues of a work-queue stream, as many
// as there are free places, and divides the places over the queues by weight.
//
// It owns the pull requests, the inbox that they are answered on, and the
// decision which queue is asked next. It knows nothing of what a message means:
// neither jobs nor their records. What has an ack subject as its reply is a
// message of the stream, whatever its headers say; everything else that arrives
// is the server's own.
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
	// longPoll is how long a request waits at an empty queue. Requests are never
	// cancelled, so it also bounds how long a queue keeps places from another.
	longPoll = time.Second
	// longestGrace is how long a request waits for an answer that is overdue.
	// Together with a wait at an empty queue it stays below the 2 s that one queue
	// may keep a free place from another.
	longestGrace = 1500 * time.Millisecond

	// shortestRest is how long a queue that was just found empty is passed over.
	// The rest doubles each time that the queue is still empty, see longestRest.
	shortestRest = 50 * time.Millisecond
	// lookEvery is how far apart looks at idle queues are on average: 200 a second.
	lookEvery = 5 * time.Millisecond

	// failurePause is the wait after a request or a lookup that failed.
	failurePause = time.Second
	// movedPause is the wait before a consumer is looked up whose leader changed.
	movedPause = 250 * time.Millisecond
	// lookupLimit bounds one lookup of a consumer; maxLookups is how many run at a
	// time.
	lookupLimit = 10 * time.Second
	maxLookups  = 16

	// longestSleep is how long Run rests if there is nothing to wait for.
	longestSleep = time.Minute
)

// longestPoll is how long a request may wait whose messages have that ack wait.
// The ack wait counts from before the request, so a request may use up a part of
// it only. Several hundred queues that all wait ask less often.
func longestPoll(window time.Duration, queues int) time.Duration {
	return min(max(longPoll, lookEvery*time.Duration(queues)), longestGrace, window/4)
}

// longestRest is how long one of that many queues may be passed over.
func longestRest(queues int) time.Duration {
	return min(max(lookEvery*time.Duration(queues), 5*shortestRest), longestGrace)
}

var errNotConnected = errors.New("not connected to NATS")

// Queue is one queue to fetch from. Its durable pull consumer has its name.
type Queue struct {
	Name   string
	Weight int // share of the starts while every queue has messages; below 1: 1
}

// Options are what a Fetcher is made of. All fields are required.
type Options struct {
	JS     jetstream.JetStream // its connection and API prefix are used
	Stream string
	Queues []Queue
	Places int           // how many messages may be in hand at a time
	Window time.Duration // ack wait of the consumers

	// Consumer makes sure that the consumer of a queue exists. It is called before
	// the first request, and again after one that failed.
	Consumer func(ctx context.Context, queue string) error
	// Handle gets each message and must not block: all queues wait for it. The
	// message has a place until Done is called.
	Handle func(Delivery)
	// Health is told what keeps a queue from being served, and nil once it is
	// served again.
	Health func(queue string, err error)
	Log    zerolog.Logger
}

// Fetcher fetches only what can start now. While every queue has messages they
// take turns by their weights; the share of an idle queue goes to the others.
type Fetcher struct {
	o       Options
	nc      *nats.Conn
	subject string        // of requests, up to the consumer's name
	poll    time.Duration // the longest wait at an empty queue
	grace   time.Duration // how long an answer may be overdue
	rest    time.Duration // the longest that an empty queue is passed over
	byName  map[string]*queue

	wake     chan struct{}
	lookups  sync.WaitGroup
	ended    atomic.Bool  // Run's context has ended
	handling atomic.Int64 // calls of Handle

	mu      sync.Mutex
	queues  []*queue
	free    int
	hungry  bool   // a queue could be asked if there were a place
	pauses  int    // fetching rests while it is above 0
	looking int    // lookups under way
	serial  uint64 // of the last request

	inboxes // of Run's goroutine
}

// New returns a Fetcher; Run starts it.
func New(o Options) *Fetcher {
	f := &Fetcher{
		o: o, nc: o.JS.Conn(), subject: topology.APIPrefix(o.JS) + "CONSUMER.MSG.NEXT." + o.Stream + ".",
		poll: longestPoll(o.Window, len(o.Queues)), grace: min(longestGrace, o.Window/4), rest: longestRest(len(o.Queues)),
		byName: make(map[string]*queue, len(o.Queues)), wake: make(chan struct{}, 1), free: o.Places,
	}
	for i, q := range o.Queues {
		q.Weight = max(q.Weight, 1)
		queue := &queue{Queue: q, index: i}
		f.queues = append(f.queues, queue)
		f.byName[q.Name] = queue
	}
	return f
}

// Run fetches until ctx ends, then waits for the requests under way. What they
// still bring goes to Handle like everything else; after Run has returned nothing
// does.
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
			if f.quiet() {
				return
			}
		} else {
			next = earlier(next, f.dispatch(ctx, now))
		}
		next = earlier(next, f.closeRetired(now))
		sleep := longestSleep
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

// earlier returns the earlier of two times, of which a zero one does not count.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Pause stops or resumes fetching; requests under way go on. Fetching resumes
// after as many calls with false as there were with true.
func (f *Fetcher) Pause(on bool) {
	f.mu.Lock()
	if on {
		f.pauses++
	} else {
		f.pauses--
	}
	f.mu.Unlock()
	f.nudge()
}

// Done gives the place of a message back.
func (f *Fetcher) Done() {
	f.mu.Lock()
	f.free++
	hungry := f.hungry
	f.mu.Unlock()
	if hungry {
		f.nudge()
	}
}

func (f *Fetcher) nudge() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// quiet reports whether nothing is under way any more.
func (f *Fetcher) quiet() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, q := range f.queues {
		if q.asked {
			return false
		}
	}
	return f.handling.Load() == 0
}

// dispatch sends the requests that can be sent, and returns when to look again if
// nothing happens until then; the zero time: only when something happens.
func (f *Fetcher) dispatch(ctx context.Context, now time.Time) time.Time {
	connected := f.nc.IsConnected()
	in, err := f.inbox()
	f.mu.Lock()
	next := f.lookUp(ctx, connected, now)
	asks, later := f.choose(now)
	for _, r := range asks {
		f.open(r, in, now)
		next = earlier(next, r.queue.deadline)
	}
	f.hungry = slices.ContainsFunc(f.queues, func(q *queue) bool { return q.ready && !q.asked })
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

// request is what a queue is to be asked for.
type request struct {
	queue  *queue
	places int
	wait   time.Duration // at an empty queue; 0: only what is there
}

// choose decides which queues are asked, and returns when to decide again.
func (f *Fetcher) choose(now time.Time) (asks []request, next time.Time) {
	if f.free == 0 || f.pauses > 0 {
		return nil, time.Time{}
	}
	var idle, due, contending []*queue
	for _, q := range f.queues {
		switch {
		case q.asked && !q.waiting:
			contending = append(contending, q)
		case q.asked || !q.ready:
		case now.Before(q.due) || len(f.queues) == 1:
			idle, next = append(idle, q), earlier(next, q.due)
		default:
			due = append(due, q)
		}
	}
	if len(due) > 0 {
		// A place that falls to a queue whose answer is on its way waits for that
		// answer, or the others would get more than their share.
		share := make([]int, len(due)+len(contending))
		all := append(due, contending...)
		divide(f.queues, all, share, f.free)
		for i, q := range due {
			if share[i] > 0 {
				asks = append(asks, request{queue: q, places: share[i], wait: q.look()})
			}
		}
		return asks, next
	}
	if len(contending) > 0 || len(idle) == 0 || len(idle) > f.free {
		return nil, next
	}
	// All are idle and each can have a place to wait with.
	share := make([]int, len(idle))
	for i := range share {
		share[i] = 1
	}
	divide(f.queues, idle, share, f.free-len(idle))
	for i, q := range idle {
		asks = append(asks, request{queue: q, places: share[i], wait: f.poll})
	}
	return asks, time.Time{}
}

// lookUp looks up the consumers that are not known to be there, without taking a
// place for it, and returns when to do so again.
func (f *Fetcher) lookUp(ctx context.Context, connected bool, now time.Time) (next time.Time) {
	for _, q := range f.queues {
		if !connected && !q.asked {
			q.ready = false
		}
		switch {
		case q.ready || q.asked || q.looking:
		case now.Before(q.retryAt):
			next = earlier(next, q.retryAt)
		case f.looking < maxLookups:
			q.looking = true
			f.looking++
			f.lookups.Go(func() { f.look(ctx, q) })
		}
	}
	return next
}

func (f *Fetcher) look(ctx context.Context, q *queue) {
	err := errNotConnected
	if f.nc.IsConnected() {
		limited, cancel := context.WithTimeout(ctx, lookupLimit)
		err = f.o.Consumer(limited, q.Name)
		cancel()
	}
	if err != nil || !q.refused {
		f.report(q, err)
	}
	f.mu.Lock()
	q.looking = false
	f.looking--
	q.ready = err == nil
	if err != nil {
		q.idle, q.retryAt = true, time.Now().Add(max(failurePause, f.rest))
	}
	f.mu.Unlock()
	f.nudge()
}

// report passes on what became of a queue. For each queue there is one caller at
// a time: its request or its lookup.
func (f *Fetcher) report(q *queue, err error) {
	if f.ended.Load() || err == nil && !q.faulty {
		return
	}
	q.faulty = err != nil
	f.o.Health(q.Name, err)
}
