package status

import (
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

// StateWaiting is the state of a job that has no record: it was never delivered, or was
// handed back at once.
const StateWaiting lifecycle.State = "waiting"

// States lists every state of a job in the order of its life.
func States() []lifecycle.State {
	return []lifecycle.State{
		StateWaiting, lifecycle.StateRunning, lifecycle.StateRetrying, lifecycle.StateHeld, lifecycle.StateReleased,
		lifecycle.StateCompleted, lifecycle.StateDeadLettered, lifecycle.StateExpired, lifecycle.StateCancelled,
	}
}

// Row is one job as a list shows it. Every field is always there.
type Row struct {
	ID       string            `json:"id"`
	Run      int               `json:"run"`
	State    lifecycle.State   `json:"state"`
	Queue    string            `json:"queue"`
	AppID    string            `json:"app_id"`
	AvatarID string            `json:"avatar_id"`
	Labels   map[string]string `json:"labels"`
	Attempt  int               `json:"attempt"`
	Crashes  int               `json:"crashes"`
	// Code is of the last failure, also of a job that then completed, or of what holds
	// the job; deadlineExceeded if it expired; empty if it never failed.
	Code  errors.Code `json:"code"`
	AgeMS int64       `json:"age_ms"` // since it was published
	// RunningMS is the time since a worker took the job over; 0 unless it runs.
	RunningMS     int64      `json:"running_ms"`
	NextAttemptAt *time.Time `json:"next_attempt_at"`
	WorkerID      string     `json:"worker_id"`
	// SessionMS is the connected time of this run: of its sessions that ended,
	// and of the one that is open since the job was taken over.
	SessionMS int64 `json:"session_ms"`

	published time.Time
	// As RunningMS and SessionMS have them in milliseconds.
	running, connected time.Duration

	region string
	held   string
}

// HeldReason is why the job is held, one of lifecycle.HeldReasons; "": it is not held.
func (r *Row) HeldReason() string { return r.held }

// Region is where the job's sessions start; "": as its worker's configuration says.
func (r *Row) Region() string { return r.region }

// Filter chooses jobs. An empty list or a zero value does not narrow the choice.
type Filter struct {
	States  []lifecycle.State
	Queues  []string
	Apps    []string
	Avatars []string
	Labels  map[string]string // all of them
	Codes   []errors.Code
	Before  time.Time // published before this time
	After   time.Time // published at this time or later
}

func chosen[T comparable](list []T, v T) bool { return len(list) == 0 || slices.Contains(list, v) }

// wants reports whether a job in this state may be chosen.
func (f *Filter) wants(state lifecycle.State) bool { return chosen(f.States, state) }

func (f *Filter) keeps(r *Row) bool {
	for name, value := range f.Labels {
		if has, ok := r.Labels[name]; !ok || has != value {
			return false
		}
	}
	return f.wants(r.State) && chosen(f.Queues, r.Queue) && chosen(f.Apps, r.AppID) && chosen(f.Avatars, r.AvatarID) &&
		chosen(f.Codes, r.Code) && (f.Before.IsZero() || r.published.Before(f.Before)) && !r.published.Before(f.After)
}

// codeTexts are texts of which each record with one of the codes has one: that of an
// expired job has its state in place of the code.
func (f *Filter) codeTexts() []string {
	var texts []string
	for _, code := range f.Codes {
		texts = append(texts, string(code))
		if code == errors.CodeDeadlineExceeded {
			texts = append(texts, string(lifecycle.StateExpired))
		}
	}
	return texts
}

// recordRow is what a list reads of a record.
type recordRow struct {
	JobID         string            `json:"job_id"`
	Run           int               `json:"run"`
	StreamSeq     uint64            `json:"stream_seq"`
	State         lifecycle.State   `json:"state"`
	Queue         string            `json:"queue"`
	AppID         string            `json:"app_id"`
	AvatarID      string            `json:"avatar_id"`
	Region        string            `json:"region"`
	Labels        map[string]string `json:"labels"`
	Attempt       int               `json:"attempt"`
	Crashes       int               `json:"crashes"`
	WorkerID      string            `json:"worker_id"`
	ConnectionID  string            `json:"connection_id"`
	CreatedAt     time.Time         `json:"created_at"`
	StartedAt     time.Time         `json:"started_at"`
	PublishedAt   time.Time         `json:"published_at"`
	NextAttemptAt *time.Time        `json:"next_attempt_at"`
	HeldCode      errors.Code       `json:"held_code"`
	HeldReason    string            `json:"held_reason"`
	SessionTime   time.Duration     `json:"session_ns"`
	LastError     *lastError        `json:"last_error"`
}

// published is when the job was published, as far as is known.
func (r *recordRow) published() time.Time {
	if r.PublishedAt.IsZero() {
		return r.CreatedAt
	}
	return r.PublishedAt
}

// code is that of the last failure, or of what holds the job. An expired job has the
// code of its event, whatever failed before.
func (r *recordRow) code() errors.Code {
	switch {
	case r.State == lifecycle.StateExpired:
		return errors.CodeDeadlineExceeded
	case r.State == lifecycle.StateHeld && r.HeldCode != "":
		return r.HeldCode
	case r.LastError != nil:
		return r.LastError.Code
	default:
		return ""
	}
}

// heldReason is why the job is held; "": it is not, or a later version has another
// reason.
func (r *recordRow) heldReason() string {
	if r.State == lifecycle.StateHeld && slices.Contains(lifecycle.HeldReasons(), r.HeldReason) {
		return r.HeldReason
	}
	return ""
}

// readRow makes a row of a record. It returns false if the value is not the record
// of a job that a worker has seen: the mark of a removed key, a cancel that came
// before its job, or another's.
func readRow(data []byte, now time.Time) (Row, bool) {
	var r recordRow
	if decodeRow(data, &r) != nil || r.StreamSeq == 0 || r.JobID == "" {
		return Row{}, false
	}
	row := Row{
		ID: r.JobID, Run: r.Run, State: r.State, Queue: r.Queue, AppID: r.AppID, AvatarID: r.AvatarID, Labels: r.Labels,
		Attempt: r.Attempt, Crashes: r.Crashes, Code: r.code(), WorkerID: r.WorkerID, published: r.published(), region: r.Region, held: r.heldReason(),
	}
	if row.Labels == nil {
		row.Labels = map[string]string{}
	}
	if !r.State.Final() {
		row.NextAttemptAt = r.NextAttemptAt
	}
	row.connected = r.SessionTime
	if r.State == lifecycle.StateRunning && !r.StartedAt.IsZero() {
		row.running = max(now.Sub(r.StartedAt), 0)
		if r.ConnectionID != "" {
			row.connected += row.running
		}
	}
	row.AgeMS = max(now.Sub(row.published), 0).Milliseconds()
	row.RunningMS, row.SessionMS = row.running.Milliseconds(), row.connected.Milliseconds()
	return row, true
}
