// Package lifecycle keeps the record of each job: its states, the transitions between
// them, and the decisions that depend on it, such as what to do with a delivery and
// when to retry. It owns the record's JSON and its fence, the revision, and what events
// say of a record. It must not know how a session runs, nor publish anything.
package lifecycle

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/usage"
)

// State is a job's state: on its way, or one of the outcomes.
type State string

const (
	StateRunning  State = "running"
	StateRetrying State = "retrying"
	StateHeld     State = "held"
	StateReleased State = "released"

	StateCompleted    State = "completed"
	StateDeadLettered State = "dead_lettered"
	StateExpired      State = "expired"
	StateCancelled    State = "cancelled"
)

// Final reports whether the state is an outcome.
func (s State) Final() bool {
	switch s {
	case StateCompleted, StateDeadLettered, StateExpired, StateCancelled:
		return true
	default:
		return false
	}
}

// Reasons of a dead letter.
const (
	ReasonPermanent         = "permanent"
	ReasonAttemptsExhausted = "attempts_exhausted"
	ReasonInvalidJob        = "invalid_job"
	ReasonWorkerLost        = "worker_lost"
	ReasonHeldTooLong       = "held_too_long"
)

// Record is a job's state, stored as JSON in AVATAR_STATE under the job's ID.
// Every writer names the revision that it read; that is the fence.
type Record struct {
	JobID           string       `json:"job_id"`
	Run             int          `json:"run"`
	StreamSeq       uint64       `json:"stream_seq"` // 0: made by a cancel, no message seen yet
	Session         int          `json:"session"`    // ordinal of the last take-over in this run
	State           State        `json:"state"`
	Queue           string       `json:"queue"`
	AppID           string       `json:"app_id"`
	AvatarID        string       `json:"avatar_id"`
	Region          string       `json:"region,omitempty"`
	Attempt         int          `json:"attempt"` // number of the last attempt
	MaxAttempts     int          `json:"max_attempts"`
	Crashes         int          `json:"crashes"`
	CrashesPast     int          `json:"crashes_past,omitempty"` // before the last utterance that was finished
	WorkerID        string       `json:"worker_id"`
	CancelRequested bool         `json:"cancel_requested"`
	CreatedAt       time.Time    `json:"created_at"`
	UpdatedAt       time.Time    `json:"updated_at"`
	NextAttemptAt   *time.Time   `json:"next_attempt_at,omitempty"`
	StartedAt       time.Time    `json:"started_at,omitzero"` // of the last take-over
	ConnectionID    string       `json:"connection_id,omitempty"`
	LastError       *event.Error `json:"last_error,omitempty"`
	Checkpoint      int          `json:"checkpoint"` // utterances delivered
	Outcome         State        `json:"outcome,omitempty"`

	// Further data for a worker that takes over.
	Reason     string              `json:"reason,omitempty"`      // of the dead letter, or of the release
	NoAttempt  bool                `json:"no_attempt,omitempty"`  // dead-lettered without an attempt that failed
	BudgetFrom int                 `json:"budget_from,omitempty"` // attempts before the last progress; they count no more
	Failures   map[errors.Code]int `json:"failures,omitempty"`    // by code, since then
	Speaking   int                 `json:"speaking,omitempty"`    // utterance in flight; only set for give_up
	LiveSeq    uint64              `json:"live_seq,omitempty"`    // last live audio message delivered
	LiveBegun  uint64              `json:"live_begun,omitempty"`  // first message of the live utterance in flight
	Holds      int                 `json:"holds,omitempty"`       // how often it was held
	HeldSince  *time.Time          `json:"held_since,omitempty"`  // of the hold that lasts
	HeldFor    time.Duration       `json:"held_for_ns,omitempty"` // all holds that ended
	HeldCode   errors.Code         `json:"held_code,omitempty"`   // of what holds it; "": not for a code
	HeldReason string              `json:"held_reason,omitempty"` // of the hold that lasts, or of the last one
	HeldWhy    string              `json:"held_why,omitempty"`    // the same in words, where they differ from job to job
	// Unsettled counts the sessions in a row that settled nothing and finished no
	// utterance that is kept, whatever ended them.
	Unsettled      int               `json:"unsettled,omitempty"`
	Refusals       int               `json:"refusals,omitempty"` // for concurrency, in a row
	ConnectionIDs  []string          `json:"connection_ids,omitempty"`
	Utterances     []event.Utterance `json:"utterances,omitempty"` // the newest of those delivered
	UtterancesDone int               `json:"utterances_total,omitempty"`
	SessionTime    time.Duration     `json:"session_ns,omitempty"` // connected, over all sessions
	Recording      string            `json:"recording,omitempty"`
	Recorded       *event.Recorded   `json:"recorded,omitempty"` // how far the recording is stored
	Labels         map[string]string `json:"labels,omitempty"`
	PublishedAt    time.Time         `json:"published_at,omitzero"`

	// ConfirmedAt is when the backend confirmed the session; zero: it has not, or
	// that is not written yet.
	ConfirmedAt time.Time `json:"confirmed_at,omitzero"`
	// Usage are the sessions of this run that are not known to be in the ledger,
	// and those whose end was estimated, which may be corrected.
	Usage []usage.Session `json:"usage,omitempty"`

	// The sequence of the newest dead letter before this outcome was written. It
	// distinguishes this job's dead letter from that of an earlier job with the
	// same ID.
	LettersBefore uint64 `json:"letters_before,omitempty"`
	// CancelThrough is the last of the later runs that are to be cancelled: the job was
	// replayed, and cancelled before that run began. 0: none.
	CancelThrough int `json:"cancel_through,omitempty"`
}

// EmittedAfter returns the time before which no event can belong to this record.
// For an outcome it is exact, since nothing but a cancel of the next run changes the
// record after it, and that keeps its time. A waiting record is written again
// meanwhile, to be held or cancelled, so for it the time is that of the record's
// creation. Another worker may have created it, which read the server's clock slightly
// differently, or a command, which goes by its own: what was published since the record
// was written last counts in any case.
func (r *Record) EmittedAfter() time.Time {
	if r.State.Final() || r.UpdatedAt.Before(r.CreatedAt) {
		return r.UpdatedAt
	}
	return r.CreatedAt.Add(-time.Second)
}

// check refuses a record that no worker has written: other code relies on what
// each state comes with.
func (r *Record) check() error {
	switch r.State {
	case StateRunning, StateReleased, StateCompleted, StateExpired, StateCancelled:
		return nil
	case StateHeld:
		if r.NextAttemptAt == nil {
			return errors.New("it is held and has no next_attempt_at")
		}
	case StateRetrying:
		if r.NextAttemptAt == nil || r.LastError == nil {
			return errors.New("it is retrying and has no next_attempt_at or no last_error")
		}
	case StateDeadLettered:
		if r.LastError == nil {
			return errors.New("it is dead_lettered and has no last_error")
		}
	default:
		return fmt.Errorf("its state is %q", r.State)
	}
	return nil
}

// Waits reports whether the job waits for a time that its last worker chose.
func (r *Record) Waits() bool { return r.State == StateRetrying || r.State == StateHeld }

// Spent returns the number of attempts that count towards the job's limit.
func (r *Record) Spent() int { return r.Attempt - r.BudgetFrom }

// AttemptsMade returns the attempts of a job that is given up, without one that a
// hold postponed.
func (r *Record) AttemptsMade() int {
	if r.Reason == ReasonHeldTooLong {
		return max(r.Attempt-1, 0)
	}
	return r.Attempt
}

// Reasons of a hold.
const (
	HeldCircuit   = "circuit"   // the app's circuit is open
	HeldRefused   = "refused"   // the backend refuses another session of the app
	HeldProxy     = "proxy"     // a proxy on the way to the backend lets nothing through
	HeldPolicy    = "policy"    // the configured policy holds jobs with this failure
	HeldStorage   = "storage"   // a store of our own can't take the job's output
	HeldBudget    = "budget"    // a budget of its app or of one of its labels is spent
	HeldUnsettled = "unsettled" // its sessions end without a result
)

// HeldReasons lists the reasons of a hold. What is said and done about a held job
// is tested against it.
func HeldReasons() []string {
	return []string{HeldCircuit, HeldRefused, HeldProxy, HeldPolicy, HeldStorage, HeldBudget, HeldUnsettled}
}

// HeldTotal returns how long the job has been held in all. Holds for our own
// storage or for a budget do not count: no job is given up for them.
func (r *Record) HeldTotal(now time.Time) time.Duration {
	if r.HeldSince == nil || !HoldCounts(r.HeldReason) {
		return r.HeldFor
	}
	return r.HeldFor + now.Sub(*r.HeldSince)
}

// HoldCounts reports whether jobs held for that reason are given up in the end.
func HoldCounts(reason string) bool { return reason != HeldStorage && reason != HeldBudget }

// holdCode returns the code of the dead letter of a job that was held too long.
func (r *Record) holdCode() errors.Code {
	switch {
	case r.HeldCode != "":
		return r.HeldCode
	case r.HeldReason == HeldUnsettled:
		return errors.CodeInternal
	default:
		return errors.CodeBillingRequired
	}
}

// HeldText returns for people why the job is held.
func (r *Record) HeldText() string {
	switch r.HeldReason {
	case HeldRefused:
		return "the backend refuses one more session of the app while other sessions of it are open; set max_sessions"
	case HeldProxy:
		return "a proxy on the way to the backend lets nothing through; it is tried again from time to time, and no attempt is counted"
	case HeldPolicy:
		return "policy holds jobs that fail with " + string(r.holdCode()) + "; it is tried again from time to time"
	case HeldStorage, HeldUnsettled, HeldBudget:
		return r.HeldWhy
	case HeldCircuit, "":
		return "the circuit of the app is open: sessions of it are not started until a probe succeeds"
	default: // written by a later version
		return cmp.Or(r.HeldWhy, "held for the reason "+r.HeldReason)
	}
}

// endHold adds the current hold to the total.
func (r *Record) endHold(now time.Time) {
	r.HeldFor = r.HeldTotal(now)
	r.HeldSince = nil
}

// Delivered moves the checkpoint. For a job that keeps its progress, attempts and
// crashes are counted from 0 again: only failures without progress count.
func (r *Record) Delivered(u event.Utterance, keeps bool) {
	r.Checkpoint++
	r.UtterancesDone++
	kept := r.Utterances[max(0, len(r.Utterances)+1-event.MaxUtterances):]
	r.Utterances = append(append(make([]event.Utterance, 0, len(kept)+1), kept...), u)
	if u.Recorded != nil {
		r.Recorded = u.Recorded
	}
	if u.LiveSeq > 0 {
		r.LiveSeq, r.LiveBegun = u.LiveSeq, 0
	}
	if keeps {
		r.CrashesPast += r.Crashes
		r.BudgetFrom, r.Failures, r.Crashes, r.Refusals, r.Unsettled = r.Attempt, nil, 0, 0, 0
	}
}

// AllCrashes returns how many crashes the run has had. Crashes is those that count
// against the limit, and in an outcome all of them.
func (r *Record) AllCrashes() int {
	if r.State.Final() {
		return r.Crashes
	}
	return r.Crashes + r.CrashesPast
}

// Progressed reports whether the last attempt delivered an utterance.
func (r *Record) Progressed() bool { return r.Attempt > 0 && r.BudgetFrom == r.Attempt }

// Clone returns a copy that can be changed without changing r. The utterances are
// shared: there can be many, and Delivered replaces the list as a whole.
func (r *Record) Clone() *Record {
	c := *r
	c.Utterances = slices.Clip(r.Utterances)
	c.ConnectionIDs = append([]string(nil), r.ConnectionIDs...)
	c.Usage = append([]usage.Session(nil), r.Usage...)
	if r.Failures != nil {
		c.Failures = make(map[errors.Code]int, len(r.Failures))
		for code, n := range r.Failures {
			c.Failures[code] = n
		}
	}
	return &c
}
