package jobs

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
)

const (
	// longPoll is how long a request for jobs waits at an empty queue. It is
	// never cancelled (a cancelled one strands messages until their lease
	// ends), so it also bounds how long a queue keeps places from another. See
	// pollOf.
	longPoll = time.Second
	// shortPoll is used while there are fewer free places than queues.
	shortPoll = 250 * time.Millisecond
	// emptyFor is how long a queue found empty is passed over while others
	// have work.
	emptyFor = 50 * time.Millisecond
	// pullPause is the wait after a request that failed.
	pullPause = time.Second
)

// pollOf is how long a request may wait whose messages have leases of that
// window. A lease counts from before the request, so it may wait for a part of
// the window only.
func pollOf(window time.Duration) time.Duration { return min(longPoll, window/4) }

// Queue is one queue that a worker serves.
type Queue struct {
	Name   string
	Weight int // share of the starts while every queue has work
}

// delivery is one message in hand, with a moment before it was delivered.
type delivery struct {
	jetstream.Msg
	queue string
	from  time.Time
}

// puller fetches only what can start now. With work everywhere the queues take
// turns by their weights; the share of an idle one passes on.
type puller struct {
	queues   []*pulled
	handle   func(delivery)
	consumer func(ctx context.Context, queue string) (jetstream.Consumer, error)
	health   func(queue string, err error) // what keeps a queue from being served; nil: nothing
	log      zerolog.Logger
	poll     time.Duration // the longest request

	mu     sync.Mutex
	free   int
	pauses int // fetching rests while it is above 0
	wake   chan struct{}
	wg     sync.WaitGroup
}

type pulled struct {
	Queue
	consumer  jetstream.Consumer
	asked     bool      // a request is under way
	coming    int       // how many more jobs it may bring
	waiting   bool      // and it waits for jobs to come
	emptySeen time.Time // when it was last found empty; zero: it had work
	retryAt   time.Time // after a request that failed
	pass      float64   // virtual time: starts so far by weight
}

func newPuller(queues []Queue, places int, window time.Duration, handle func(delivery), log zerolog.Logger,
	consumer func(context.Context, string) (jetstream.Consumer, error), health func(string, error),
) *puller {
	p := &puller{free: places, poll: pollOf(window), handle: handle, consumer: consumer, health: health, log: log, wake: make(chan struct{}, 1)}
	for _, q := range queues {
		q.Weight = max(q.Weight, 1)
		p.queues = append(p.queues, &pulled{Queue: q})
	}
	return p
}

// run fetches until ctx ends, then waits for the requests under way. What they
// still bring is handed to handle like everything else.
func (p *puller) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		timer.Reset(p.dispatch(ctx, time.Now()))
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-timer.C:
		}
	}
	p.wg.Wait()
}

// pause stops or resumes fetching; what is under way goes on.
func (p *puller) pause(on bool) {
	p.mu.Lock()
	if on {
		p.pauses++
	} else {
		p.pauses--
	}
	p.mu.Unlock()
	p.nudge()
}

func (p *puller) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// done gives a place back.
func (p *puller) done() {
	p.mu.Lock()
	p.free++
	p.mu.Unlock()
	p.nudge()
}

// dispatch sends what requests can be sent, and returns when to look again if
// nothing happens until then.
func (p *puller) dispatch(ctx context.Context, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free == 0 || p.pauses > 0 {
		return longPoll
	}
	if len(p.queues) == 1 {
		p.send(ctx, p.candidates(now, 0), p.poll)
		return longPoll
	}
	if busy := p.candidates(now, emptyFor); len(busy) > 0 {
		p.send(ctx, p.contending(busy), 0)
		return emptyFor
	}
	if p.asking() {
		return emptyFor
	}
	wait := p.poll
	if p.free < len(p.queues) {
		wait = min(wait, shortPoll)
	}
	p.send(ctx, p.candidates(now, 0), wait)
	return emptyFor
}

// contending are the queues among which free places are divided: those that can
// be asked, and those whose answer is on its way. A place that falls to one of
// the latter waits for its answer, or whoever else comes first in that moment
// would get more than its share.
func (p *puller) contending(busy []*pulled) []*pulled {
	list := append([]*pulled(nil), busy...)
	for _, q := range p.queues {
		if q.asked && !q.waiting {
			list = append(list, q)
		}
	}
	return list
}

// asking tells whether a request is under way that answers at once: until then
// nobody knows whether all queues are empty.
func (p *puller) asking() bool {
	for _, q := range p.queues {
		if q.asked && !q.waiting {
			return true
		}
	}
	return false
}

// candidates are the queues that can be asked, but for those found empty less
// than pass ago.
func (p *puller) candidates(now time.Time, pass time.Duration) []*pulled {
	var list []*pulled
	for _, q := range p.queues {
		if !q.asked && !now.Before(q.retryAt) && now.Sub(q.emptySeen) >= pass {
			list = append(list, q)
		}
	}
	return list
}

// send divides the free places over the queues by their weights and asks for
// as many jobs; wait 0 asks for what is there.
func (p *puller) send(ctx context.Context, queues []*pulled, wait time.Duration) {
	share := p.divide(queues)
	for i, q := range queues {
		if share[i] == 0 || q.asked {
			continue
		}
		q.asked, q.coming, q.waiting = true, share[i], wait > 0
		p.free -= share[i]
		p.wg.Go(func() { p.fetch(ctx, q, share[i], wait) })
	}
}

// divide gives each free place to the queue that has had least for its weight.
func (p *puller) divide(queues []*pulled) []int {
	share := make([]int, len(queues))
	if len(queues) == 0 {
		return share
	}
	p.catchUp(queues)
	for range p.free {
		least := 0
		for i, q := range queues {
			if q.virtual(share[i]) < queues[least].virtual(share[least]) {
				least = i
			}
		}
		share[least]++
	}
	return share
}

// virtual is the queue's virtual time if n more of its jobs than those on their
// way were started.
func (q *pulled) virtual(n int) float64 { return q.pass + float64(q.coming+n)/float64(q.Weight) }

// catchUp keeps a queue that was idle from making up for it: its share has
// passed on. Where all were idle they begin anew, side by side.
func (p *puller) catchUp(queues []*pulled) {
	least, most, busy := 0.0, p.queues[0].pass, false
	for _, q := range p.queues {
		most = max(most, q.pass)
		if q.emptySeen.IsZero() && (!busy || q.pass < least) {
			least, busy = q.pass, true
		}
	}
	floor := least
	if !busy {
		floor = most
	}
	for _, q := range queues {
		if !q.emptySeen.IsZero() {
			q.pass = max(q.pass, floor)
		}
	}
}

// fetch asks for n jobs, hands them on as they come and gives back the places
// that stayed empty.
func (p *puller) fetch(ctx context.Context, q *pulled, n int, wait time.Duration) {
	got, err := p.request(ctx, q, n, wait)
	if ctx.Err() == nil {
		p.health(q.Name, err)
	}
	p.mu.Lock()
	q.asked, q.coming = false, 0
	p.free += n - got
	now := time.Now()
	switch {
	case err != nil:
		q.retryAt = now.Add(pullPause)
		q.consumer = nil // look it up again: it may have been deleted
		q.emptySeen = now
	case got < n:
		q.emptySeen = now
	default:
		q.emptySeen = time.Time{}
	}
	p.mu.Unlock()
	p.nudge()
}

func (p *puller) request(ctx context.Context, q *pulled, n int, wait time.Duration) (got int, err error) {
	if q.consumer == nil { // only this request uses it: one at a time for each queue
		if q.consumer, err = p.consumer(ctx, q.Name); err != nil {
			return 0, err
		}
	}
	from := time.Now()
	var batch jetstream.MessageBatch
	if wait == 0 {
		batch, err = q.consumer.FetchNoWait(n)
	} else {
		batch, err = q.consumer.Fetch(n, jetstream.FetchMaxWait(wait))
	}
	if err != nil {
		return 0, err
	}
	for msg := range batch.Messages() {
		got++
		p.started(q)
		p.handle(delivery{Msg: msg, queue: q.Name, from: from})
	}
	return got, batch.Error()
}

func (p *puller) started(q *pulled) {
	p.mu.Lock()
	p.catchUp([]*pulled{q}) // it may have waited long for this one
	q.pass += 1 / float64(q.Weight)
	q.coming-- // counted as started now
	p.mu.Unlock()
}

// returned takes a start back that was counted for the queue: the job went back
// because it could not start. Not for first deliveries: while many such jobs
// pour in, they would come before all those of other queues.
func (p *puller) returned(queue string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range p.queues {
		if q.Name == queue {
			q.pass -= 1 / float64(q.Weight)
		}
	}
}
