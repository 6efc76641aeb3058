package circuit

import (
	"sync"
	"time"
)

// refusalPassed is how long no session of an app was refused before the next refusal is
// news again. While an app is at its limit, sessions are refused between others that
// start.
const refusalPassed = 10 * time.Minute

// TooMany says which refusals of one session too many are news. Such a refusal opens no
// circuit. The zero value is ready for use.
type TooMany struct {
	mu   sync.Mutex
	last map[string]time.Time // by app
}

// First reports whether it is the first refusal of the app, or the first since they had
// passed.
func (r *TooMany) First(app string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	before, known := r.last[app]
	if r.last == nil {
		r.last = make(map[string]time.Time)
	}
	r.last[app] = now
	return !known || now.Sub(before) > refusalPassed
}
