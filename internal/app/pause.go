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
// pause), as of the last check. A paused queue does not make the worker unready.
type pauses struct {
	mu    sync.Mutex
	until map[string]time.Time // by queue
}

// set takes in a queue's consumer. until is zero if it is not paused; changed
// reports whether it was different before.
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

// String lists the paused queues with their times; "" if there are none.
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
