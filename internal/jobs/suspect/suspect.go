// Package suspect keeps jobs apart that may have crashed their workers. A suspect
// runs only alongside jobs without crashes, so that the job that causes the crashes can
// be found. It counts the jobs in hand by their
// crashes, and must not know what a job or a record is.
package suspect

import "sync"

// after is the number of crashes after which a job is a suspect.
const after = 3

// MayRunTogether reports whether two jobs with these numbers of crashes may run on
// one worker at the same time. A suspect runs only alongside jobs without crashes, so
// that each job that kills its workers harms a suspect at most once.
func MayRunTogether(a, b int) bool { return max(a, b) < after || min(a, b) == 0 }

// Jobs are the jobs in hand that were running when a worker died. No job waits for
// them to end. The zero value has none.
type Jobs struct {
	mu        sync.Mutex
	byCrashes map[int]int // number of jobs
}

// Enter adds a job with so many crashes, and reports whether it may run alongside
// those in hand. If it may not, it is not added.
func (j *Jobs) Enter(crashes int) bool {
	if crashes == 0 {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for other := range j.byCrashes {
		if !MayRunTogether(crashes, other) {
			return false
		}
	}
	if j.byCrashes == nil {
		j.byCrashes = make(map[int]int)
	}
	j.byCrashes[crashes]++
	return true
}

// Leave removes a job that Enter has added, with the same number of crashes.
func (j *Jobs) Leave(crashes int) {
	if crashes == 0 {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.byCrashes[crashes]--; j.byCrashes[crashes] <= 0 {
		delete(j.byCrashes, crashes)
	}
}
