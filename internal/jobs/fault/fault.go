// Package fault keeps what a worker is known to be unable to do, by name, as in "dead
// letters can't be written". It owns that list and its text, and must not know what is
// done or why.
package fault

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// life is how long a fault counts that is not seen again. What failed is tried again
// sooner, unless its job went to another worker.
const life = time.Minute

// Set is the current faults. A worker with one is not ready, and says which. The
// zero value has none.
type Set struct {
	mu  sync.Mutex
	now map[string]noted
}

type noted struct {
	err error
	at  time.Time
}

// Note records the last error of the operation with that name; nil: it succeeded.
func (s *Set) Note(name string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		delete(s.now, name)
		return
	}
	if s.now == nil {
		s.now = make(map[string]noted)
	}
	s.now[name] = noted{err, time.Now()}
}

// current returns the faults that count. The caller holds s.mu.
func (s *Set) current() map[string]noted {
	maps.DeleteFunc(s.now, func(_ string, n noted) bool { return time.Since(n.at) > life })
	return s.now
}

// Has reports whether the operation failed the last time.
func (s *Set) Has(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, failed := s.current()[name]
	return failed
}

// Any reports whether there is a fault.
func (s *Set) Any() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.current()) > 0
}

// Err returns the first fault by name, or nil.
func (s *Set) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := slices.Sorted(maps.Keys(s.current()))
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("%s, so what follows from jobs waits: %w; look at the stream and at this worker's permissions for it", names[0], s.now[names[0]].err)
}
