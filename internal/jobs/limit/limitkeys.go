package limit

import (
	"time"
)

// limitKeys are the keys of one limit.
type limitKeys struct {
	holders   map[int]holder // by number; a key without a worker is free
	busy      int            // keys with a worker
	waiting   int            // waiting jobs
	checkedAt time.Time      // when the holders' leases were last checked
	changed   chan struct{}  // closed and replaced when a key becomes free
}

// markFree marks the key as free at this revision; a job that takes the key
// replaces that revision.
func (l *Limits) markFree(p limitKey, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.keysOf(p.limit)
	if keys.holders[p.n].revision == revision {
		keys.set(p.n, holder{revision: revision})
		keys.notify()
	}
}

// setHeld records that this worker holds the key.
func (l *Limits) setHeld(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.writing = false
	l.keysOf(p.limit).set(p.n, h)
	l.held[p] = h
}

func (l *Limits) set(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keysOf(p.limit).set(p.n, h)
}

// update records what another worker wrote.
func (l *Limits) update(p limitKey, h holder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if keys := l.keysOf(p.limit); h.revision > keys.holders[p.n].revision && !keys.holders[p.n].writing {
		keys.set(p.n, h)
	}
}

// setRemoved records that a key was removed by a write after revision.
func (l *Limits) setRemoved(p limitKey, revision uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.keysOf(p.limit)
	if h, ok := keys.holders[p.n]; ok && h.revision <= revision && !h.writing {
		keys.set(p.n, holder{})
		keys.notify()
	}
	l.dropUnused(p.limit)
}

// keysOf returns the keys of a limit. Callers hold l.mu, here and below.
func (l *Limits) keysOf(limit string) *limitKeys {
	keys := l.keys[limit]
	if keys == nil {
		keys = &limitKeys{holders: make(map[int]holder), changed: make(chan struct{})}
		l.keys[limit] = keys
	}
	return keys
}

// dropUnused removes a limit without holders and waiting jobs: there may be one
// for each room that ever existed.
func (l *Limits) dropUnused(limit string) {
	if keys := l.keys[limit]; keys != nil && len(keys.holders) == 0 && keys.waiting == 0 {
		delete(l.keys, limit)
	}
}

// set stores the holder of a key; the zero holder means that the key is absent.
func (k *limitKeys) set(n int, h holder) {
	if k.holders[n].WorkerID != "" {
		k.busy--
	}
	if h.WorkerID != "" {
		k.busy++
	}
	if h == (holder{}) {
		delete(k.holders, n)
		return
	}
	k.holders[n] = h
}

func (k *limitKeys) notify() {
	close(k.changed)
	k.changed = make(chan struct{})
}

func (l *Limits) change(limit string) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.keysOf(limit).changed
}
