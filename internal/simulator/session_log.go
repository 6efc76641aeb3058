package simulator

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// maxListed bounds the lists that are kept for one session.
const maxListed = 1000

// Session is one session in the backend's log. Times are zero until the event
// happened.
type Session struct {
	ConnectionID string    `json:"connection_id"`
	AppID        string    `json:"app_id"`
	AvatarID     string    `json:"avatar_id"`
	Opened       time.Time `json:"opened"` // the upgrade was accepted
	Confirmed    time.Time `json:"confirmed,omitzero"`
	Closed       time.Time `json:"closed,omitzero"`
	// CloseCode is the code of the first close frame from either side; 1006 if
	// the TCP connection ended without one.
	CloseCode int    `json:"close_code,omitempty"`
	ClosedBy  string `json:"closed_by,omitempty"` // client or server
	Fault     string `json:"fault,omitempty"`     // that ended it

	SampleRate  int               `json:"sample_rate,omitempty"`
	AudioFormat string            `json:"audio_format,omitempty"`
	Egress      string            `json:"egress,omitempty"`
	ExtraParams map[string]string `json:"extra_params,omitempty"`

	Utterances   int      `json:"utterances"`  // fully received
	AudioBytes   int64    `json:"audio_bytes"` // received
	Frames       int      `json:"frames"`      // envelopes sent
	Ends         int      `json:"ends"`        // envelopes sent that end an utterance
	Interrupts   int      `json:"interrupts"`
	ReqIDs       []string `json:"req_ids,omitempty"`
	TraceParents []string `json:"trace_parents,omitempty"`
}

// Totals counts everything since the start or the last reset, including sessions
// that are no longer listed.
type Totals struct {
	Sessions     int            `json:"sessions"` // upgrades accepted
	Confirmed    int            `json:"confirmed"`
	Open         int            `json:"open"`
	Refused      int            `json:"refused"` // sessions refused before their confirm
	Peak         int            `json:"peak"`    // open at once
	PeakByApp    map[string]int `json:"peak_by_app"`
	TokenCalls   int            `json:"token_calls"`
	TokenRefused int            `json:"token_refused"`
	Faults       map[string]int `json:"faults"`  // faults that occurred, by name
	Dropped      int            `json:"dropped"` // closed sessions no longer listed
}

// sessionLog records what the backend saw.
type sessionLog struct {
	limit int

	mu       sync.Mutex
	sessions []*Session
	totals   Totals
	open     map[string]int // by app
	changed  chan struct{}  // closed and replaced when a session closes
}

func newSessionLog(limit int) *sessionLog {
	b := &sessionLog{limit: limit, open: map[string]int{}, changed: make(chan struct{})}
	b.totals.PeakByApp = map[string]int{}
	b.totals.Faults = map[string]int{}
	return b
}

// admit adds an open session. It returns false if its app has the maximum
// already.
func (b *sessionLog) admit(rec *Session, limit int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if limit > 0 && b.open[rec.AppID] >= limit {
		return false
	}
	b.open[rec.AppID]++
	b.totals.Open++
	b.totals.Sessions++
	b.totals.Peak = max(b.totals.Peak, b.totals.Open)
	b.totals.PeakByApp[rec.AppID] = max(b.totals.PeakByApp[rec.AppID], b.open[rec.AppID])
	b.sessions = append(b.sessions, rec)
	return true
}

// update changes a session's entry.
func (b *sessionLog) update(rec *Session, change func(*Session)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(rec)
}

func (b *sessionLog) confirmed(rec *Session, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec.Confirmed = now
	b.totals.Confirmed++
}

// closed marks a session as closed. code and by count only if no close was
// recorded before.
func (b *sessionLog) closed(rec *Session, now time.Time, code int, by string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !rec.Closed.IsZero() {
		return
	}
	rec.Closed = now
	if rec.CloseCode == 0 {
		rec.CloseCode, rec.ClosedBy = code, by
	}
	b.totals.Open--
	if b.open[rec.AppID]--; b.open[rec.AppID] == 0 {
		delete(b.open, rec.AppID)
	}
	close(b.changed)
	b.changed = make(chan struct{})
	// Only now and then, so that the cost per session stays constant.
	if len(b.sessions) > b.limit+b.limit/4+64 {
		b.dropOldest()
	}
}

// wait returns when at most n sessions are open.
func (b *sessionLog) wait(ctx context.Context, n int) error {
	for {
		b.mu.Lock()
		open, changed := b.totals.Open, b.changed
		b.mu.Unlock()
		if open <= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("simulator: %d sessions still open: %w", open, context.Cause(ctx))
		}
	}
}

// dropOldest removes the oldest closed sessions beyond the limit.
func (b *sessionLog) dropOldest() {
	excess := len(b.sessions) - b.totals.Open - b.limit
	b.sessions = slices.DeleteFunc(b.sessions, func(rec *Session) bool {
		if excess <= 0 || rec.Closed.IsZero() {
			return false
		}
		excess--
		b.totals.Dropped++
		return true
	})
}

func (b *sessionLog) countRefused() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.totals.Refused++
}

func (b *sessionLog) countFault(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.totals.Faults[name]++
}

func (b *sessionLog) countTokenCall() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.totals.TokenCalls++
}

func (b *sessionLog) countTokenRefused() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.totals.TokenRefused++
}

// reset removes the closed sessions and resets the totals.
func (b *sessionLog) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sessions = slices.DeleteFunc(b.sessions, func(rec *Session) bool { return !rec.Closed.IsZero() })
	open := b.totals.Open
	b.totals = Totals{Open: open, Peak: open, PeakByApp: maps.Clone(b.open), Faults: map[string]int{}}
}

func (b *sessionLog) snapshot() []Session {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]Session, len(b.sessions))
	for i, rec := range b.sessions {
		out[i] = *rec
		out[i].ReqIDs = slices.Clone(rec.ReqIDs)
		out[i].TraceParents = slices.Clone(rec.TraceParents)
		out[i].ExtraParams = maps.Clone(rec.ExtraParams)
	}
	return out
}

func (b *sessionLog) currentTotals() Totals {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.totals
	t.PeakByApp = maps.Clone(t.PeakByApp)
	t.Faults = maps.Clone(t.Faults)
	return t
}

// SessionLog lists the sessions that the backend accepted, oldest first. Of the
// closed ones it has at least the last Options.SessionLogLimit.
func (s *Server) SessionLog() []Session { return s.sessionLog.snapshot() }

// Totals returns the counts.
func (s *Server) Totals() Totals { return s.sessionLog.currentTotals() }

// ResetSessionLog removes the closed sessions, resets the totals and forgets how
// often each flaky avatar ID failed.
func (s *Server) ResetSessionLog() {
	s.sessionLog.reset()
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.failures)
}

// OpenSessions returns the number of open sessions.
func (s *Server) OpenSessions() int { return s.sessionLog.currentTotals().Open }

// WaitOpen returns when at most n sessions are open, or when ctx ends.
func (s *Server) WaitOpen(ctx context.Context, n int) error { return s.sessionLog.wait(ctx, n) }

// PeakSessions returns the most sessions that an app had open at once, or that
// all apps together had if app is empty.
func (s *Server) PeakSessions(app string) int {
	t := s.sessionLog.currentTotals()
	if app == "" {
		return t.Peak
	}
	return t.PeakByApp[app]
}

// Refused returns the number of sessions refused before they were confirmed, not
// counting token calls.
func (s *Server) Refused() int { return s.sessionLog.currentTotals().Refused }

// TokenCalls returns the number of token calls, including refused ones.
func (s *Server) TokenCalls() int { return s.sessionLog.currentTotals().TokenCalls }
