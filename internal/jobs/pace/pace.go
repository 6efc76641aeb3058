// Package pace spaces out the jobs that a worker hands back to wait: for a circuit,
// a session limit, storage. The more there are, the longer each stays away, so that
// those that can run are not kept from it however many wait. It knows nothing of
// what they wait for but a name.
package pace

import (
	"sync"
	"time"
)

const (
	// returnsPerSecond is about how many waiting jobs come back to be looked at, in
	// the whole fleet, and returnsPerSlot how many to a worker with many slots, so
	// that short sessions find the next job. Redeliveries come before new jobs, so
	// there is a limit to both.
	returnsPerSecond = 50
	returnsPerSlot   = 4
	maxReturns       = 1000
	// returnsShare is the part of a worker's slots that may be busy with jobs
	// that come back only to wait on.
	returnsShare = 0.25
)

// Pace counts the jobs that one worker has handed back. It is safe for concurrent
// use.
type Pace struct {
	slots  int
	peers  func() int // workers of the fleet, this one included
	random func() float64

	mu     sync.Mutex
	crowds map[string]*crowd
	look   time.Duration // what a look at a waiting job takes, on average
}

// crowd counts the jobs that wait for one thing, by the second in which they come
// back.
type crowd struct {
	due   map[int64]int
	total int
}

// New returns a Pace for a worker with that many slots; peers is how many workers
// the fleet has, this one included, and random returns a number in [0, 1).
func New(slots int, peers func() int, random func() float64) *Pace {
	return &Pace{slots: slots, peers: peers, random: random, crowds: make(map[string]*crowd), look: 5 * time.Millisecond}
}

// Next counts one more job that waits for what, and returns the delay after which
// it is to come back: least, or more where many wait. began is when the look at
// the job began.
func (p *Pace) Next(what string, began time.Time, least time.Duration) time.Duration {
	peers := p.peers()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.look += (now.Sub(began) - p.look) / 16
	p.forget(now)
	c := p.crowds[what]
	if c == nil {
		c = &crowd{due: make(map[int64]int)}
		p.crowds[what] = c
	}
	// Each thing waited for has its part of the rate: a few that wait for one are
	// not kept away by a crowd that waits for another.
	spaced := float64(c.total*len(p.crowds)) / p.rate(peers)
	delay := max(least, time.Duration(spaced*(0.75+p.random()/4)*float64(time.Second)))
	c.due[now.Add(delay).Unix()]++
	c.total++
	return delay
}

// rate is how many waiting jobs may come back to this worker in a second.
func (p *Pace) rate(peers int) float64 {
	own := returnsShare * float64(p.slots) / max(p.look, time.Millisecond).Seconds()
	share := max(returnsPerSecond/float64(peers), float64(returnsPerSlot*p.slots))
	return max(1, min(own, share, maxReturns/float64(peers)))
}

// forget drops what has come back.
func (p *Pace) forget(now time.Time) {
	for what, c := range p.crowds {
		for second, n := range c.due {
			if second < now.Unix() {
				c.total -= n
				delete(c.due, second)
			}
		}
		if c.total == 0 {
			delete(p.crowds, what)
		}
	}
}

// Spread is a random time around d, so that jobs that were handed back together
// do not come together.
func (p *Pace) Spread(d time.Duration) time.Duration {
	return time.Duration((0.5 + p.random()) * float64(d))
}
