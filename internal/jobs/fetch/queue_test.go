package fetch

import (
	"container/heap"
	"fmt"
	"slices"
	"testing"
	"time"
)

// model is a Fetcher without a server: what each queue has is a number, and a
// request is answered after a round trip.
type model struct {
	*Fetcher

	now      time.Time
	events   events
	queued   []int // messages in each queue
	started  []int
	requests int
	hold     time.Duration // how long a message keeps its place
}

type event struct {
	at time.Time
	do func()
}

// events is a heap by time.
type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return e[i].at.Before(e[j].at) }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

const roundTrip = time.Millisecond

func newModel(places int, weights ...int) *model {
	m := &model{
		Fetcher: &Fetcher{free: places, poll: maxPoll(time.Minute, len(weights)), rest: maxRest(len(weights))},
		now:     time.Unix(1e9, 0), queued: make([]int, len(weights)), started: make([]int, len(weights)),
		hold: 20 * time.Millisecond,
	}
	for i, weight := range weights {
		m.queues = append(m.queues, &queue{Queue: Queue{Name: fmt.Sprint(i), Weight: weight}, index: i, ready: true})
	}
	return m
}

// equal is a model with that many queues of weight 1.
func equal(queues, places int) *model { return newModel(places, slices.Repeat([]int{1}, queues)...) }

func (m *model) after(d time.Duration, do func()) { heap.Push(&m.events, event{m.now.Add(d), do}) }

// run lets the model go on until its time is up or stop says so.
func (m *model) run(d time.Duration, stop func() bool) {
	for end := m.now.Add(d); m.now.Before(end) && !stop(); {
		asks, next := m.choose(m.now)
		for _, r := range asks {
			m.requests++
			m.open(r, nil, m.now)
			serial := r.queue.serial
			m.after(roundTrip, func() { m.answer(r.queue, r.wait == 0) })
			m.after(roundTrip+r.wait, func() {
				if r.queue.serial == serial {
					m.answer(r.queue, true)
				}
			})
		}
		if len(m.events) == 0 || !next.IsZero() && next.Before(m.events[0].at) {
			m.now = next
			continue
		}
		for m.now = m.events[0].at; len(m.events) > 0 && !m.events[0].at.After(m.now); {
			heap.Pop(&m.events).(event).do()
		}
	}
}

// put adds messages to a queue, which a request may wait for.
func (m *model) put(queue, n int) {
	m.queued[queue] += n
	m.answer(m.queues[queue], false)
}

// answer gives a request what there is; over: it waits for no more.
func (m *model) answer(q *queue, over bool) {
	for q.open && m.queued[q.index] > 0 && q.got < q.want {
		q.start(m.queues)
		m.queued[q.index]--
		m.started[q.index]++
		m.after(m.hold, func() { m.free++ })
	}
	if q.open && (over || q.got == q.want) {
		q.finish(m.now, m.rest)
		q.requested, q.open = false, false
		m.free += q.want - q.got
	}
}

func never() bool { return false }

func (m *model) total() (n int) {
	for _, s := range m.started {
		n += s
	}
	return n
}

func TestStartsFollowTheWeightsExactly(t *testing.T) {
	t.Parallel()
	for _, weights := range [][]int{{3, 1}, {5, 3, 2}, {1, 1, 1, 1}, {100, 1}} {
		for _, places := range []int{1, 3, 16, 64} {
			m := newModel(places, weights...)
			m.hold = 3 * time.Millisecond
			sum := 0
			for i, w := range weights {
				m.queued[i], sum = 10000, sum+w
			}
			m.run(time.Hour, func() bool { return m.total() >= 1000 })
			for i, w := range weights {
				want, slack := float64(m.total()*w)/float64(sum), float64(2*places)
				if got := float64(m.started[i]); got < want-slack || got > want+slack {
					t.Errorf("weights %v, %d places: queue %d had %v starts of %d, want %v", weights, places, i, got, m.total(), want)
				}
			}
		}
	}
}

func TestAnIdleQueueDoesNotMakeUpForItsRest(t *testing.T) {
	t.Parallel()
	m := newModel(4, 1, 1)
	m.hold = 5 * time.Millisecond
	m.put(0, 1<<20)
	m.run(time.Hour, func() bool { return m.started[0] >= 1000 })
	m.put(1, 1<<20)
	before := m.total()
	m.run(time.Hour, func() bool { return m.total()-before >= 400 })
	if got := m.started[1]; got < 150 || got > 220 {
		t.Errorf("the queue that was idle had %d of 400 starts, want half", got)
	}
}

// A message in any of 300 queues starts within 2 s, whether all others are idle or
// one of them has work for every place, and also where there is one place only.
func TestNoQueueWaitsLongForAFreePlace(t *testing.T) {
	t.Parallel()
	for _, places := range []int{1, 16, 300} {
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d places, busy %v", places, busy), func(t *testing.T) {
				t.Parallel()
				m := equal(300, places)
				if busy {
					m.put(0, 1<<20)
				}
				m.run(5*time.Second, never)
				for _, last := range []int{1, 150, 299} {
					from := m.now
					m.put(last, 1)
					m.run(10*time.Second, func() bool { return m.started[last] == 1 })
					if waited := m.now.Sub(from); waited > 2*time.Second {
						t.Errorf("the message in queue %d waited %s", last, waited)
					}
				}
			})
		}
	}
}

func TestIdleQueuesCostTwoHundredRequestsASecondAtMost(t *testing.T) {
	t.Parallel()
	for _, queues := range []int{2, 20, 100, 300} {
		for _, places := range []int{1, 16, 300} {
			m := equal(queues, places)
			m.run(10*time.Second, never) // every queue is found empty a few times first
			m.requests = 0
			m.run(10*time.Second, never)
			if m.requests > 2000+queues { // one round more may fit in
				t.Errorf("%d queues, %d places: %d requests in 10 s", queues, places, m.requests)
			}
		}
	}
}

func TestWhereThereIsAPlaceForEachQueueRequestsAreKept(t *testing.T) {
	t.Parallel()
	m := newModel(4, 100, 1, 1, 1)
	m.run(5*time.Second, never)
	for _, q := range m.queues {
		if !q.waiting {
			t.Errorf("queue %s has no request that waits", q.Name)
		}
	}
	from := m.now
	m.put(3, 1)
	m.run(time.Second, func() bool { return m.started[3] == 1 })
	if waited := m.now.Sub(from); waited > 10*roundTrip {
		t.Errorf("the message waited %s", waited)
	}
}

func TestAQueueThatHasWorkAgainIsLookedAtOftenAgain(t *testing.T) {
	t.Parallel()
	q := &queue{want: 1}
	now := time.Now()
	var rests []time.Duration
	for range 7 {
		q.finish(now, maxRest(300))
		rests = append(rests, q.rest)
	}
	if fmt.Sprint(rests) != "[50ms 100ms 200ms 400ms 800ms 1.5s 1.5s]" {
		t.Errorf("rests %s", rests)
	}
	q.got = 1
	if q.finish(now, maxRest(300)); q.idle || q.due.After(now) {
		t.Error("a request that was filled makes the queue rest")
	}
	q.got = 0
	if q.finish(now, maxRest(300)); q.rest != minRest {
		t.Errorf("after work it rests for %s", q.rest)
	}
}

func TestAQueueWhoseRequestFailedGetsOnePlaceAndTheOthersTheRest(t *testing.T) {
	t.Parallel()
	m := equal(3, 8)
	m.queues[0].refused = true
	asks, _ := m.choose(m.now)
	places := map[string]int{}
	for _, r := range asks {
		places[r.queue.Name] = r.slots
		if expires := r.wait > 0; expires != r.queue.refused {
			t.Errorf("the request to queue %s waits %s", r.queue.Name, r.wait)
		}
	}
	if places["0"] != 1 || places["1"]+places["2"] != 7 {
		t.Errorf("places %v", places)
	}
}

// An ack wait counts from before the request that brought its message.
func TestRequestNeverWaitsForMuchOfTheAckWait(t *testing.T) {
	t.Parallel()
	for _, window := range []time.Duration{time.Second, 2 * time.Second, 30 * time.Second, time.Hour} {
		if got := maxPoll(window, 1000) + min(maxGrace, window/4); got > window/2 {
			t.Errorf("ack wait %s: a request may take %s", window, got)
		}
	}
}
