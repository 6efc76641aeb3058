// Package fault keeps what a worker is known to be unable to do, by name, as in "dead
// letters can't be written". It owns that list and its text, and must not know what is
// done or why.
package fault

import (
	"fmt"
	"maps"
	"slices"
	"sync"
)

// Set is the current faults. A worker with one is not ready, and says which. The
// zero value has none.
type Set struct {
	mu  sync.Mutex
	now map[string]error
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
		s.now = make(map[string]error)
	}
	s.now[name] = err
}

// Has reports whether the operation failed the last time.
func (s *Set) Has(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now[name] != nil
}

// Any reports whether there is a fault.
func (s *Set) Any() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.now) > 0
}

// Err returns the first fault by name, or nil.
func (s *Set) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.now) == 0 {
		return nil
	}
	name := slices.Sorted(maps.Keys(s.now))[0]
	return fmt.Errorf("%s, so what follows from jobs waits: %w; look at the stream and at this worker's permissions for it", name, s.now[name])
}
