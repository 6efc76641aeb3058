package session

import (
	"sync"
	"time"
)

// minFlow is how long a source may take for its next chunk, whatever the length
// of the last one, before it counts as silent.
const minFlow = time.Second

// stallClock counts the time without a frame while the backend still has speech
// to answer. It stands still before anything is sent, while the source of speech
// is silent (the backend sends a frame for two to four seconds of speech:
// docs/protocol.md, section 4) and while our own OnFrame blocks the reader.
type stallClock struct {
	mu      sync.Mutex
	ran     time.Duration // up to at, since the last frame
	at      time.Time
	until   time.Time // the source counts as silent from here; zero: never
	started bool
	busy    bool // OnFrame is running
	over    bool // no more frames are expected
	timer   *time.Timer
}

// watch calls stalled once the counted time reaches limit.
func (c *stallClock) watch(limit time.Duration, stalled func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer = time.AfterFunc(limit, func() {
		if c.expired(limit) {
			stalled()
		}
	})
}

// expired reports whether the limit is reached. If not, it sets the timer to the
// next moment at which it may be.
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

// advance counts the time up to now.
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

// sent records that a chunk was sent. Unless it was the last, the next one is due
// when this one has been played.
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

// flowing records that the source has speech again.
func (c *stallClock) flowing(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	c.until = time.Time{}
}

// frame records that a frame has come and is being handled.
func (c *stallClock) frame(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(now)
	c.ran, c.busy = 0, true
}

// handled records that the frame was handled, and whether it was the last.
func (c *stallClock) handled(now time.Time, last bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.busy = now, false
	c.over = c.over || last
}
