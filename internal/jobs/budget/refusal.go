package budget

import (
	"fmt"
	"time"
)

// Refusal says why a session may not start.
type Refusal struct {
	Key      string // app_id or label.<name>
	Value    string
	Per      string
	Credits  int64 // of the budget
	Spent    int64
	Reserved int64     // for sessions that run
	Until    time.Time // the end of the period
	Unknown  error     `json:"-"` // why what is spent is not known; nil: it is
}

// String is the refusal for people. It says nothing that changes while the budget
// holds jobs: they keep it as the reason of one hold.
func (r Refusal) String() string {
	if r.Unknown != nil {
		return fmt.Sprintf("what is left of the budget of %d credits per %s for %s %q is not known: the ledger, or what was set, can't be read, and the worker's readiness says why", r.Credits, r.Per, r.Key, r.Value)
	}
	return fmt.Sprintf("the budget of %d credits per %s for %s %q is spent, or reserved for running sessions; its jobs wait until %s or until it is raised (avatarworker cost budget)",
		r.Credits, r.Per, r.Key, r.Value, r.Until.Format(time.RFC3339))
}

const (
	// spentPause is about how long a job of a budget that is spent waits before it is
	// checked again: the budget may have been raised.
	spentPause = 5 * time.Second
	// reservedPause is for a budget fully reserved, but not fully spent: a session may
	// use less than is reserved for it.
	reservedPause = time.Second
)

// Pause is about how long the job waits before it is checked again.
func (r Refusal) Pause() time.Duration {
	if r.Spent < r.Credits && r.Unknown == nil {
		return reservedPause
	}
	return spentPause
}

// Warning is a budget of which a share is spent. Over: all of it.
type Warning struct {
	Refusal
	Over  bool
	Since time.Time // the begin of the period
}

// What names the warning among those of one budget and period.
func (w Warning) What() string {
	if w.Over {
		return "spent"
	}
	return "warning"
}

// String is the warning for people.
func (w Warning) String() string {
	text := "its jobs are held once all of it is spent"
	if w.Over {
		text = "its jobs are held until then or until it is raised (avatarworker cost budget)"
	}
	return fmt.Sprintf("%d of the %d credits per %s for %s %q are spent, with the period ending at %s: %s",
		w.Spent, w.Credits, w.Per, w.Key, w.Value, w.Until.Format(time.RFC3339), text)
}
