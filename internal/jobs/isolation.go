package jobs

import (
	"sync"

	"avatarworker/internal/jobs/lifecycle"
)

// crashed counts the jobs in hand that were there when a worker died, by their
// crashes, and keeps apart those that may not run together. No job waits for
// it, and all other jobs run on.
type crashed struct {
	mu   sync.Mutex
	jobs map[int]int
}

// enter takes the job in, and reports whether it may run beside those that do.
func (c *crashed) enter(crashes int) bool {
	if crashes == 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for other := range c.jobs {
		if !lifecycle.MayRunTogether(crashes, other) {
			return false
		}
	}
	if c.jobs == nil {
		c.jobs = make(map[int]int)
	}
	c.jobs[crashes]++
	return true
}

func (c *crashed) leave(crashes int) {
	if crashes == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.jobs[crashes]--; c.jobs[crashes] <= 0 {
		delete(c.jobs, crashes)
	}
}
