package jobs

import "time"

const (
	// returnsPerSecond is about how often, over the fleet, jobs of an app whose
	// slots are all taken come back to be looked at; with many slots more
	// often, so that short sessions find the next job.
	returnsPerSecond   = 50
	returnsPerSlot     = 4
	maxReturn          = time.Minute
	minReturn          = time.Second
	returnSpread       = 2 * time.Second
	backlogSeconds     = 64 // more than maxReturn
	backlogPlacesShare = 2  // waiting jobs may take one in so many places
	// solePatience is how long a job waits for a slot where its worker has one
	// place. Other jobs get it meanwhile.
	solePatience = 500 * time.Millisecond
)

// join counts one more job that waits here; false: enough do. As many of an app
// as it has slots are kept, so that a slot that is freed is used at once; but
// half of the places stay free for jobs that can run. Where several apps wait
// each may have one job here, as long as one place is left.
func (s *Slots) join(slots *appSlots) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	share := max(1, s.places/backlogPlacesShare)
	if slots.waiting >= slots.limit || s.waiting >= share && (slots.waiting > 0 || s.waiting >= s.places-1) {
		return false
	}
	slots.waiting++
	s.waiting++
	return true
}

func (s *Slots) part(slots *appSlots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slots.waiting--
	s.waiting--
}

// comeBack counts a job of the app that is handed back, and gives the delay
// after which it may come again: the more of them there are, the longer. steady:
// they come back at the pace that is aimed at.
func (s *Slots) comeBack(app string) (delay time.Duration, steady bool) {
	delay, steady = minReturn+time.Duration(s.random()*float64(returnSpread)), true
	slots := s.apps[app]
	if slots == nil {
		return delay, steady
	}
	pace := max(returnsPerSecond, returnsPerSlot*slots.limit)
	peers := s.peers()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	wanted := time.Duration(slots.away.count(now)*peers) * time.Second / time.Duration(pace)
	steady = wanted <= maxReturn
	// Spread, so that those that were handed back together do not come together.
	wanted = time.Duration(float64(min(wanted, maxReturn)) * (0.75 + s.random()/4))
	delay = max(delay, wanted)
	slots.away.add(now.Add(delay))
	return delay, steady
}

// backlog counts jobs that were handed back and have not come again, by the
// second in which they do. The zero value has none.
type backlog struct {
	due   [backlogSeconds]int
	until int64 // the second up to which they have come
	total int
}

func (b *backlog) count(now time.Time) int {
	second := now.Unix()
	if second-b.until > backlogSeconds {
		*b = backlog{until: second}
	}
	for ; b.until < second; b.until++ {
		slot := &b.due[b.until%backlogSeconds]
		b.total -= *slot
		*slot = 0
	}
	return b.total
}

// add counts one more, due after count was called and at most maxReturn later.
func (b *backlog) add(due time.Time) {
	b.due[due.Unix()%backlogSeconds]++
	b.total++
}

// size is the number of workers that take jobs, as far as they have told, this
// one included.
func (f *fleet) size() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, now := 1, f.now()
	for _, other := range f.others {
		if other.Fresh(now) && !other.Draining {
			n++
		}
	}
	return n
}
