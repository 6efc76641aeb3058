// Package pool runs functions in goroutines that it keeps for reuse, so that their
// stacks are grown once. It owns those goroutines, and must not know what they do, nor
// how many may run at once.
package pool

import (
	"sync"
	"sync/atomic"
)

// maxIdle caps the goroutines that are kept.
const maxIdle = 64

// Pool runs do for each item in a goroutine of its own.
type Pool[T any] struct {
	do      func(T)
	running sync.WaitGroup
	next    chan T // to a goroutine that is idle
	idle    atomic.Int32
	closed  chan struct{}
}

// New returns a Pool; Close ends it.
func New[T any](do func(T)) *Pool[T] {
	return &Pool[T]{do: do, next: make(chan T), closed: make(chan struct{})}
}

// Start runs do for the item and does not wait for it. It must not be called once
// Close is.
func (p *Pool[T]) Start(item T) {
	select {
	case p.next <- item:
	default:
		p.running.Add(1)
		go p.run(item)
	}
}

// Close waits until everything that was started has ended.
func (p *Pool[T]) Close() {
	close(p.closed)
	p.running.Wait()
}

// run does the item, and those that come after it.
func (p *Pool[T]) run(item T) {
	defer p.running.Done()
	for more := true; more; {
		p.do(item)
		item, more = p.another()
	}
}

// another waits for the next item. There is none if enough goroutines wait already, or
// the Pool is closed.
func (p *Pool[T]) another() (item T, more bool) {
	defer p.idle.Add(-1)
	if p.idle.Add(1) > maxIdle {
		return item, false
	}
	select {
	case item = <-p.next:
		return item, true
	case <-p.closed:
		return item, false
	}
}
