package jobs

import (
	"fmt"
	"maps"
	"slices"
	"sync"
)

// faults are the things that this worker is known to be unable to do, by name. A
// worker with one is not ready, and says which.
type faults struct {
	mu  sync.Mutex
	now map[string]error
}

// note takes in how what went; nil: it works.
func (f *faults) note(what string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.now, what)
		return
	}
	if f.now == nil {
		f.now = make(map[string]error)
	}
	f.now[what] = err
}

func (f *faults) has(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now[what] != nil
}

func (f *faults) any() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.now) > 0
}

// err is the first fault by name; nil: there is none.
func (f *faults) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.now) == 0 {
		return nil
	}
	names := slices.Sorted(maps.Keys(f.now))
	return fmt.Errorf("%s can't be written, so what follows from jobs waits: %w; look at the stream and at this worker's permissions for it", names[0], f.now[names[0]])
}
