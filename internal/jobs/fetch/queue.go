package fetch

import "time"

// queue is a queue with its request in flight.
type queue struct {
	Queue
	index int // in the list of queues; part of its requests' reply subjects

	ready     bool      // its consumer existed when it was last looked up
	lookingUp bool      // a lookup is in progress
	retryAt   time.Time // when it may be looked up
	unhealthy bool      // the last call of Health had an error
	refused   bool      // the last request was refused, or not answered

	requested bool // a request is in flight
	open      bool // it accepts messages
	waiting   bool // it waits for messages at an empty queue
	in        *inbox
	serial    uint64 // number of the last request, over all queues
	from      time.Time
	deadline  time.Time // of the reply
	want      int       // slots of the request
	got       int
	most      int // slots that one request may be for; 0: any number

	idle bool          // it was found empty or can't be requested from; false at the start
	rest time.Duration // how long it is skipped for that
	due  time.Time     // when it is checked again
	pass float64       // virtual time: starts so far by weight
}

// virtual returns the queue's virtual time if n more of its messages were
// started, besides those already requested.
func (q *queue) virtual(n int) float64 {
	if q.requested {
		n += q.want - q.got
	}
	return q.pass + float64(n)/float64(q.Weight)
}

// before reports whether a slot goes to q, with n slots already, rather than to
// other with m. The queue with the least for its weight comes first; among equals
// the one requested from longest ago, so that hundreds of idle queues don't keep
// another from its turn.
func (q *queue) before(n int, other *queue, m int) bool {
	a, b := q.virtual(n), other.virtual(m)
	return a < b || a == b && q.serial < other.serial
}

// divide adds each slot to the share of the queue that comes first. all are the
// queues, some are those that divide the slots. A queue whose last request failed
// gets at most one.
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

// catchUp prevents idle queues from making up for the time they were idle: their
// share has gone to others. If all were idle, they start again level.
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

// checkWait returns how long a request waits that only checks for messages: 0,
// except after a failed request. The server may leave a request without expiry
// unanswered as long as the consumer's max_ack_pending is reached.
func (q *queue) checkWait() time.Duration {
	if q.refused {
		return minRest
	}
	return 0
}

// atMost limits the slots of a request to what the consumer gives.
func (q *queue) atMost(slots int) int {
	if q.most > 0 {
		return min(slots, q.most)
	}
	return slots
}

// start counts an arrived message.
func (q *queue) start(all []*queue) {
	catchUp(all, q) // it may have been idle for long
	q.pass += 1 / float64(q.Weight)
	q.got++
}

// finish records how a request ended. A queue that stays empty is skipped for
// longer and longer.
func (q *queue) finish(now time.Time, longest time.Duration) {
	q.idle = q.got < q.want
	switch {
	case !q.idle:
		q.rest = 0
	case q.got > 0:
		q.rest = minRest
	default:
		q.rest = min(max(2*q.rest, minRest), longest)
	}
	q.due = now.Add(q.rest)
}

// Returned reverses a counted start: the message was returned because it could
// not start. Do not call it for first deliveries: if many such messages arrive,
// they would come before those of all other queues.
func (f *Fetcher) Returned(queue string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if q := f.byName[queue]; q != nil {
		q.pass -= 1 / float64(q.Weight)
	}
}
