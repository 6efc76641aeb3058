package jobs

import (
	"sync"
	"time"
)

const (
	// minReturn is about the least time after which a job that waits for others
	// comes back.
	minReturn = 2 * time.Second
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
	// keyPause is about how long a job of an app whose key is refused to this
	// worker stays away.
	keyPause = 2 * time.Second
)

// pace spaces out the jobs that this worker hands back to wait: for a circuit, a
// session limit, storage. The more there are, the longer each stays away, so that
// those that can run are not kept from it however many wait.
type pace struct {
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

func newPace(slots int, peers func() int, random func() float64) *pace {
	return &pace{slots: slots, peers: peers, random: random, crowds: make(map[string]*crowd), look: 5 * time.Millisecond}
}

// next counts one more job that waits for what, and returns the delay after which
// it is to come back: least, or more where many wait. began is when the look at
// the job began.
func (p *pace) next(what string, began time.Time, least time.Duration) time.Duration {
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
func (p *pace) rate(peers int) float64 {
	own := returnsShare * float64(p.slots) / max(p.look, time.Millisecond).Seconds()
	share := max(returnsPerSecond/float64(peers), float64(returnsPerSlot*p.slots))
	return max(1, min(own, share, maxReturns/float64(peers)))
}

// forget drops what has come back.
func (p *pace) forget(now time.Time) {
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

// spread is a random time around d, so that jobs that were handed back together
// do not come together.
func (p *pace) spread(d time.Duration) time.Duration {
	return time.Duration((0.5 + p.random()) * float64(d))
}
