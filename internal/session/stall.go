package session

import (
	"sync"
	"time"
)

// minFlow is how long a source of speech may take for its next chunk, whatever
// the length of the last, before it counts as silent.
const minFlow = time.Second

// stallClock counts the time without a frame while speech is owed. It stands
// still while nothing was sent yet, while the source of speech is silent (the
// backend gives a frame for two to four seconds of speech: docs/protocol.md,
// section 4) and while our own OnFrame keeps the reader from reading.
type stallClock struct {
	mu      sync.Mutex
	ran     time.Duration // up to at, since the last frame
	at      time.Time
	until   time.Time // the source counts as silent from here; zero: never
	started bool
	busy    bool // OnFrame is running
	over    bool // nothing is owed any more
	timer   *time.Timer
}

// watch calls stalled once silence reaches limit.
func (c *stallClock) watch(limit time.Duration, stalled func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer = time.AfterFunc(limit, func() {
		if c.expired(limit) {
			stalled()
		}
	})
}

// expired says whether the limit is reached; where it is not, the timer is set
// to the next moment at which it may be.
func (c *stallClock) expired(limit time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return false
	}
	c.advance(time.Now())
	if c.ran >= limit {
		return true
	}
	c.timer.Reset(limit - c.ran)
	return false
}

// stop ends the watch.
func (c *stallClock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	if c.timer != nil {
		c.timer.Stop()
	}
}

// advance brings ran up to now.
func (c *stallClock) advance(now time.Time) {
	if c.started && !c.busy && !c.over {
		to := now
		if !c.until.IsZero() && c.until.Before(to) {
			to = c.until
		}
		if d := to.Sub(c.at); d > 0 {
			c.ran += d
		}
	}
	c.at = now
}

// sent says that a chunk has been sent. Unless it was the last, the source is
// asked for the next one, which is due when this one has been heard.
func (c *stallClock) sent(now time.Time, length time.Duration, last bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	c.started = true
	c.until = now.Add(max(length, minFlow))
	if last {
		c.until = time.Time{} // from here the backend alone is waited for
	}
}

// flowing says that there is speech at hand again: the source is not silent.
func (c *stallClock) flowing(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	c.until = time.Time{}
}

// frame says that a frame has come and is being handled.
func (c *stallClock) frame(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	c.ran, c.busy = 0, true
}

// handled says that the frame is, and whether it was the last.
func (c *stallClock) handled(now time.Time, last bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.busy = now, false
	c.over = c.over || last
}
