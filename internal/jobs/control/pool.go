package control

import (
	"strings"
	"sync"
)

// pool handles requests with a bounded number of goroutines, which end when there
// is nothing to do. It handles one request at a time for each job, in order of
// arrival, and the jobs in turn.
type pool struct {
	handle   func(*request)
	size     int // goroutines
	capacity int // waiting requests
	perJob   int // of which for one job

	running sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	workers int
	waiting int
	jobs    map[string][]*request // waiting requests by job; contains the job while one of its requests is handled
	next    []string              // jobs in order of their turn
}

func newPool(size, capacity, perJob int, handle func(*request)) *pool {
	return &pool{size: size, capacity: capacity, perJob: perJob, handle: handle, jobs: make(map[string][]*request)}
}

// add queues a request. It returns false if the pool is full or stopped.
func (p *pool) add(r *request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	queue, known := p.jobs[r.jobID]
	if p.closed || p.waiting >= p.capacity || len(queue) >= p.perJob {
		return false
	}
	p.jobs[r.jobID] = append(queue, r)
	p.waiting++
	if known {
		return true // its turn comes after the request before it
	}
	p.next = append(p.next, r.jobID)
	if p.workers < p.size {
		p.workers++
		p.running.Go(p.work)
	}
	return true
}

func (p *pool) work() {
	for r := p.take(nil); r != nil; r = p.take(r) {
		p.handle(r)
	}
}

// take ends the turn of the job whose request was done (nil: none), and returns
// the next request or nil.
func (p *pool) take(done *request) *request {
	p.mu.Lock()
	defer p.mu.Unlock()
	if done != nil {
		if len(p.jobs[done.jobID]) > 0 {
			p.next = append(p.next, done.jobID)
		} else {
			delete(p.jobs, done.jobID)
		}
	}
	if len(p.next) == 0 {
		p.workers--
		return nil
	}
	jobID := p.next[0]
	p.next = p.next[1:]
	queue := p.jobs[jobID]
	p.jobs[jobID] = queue[1:]
	p.waiting--
	return queue[0]
}

// stop prevents new requests from starting and returns those that have not
// started.
func (p *pool) stop() []*request {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var left []*request
	for jobID, queue := range p.jobs {
		left = append(left, queue...)
		p.jobs[jobID] = nil
	}
	p.next, p.waiting = nil, 0
	return left
}

func lastToken(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }
