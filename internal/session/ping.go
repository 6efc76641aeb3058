package session

import (
	"context"
	"fmt"
	"sync"
	"time"

	"avatarworker/internal/errors"
)

// pinger sends the pings of all sessions from one goroutine, which runs while
// there are sessions. A ping in flight has its own goroutine until it is
// answered.
type pinger struct {
	interval, timeout time.Duration

	mu       sync.Mutex
	sessions map[*Session]struct{}
	stopped  bool
	wake     chan struct{} // closed to end the goroutine; nil if there is none
	wg       sync.WaitGroup
}

// pingState belongs to a session. The pinger's goroutine owns it, except for
// answered.
type pingState struct {
	due      time.Time
	sentAt   time.Time     // zero: none under way
	busyThen time.Duration // handlerTime when it was sent
	answered chan error
}

func newPinger(interval, timeout time.Duration) *pinger {
	return &pinger{interval: interval, timeout: timeout, sessions: make(map[*Session]struct{})}
}

func (p *pinger) add(s *Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-s.ended: // its removal may be over
		return
	default:
	}
	if p.stopped {
		return
	}
	s.ping.due = time.Now().Add(p.interval)
	p.sessions[s] = struct{}{}
	if p.wake == nil {
		p.wake = make(chan struct{})
		p.wg.Add(1)
		go p.run(p.wake)
	}
}

// remove removes a session. The pinger's goroutine ends with the last one.
func (p *pinger) remove(s *Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.sessions, s)
	if len(p.sessions) == 0 && p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
}

// stop ends the goroutine and waits for it and for every ping.
func (p *pinger) stop() {
	p.mu.Lock()
	p.stopped = true
	if p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *pinger) run(wake <-chan struct{}) {
	defer p.wg.Done()
	// Fine enough to keep both times within a twentieth, coarse enough to cost
	// nothing with thousands of sessions.
	t := time.NewTicker(max(min(p.interval, p.timeout)/20, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-wake:
			return
		case now := <-t.C:
			p.sweep(now)
		}
	}
}

func (p *pinger) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.sessions {
		if s.ping.sentAt.IsZero() {
			if !now.Before(s.ping.due) {
				p.send(s, now)
			}
			continue
		}
		p.check(s, now)
	}
}

func (p *pinger) send(s *Session, now time.Time) {
	answered := make(chan error, 1)
	s.ping.sentAt, s.ping.busyThen, s.ping.answered = now, s.handlerTime(), answered
	p.wg.Go(func() { answered <- s.conn.Ping(context.Background()) })
}

// check ends the session if its ping was not answered in time. Time during which
// our own OnFrame blocked the reader does not count.
func (p *pinger) check(s *Session, now time.Time) {
	select {
	case err := <-s.ping.answered:
		// An error while the session is open means that the ping could not be
		// written during a long message; the next one will be.
		_ = err
		s.ping.sentAt = time.Time{}
		s.ping.due = now.Add(p.interval)
		return
	default:
	}
	waited := now.Sub(s.ping.sentAt) - (s.handlerTime() - s.ping.busyThen)
	if waited < p.timeout {
		return
	}
	delete(p.sessions, s)
	p.wg.Go(func() {
		s.kill(errors.FromCut(errors.PhaseRuntime, fmt.Errorf("a ping was not answered within %s", p.timeout)))
	})
}
