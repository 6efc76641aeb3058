package fetch

import "time"

// queue is a queue with its request under way.
type queue struct {
	Queue
	index int // in the list of queues; part of its requests' reply subjects

	ready   bool      // its consumer was there when it was last looked up
	looking bool      // it is being looked up
	retryAt time.Time // when it may be looked up
	faulty  bool      // Health was told of an error last
	refused bool      // the last request was refused, or not answered

	asked    bool // a request is under way
	open     bool // and takes messages
	waiting  bool // and waits for messages to come
	in       *inbox
	serial   uint64 // number of the last request, over all queues
	from     time.Time
	deadline time.Time // no answer comes after it
	want     int       // places of the request
	got      int

	idle bool          // it was found empty, or can't be asked; at the start it is taken for busy
	rest time.Duration // how long it is passed over for that
	due  time.Time     // when it is looked at again
	pass float64       // virtual time: starts so far by weight
}

// virtual is the queue's virtual time if n more of its messages than those on
// their way were started.
func (q *queue) virtual(n int) float64 {
	if q.asked {
		n += q.want - q.got
	}
	return q.pass + float64(n)/float64(q.Weight)
}

// before reports whether a place falls to q, with n places already, rather than
// to other with m: to the one that has had least for its weight; of equals to the
// one that was asked longest ago, so that hundreds of idle queues keep none from
// its turn.
func (q *queue) before(n int, other *queue, m int) bool {
	a, b := q.virtual(n), other.virtual(m)
	return a < b || a == b && q.serial < other.serial
}

// divide adds each place to the share of the queue that comes first. all are the
// queues, of which some divide the places. One whose last request failed gets one
// at most.
func divide(all, some []*queue, share []int, places int) {
	if len(some) == 0 {
		return
	}
	catchUp(all, some...)
	for range places {
		first := -1
		for i, q := range some {
			if q.refused && share[i] > 0 {
				continue
			}
			if first < 0 || q.before(share[i], some[first], share[first]) {
				first = i
			}
		}
		if first < 0 {
			return
		}
		share[first]++
	}
}

// catchUp keeps queues that were idle from making up for it: their share has
// gone to others. Where all were idle they begin again side by side.
func catchUp(all []*queue, some ...*queue) {
	least, most, busy := 0.0, all[0].pass, false
	for _, q := range all {
		most = max(most, q.pass)
		if !q.idle && (!busy || q.pass < least) {
			least, busy = q.pass, true
		}
	}
	floor := least
	if !busy {
		floor = most
	}
	for _, q := range some {
		if q.idle {
			q.pass = max(q.pass, floor)
		}
	}
}

// look is how long a request waits that only looks at what there is: not at all,
// but after one that failed, since the server may leave a request that does not
// expire without an answer for as long as the consumer's max_ack_pending is
// reached.
func (q *queue) look() time.Duration {
	if q.refused {
		return shortestRest
	}
	return 0
}

// start counts a message that arrived.
func (q *queue) start(all []*queue) {
	catchUp(all, q) // it may have waited long for this one
	q.pass += 1 / float64(q.Weight)
	q.got++
}

// found notes how a request ended: a queue that is empty is passed over for
// longer and longer.
func (q *queue) found(now time.Time, longest time.Duration) {
	q.idle = q.got < q.want
	switch {
	case !q.idle:
		q.rest = 0
	case q.got > 0:
		q.rest = shortestRest
	default:
		q.rest = min(max(2*q.rest, shortestRest), longest)
	}
	q.due = now.Add(q.rest)
}

// Returned takes back a start that was counted for the queue: the message was
// handed back because it could not start. It is not for first deliveries: while
// many such messages pour in, they would come before all those of other queues.
func (f *Fetcher) Returned(queue string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if q := f.byName[queue]; q != nil {
		q.pass -= 1 / float64(q.Weight)
	}
}
