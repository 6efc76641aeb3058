package app

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// pauses are the queues that an operator has paused (JetStream's consumer
// pause), as they were when last looked at. A pause is not a fault.
type pauses struct {
	mu    sync.Mutex
	until map[string]time.Time // by queue
}

// set keeps what a queue's consumer says. until is zero where it is not paused;
// changed reports whether it was otherwise before.
func (p *pauses) set(queue string, info *jetstream.ConsumerInfo) (until time.Time, changed bool) {
	if info.Paused {
		until = time.Now().Add(info.PauseRemaining)
		if at := info.Config.PauseUntil; at != nil {
			until = *at
		}
		until = until.UTC().Truncate(time.Second)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.until[queue]
	if until.IsZero() {
		delete(p.until, queue)
	} else {
		if p.until == nil {
			p.until = make(map[string]time.Time)
		}
		p.until[queue] = until
	}
	return until, !until.Equal(before)
}

// String says which queues are paused; "" where none is.
func (p *pauses) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var texts []string
	for _, queue := range slices.Sorted(maps.Keys(p.until)) {
		if time.Now().Before(p.until[queue]) {
			texts = append(texts, fmt.Sprintf("queue %s is paused until %s", queue, p.until[queue].Format(time.RFC3339)))
		}
	}
	return strings.Join(texts, "; ")
}

func (a *App) logPause(queue string, until time.Time) {
	if until.IsZero() {
		a.log.Info().Str("queue", queue).Msg("queue is no longer paused")
		return
	}
	a.log.Info().Str("queue", queue).Time("until", until).Msg("queue is paused")
}
