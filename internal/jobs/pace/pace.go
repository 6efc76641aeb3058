// Package pace spaces out the jobs that a worker returns to the queue to wait, for a
// circuit, a session limit, a budget or storage. The more jobs wait, the longer each
// stays away, so that jobs that can run are not delayed by them. It owns the
// count of waiting jobs, and must not know what they wait for except by name.
package pace

import (
	"sync"
	"time"
)

const (
	// returnsPerSecond is about how many waiting jobs are redelivered per second
	// in the whole fleet. returnsPerSlot is the same for a worker with many
	// slots, so that short sessions find the next job. JetStream delivers
	// redeliveries before new jobs, so both are capped.
	returnsPerSecond = 50
	returnsPerSlot   = 4
	maxReturns       = 1000
	// returnsShare is the part of a worker's slots that may be busy checking jobs
	// that then wait again.
	returnsShare = 0.25
)

// Pace counts the jobs that one worker has returned. It is safe for concurrent
// use.
type Pace struct {
	slots  int
	peers  func() int // workers of the fleet, this one included
	random func() float64

	mu        sync.Mutex
	waiting   map[string]*waiters
	dropped   int64         // the second in which those that came back were dropped last
	checkTime time.Duration // average time to check a waiting job
}

// waiters counts the jobs that wait for one thing, by the second in which they
// are redelivered.
type waiters struct {
	due   map[int64]int
	total int
}

// New returns a Pace for a worker with that many slots. peers returns how many
// workers the fleet has, this one included; random returns a number in [0, 1).
func New(slots int, peers func() int, random func() float64) *Pace {
	return &Pace{slots: slots, peers: peers, random: random, waiting: make(map[string]*waiters), checkTime: 5 * time.Millisecond}
}

// Next counts one more job that waits for what, and returns the delay before its
// redelivery: least, or more where many wait. began is when the check of the job
// began.
func (p *Pace) Next(what string, began time.Time, least time.Duration) time.Duration {
	peers := p.peers()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.checkTime += (now.Sub(began) - p.checkTime) / 16
	p.dropReturned(now)
	c := p.waiting[what]
	if c == nil {
		c = &waiters{due: make(map[int64]int)}
		p.waiting[what] = c
	}
	// Each thing has its own part of the rate, so a few jobs waiting for one
	// thing are not delayed by many waiting for another.
	spaced := float64(c.total*len(p.waiting)) / p.rate(peers)
	delay := max(least, time.Duration(spaced*(0.75+p.random()/4)*float64(time.Second)))
	c.due[now.Add(delay).Unix()]++
	c.total++
	return delay
}

// rate returns how many waiting jobs may be redelivered to this worker per
// second.
func (p *Pace) rate(peers int) float64 {
	own := returnsShare * float64(p.slots) / max(p.checkTime, time.Millisecond).Seconds()
	share := max(returnsPerSecond/float64(peers), float64(returnsPerSlot*p.slots))
	return max(1, min(own, share, maxReturns/float64(peers)))
}

// dropReturned removes the jobs whose redelivery is due. It goes through all waiters,
// so it runs at most once a second.
func (p *Pace) dropReturned(now time.Time) {
	if p.dropped == now.Unix() {
		return
	}
	p.dropped = now.Unix()
	for what, c := range p.waiting {
		for second, n := range c.due {
			if second < now.Unix() {
				c.total -= n
				delete(c.due, second)
			}
		}
		if c.total == 0 {
			delete(p.waiting, what)
		}
	}
}

// Spread returns a random duration around d, so that jobs returned together do
// not come back together.
func (p *Pace) Spread(d time.Duration) time.Duration {
	return time.Duration((0.5 + p.random()) * float64(d))
}
