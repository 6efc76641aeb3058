package status

import (
	"encoding/json"
	"time"

	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
)

// Cost is what sessions cost, as far as records and events know. A run whose
// record is gone, and which has no session time in an event, is not in it: it is
// "at least".
type Cost struct {
	Sessions  int   `json:"sessions"` // that the backend confirmed
	SessionMS int64 `json:"session_ms"`
	// Credits is what that time costs at least, by the configuration's cost.credit
	// and cost.minimum.
	Credits int64 `json:"credits"`
	// Estimated are sessions of the job's present run that were lost with their workers.
	// They come on top; the rest of them is what they may have used at most, as the
	// ledger has it.
	Estimated        int   `json:"estimated_sessions,omitempty"`
	EstimatedMS      int64 `json:"estimated_ms,omitempty"`
	EstimatedCredits int64 `json:"estimated_credits,omitempty"`
}

// cost adds up what is known of the job's sessions.
func (j *Job) cost(now time.Time, tariff usage.Tariff) Cost {
	var c Cost
	connections := make(map[string]bool)
	runs := make(map[int]time.Duration) // connected time by run
	for _, e := range j.History {
		var body struct {
			Run           int      `json:"run"`
			ConnectionID  string   `json:"connection_id"`
			ConnectionIDs []string `json:"connection_ids"`
			SessionMS     int64    `json:"session_ms"`
		}
		if json.Unmarshal(e.Data, &body) != nil {
			continue // another's message
		}
		for _, id := range append(body.ConnectionIDs, body.ConnectionID) {
			connections[id] = true
		}
		runs[body.Run] = max(runs[body.Run], time.Duration(body.SessionMS)*time.Millisecond)
	}
	if r := j.Record; r != nil {
		for _, id := range r.ConnectionIDs {
			connections[id] = true
		}
		connected := r.SessionTime
		if r.State == lifecycle.StateRunning && r.ConnectionID != "" && !r.StartedAt.IsZero() {
			connected += max(now.Sub(r.StartedAt), 0)
		}
		runs[r.Run] = max(runs[r.Run], connected)
		for _, s := range r.Usage {
			if s.Estimated {
				delete(connections, s.ConnectionID)
				c.Estimated++
				c.EstimatedMS += s.Connected.Milliseconds()
				c.EstimatedCredits += tariff.Credits(s.Connected)
			}
		}
	}
	delete(connections, "")
	c.Sessions = len(connections)
	var all time.Duration
	for _, connected := range runs {
		all += connected
	}
	c.SessionMS, c.Credits = all.Milliseconds(), tariff.Sum(all, c.Sessions)
	return c
}
