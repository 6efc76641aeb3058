package event

import (
	"time"

	"avatarworker/internal/errors"
)

// JobFields are in every event of a job. Times are in UTC, so that all workers
// write the same bytes.
type JobFields struct {
	JobID    string            `json:"job_id"`
	Run      int               `json:"run"`
	Queue    string            `json:"queue"`
	AppID    string            `json:"app_id,omitempty"`
	AvatarID string            `json:"avatar_id,omitempty"`
	Region   string            `json:"region,omitempty"`
	Worker   string            `json:"worker"`    // its name
	WorkerID string            `json:"worker_id"` // its name and start
	Attempt  int               `json:"attempt,omitempty"`
	Session  int               `json:"session,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Time     time.Time         `json:"time"`
}

func (f JobFields) jobID() string { return f.JobID }

// Started reports that a session of the job starts.
type Started struct {
	JobFields
	MaxAttempts int    `json:"max_attempts,omitempty"`
	Output      string `json:"output"`               // its kind
	Checkpoint  int    `json:"checkpoint,omitempty"` // utterances that earlier sessions delivered
	Crashes     int    `json:"crashes,omitempty"`    // of workers that had the job before
}

// Retrying reports that an attempt failed and the job waits for the next one.
// Attempt is the one that failed.
type Retrying struct {
	JobFields
	MaxAttempts int          `json:"max_attempts,omitempty"`
	Code        errors.Code  `json:"code"`
	Class       errors.Class `json:"class"`
	Phase       errors.Phase `json:"phase"`
	RetryAt     time.Time    `json:"retry_at"`
}

// Held reports that the job waits without an attempt being counted.
type Held struct {
	JobFields
	Code    errors.Code `json:"code,omitempty"` // of what holds it; absent: not for a code
	RetryAt time.Time   `json:"retry_at"`       // looked at again no later than this
	Reason  string      `json:"reason"`         // circuit, refused, policy, storage, proxy, budget or unsettled
	Message string      `json:"message"`        // the same for people
}

// Bounds of the lists in a record and its completed event, which must fit into a
// message: a live job may run for hours.
const (
	MaxUtterances  = 256
	MaxConnections = 100
)

// Completed is the outcome of a job all of whose speech was delivered. Use
// NewCompleted.
type Completed struct {
	JobFields
	Attempts        int         `json:"attempts"`
	ConnectionIDs   []string    `json:"connection_ids"`   // the newest 100
	Utterances      []Utterance `json:"utterances"`       // the newest 256
	UtterancesTotal int         `json:"utterances_total"` // all there were
	SessionMS       int64       `json:"session_ms"`       // connected time of all sessions: what is billed
	Recording       string      `json:"recording,omitempty"`
}

// NewCompleted returns a Completed with bounded lists. total also counts
// utterances that are no longer in the list.
func NewCompleted(job JobFields, attempts int, connections []string, utterances []Utterance, total int, connected time.Duration, recording string) Completed {
	return Completed{
		JobFields:       job,
		Attempts:        attempts,
		ConnectionIDs:   Newest(connections, MaxConnections),
		Utterances:      Newest(utterances, MaxUtterances),
		UtterancesTotal: max(total, len(utterances)),
		SessionMS:       connected.Milliseconds(),
		Recording:       recording,
	}
}

// Newest returns the last n elements. The result is never nil, so it is never
// null in JSON.
func Newest[T any](list []T, n int) []T {
	return append([]T{}, list[max(0, len(list)-n):]...)
}

// DeadLettered is the outcome of a job that was given up.
type DeadLettered struct {
	JobFields
	Attempts int          `json:"attempts"`
	Crashes  int          `json:"crashes,omitempty"`
	Code     errors.Code  `json:"code"`
	Class    errors.Class `json:"class"`
	Phase    errors.Phase `json:"phase"`
	Reason   string       `json:"reason"` // see DeadLetter
	Message  string       `json:"message"`

	// What the backend said of it; empty: nothing.
	ServerTitle  string `json:"server_title,omitempty"`
	ServerDetail string `json:"server_detail,omitempty"`

	DeadLetter string `json:"dead_letter"` // the subject it is kept under
}

// Expired is the outcome of a job whose deadline passed.
type Expired struct {
	JobFields
	Attempts  int         `json:"attempts"` // begun before the deadline
	Code      errors.Code `json:"code"`
	Deadline  time.Time   `json:"deadline"`
	LastError *Error      `json:"last_error,omitempty"`
}

// Cancelled is the outcome of a job that a user cancelled.
type Cancelled struct {
	JobFields
	Attempts        int    `json:"attempts"`
	UtterancesTotal int    `json:"utterances_total"` // delivered before
	SessionMS       int64  `json:"session_ms"`
	LastError       *Error `json:"last_error,omitempty"`
}

// Released reports that a worker returned the job unfinished; this is not a
// failure.
type Released struct {
	JobFields
	Reason     string `json:"reason"`     // the schema lists them
	Checkpoint int    `json:"checkpoint"` // utterances delivered
}

// Duplicate reports that a message was dropped because another message has the
// same job and run.
type Duplicate struct {
	JobFields
	StreamSeq  uint64 `json:"stream_seq"`            // of the message that was dropped
	KeptSeq    uint64 `json:"kept_seq,omitempty"`    // of the message that counts
	CurrentRun int    `json:"current_run,omitempty"` // the run in the job's record
}

// RecurringAlert reports that a code occurs too often in the fleet.
type RecurringAlert struct {
	Code   errors.Code `json:"code"`
	Count  int         `json:"count"`
	Window string      `json:"window"` // a duration: "1m0s"
	First  time.Time   `json:"first"`
	Last   time.Time   `json:"last"`
	AppIDs []string    `json:"app_ids"` // the newest 10
	JobIDs []string    `json:"job_ids"` // the newest 10
	Worker string      `json:"worker"`
	Time   time.Time   `json:"time"`
}

// MaxAlertJobs bounds the lists of a RecurringAlert.
const MaxAlertJobs = 10

// CircuitAlert reports that the circuit of an app in a region opened or closed.
type CircuitAlert struct {
	Kind     string      `json:"-"` // AlertCircuitOpened or AlertCircuitClosed
	AppID    string      `json:"app_id"`
	Region   string      `json:"region,omitempty"`
	Code     errors.Code `json:"code"`               // what opened it
	Failures int         `json:"failures,omitempty"` // in a row, over different jobs
	Cooldown string      `json:"cooldown,omitempty"` // until the first probe, a duration
	Message  string      `json:"message"`            // what to do
	Worker   string      `json:"worker"`
	Time     time.Time   `json:"time"`
}

func (f Started) ceType() string      { return jobType(TypeStarted) }
func (f Retrying) ceType() string     { return jobType(TypeRetrying) }
func (f Held) ceType() string         { return jobType(TypeHeld) }
func (f Completed) ceType() string    { return jobType(TypeCompleted) }
func (f DeadLettered) ceType() string { return jobType(TypeDeadLettered) }
func (f Expired) ceType() string      { return jobType(TypeExpired) }
func (f Cancelled) ceType() string    { return jobType(TypeCancelled) }
func (f Released) ceType() string     { return jobType(TypeReleased) }
func (f Duplicate) ceType() string    { return jobType(TypeDuplicate) }

func jobType(event string) string { return "avatar.job." + event }

func (f Started) subject(n Subjects) string      { return n.Events(TypeStarted, f.JobID) }
func (f Retrying) subject(n Subjects) string     { return n.Events(TypeRetrying, f.JobID) }
func (f Held) subject(n Subjects) string         { return n.Events(TypeHeld, f.JobID) }
func (f Completed) subject(n Subjects) string    { return n.Events(TypeCompleted, f.JobID) }
func (f DeadLettered) subject(n Subjects) string { return n.Events(TypeDeadLettered, f.JobID) }
func (f Expired) subject(n Subjects) string      { return n.Events(TypeExpired, f.JobID) }
func (f Cancelled) subject(n Subjects) string    { return n.Events(TypeCancelled, f.JobID) }
func (f Released) subject(n Subjects) string     { return n.Events(TypeReleased, f.JobID) }
func (f Duplicate) subject(n Subjects) string    { return n.Events(TypeDuplicate, f.JobID) }

func (a RecurringAlert) ceType() string { return "avatar.alert." + AlertRecurring }
func (a RecurringAlert) jobID() string  { return "" }
func (a RecurringAlert) subject(n Subjects) string {
	return n.Alerts(AlertRecurring, string(a.Code))
}

func (a CircuitAlert) ceType() string            { return "avatar.alert." + a.Kind }
func (a CircuitAlert) jobID() string             { return "" }
func (a CircuitAlert) subject(n Subjects) string { return n.Alerts(a.Kind, string(a.Code)) }

// WorkerAlert reports a problem of the worker that a person must solve: its
// storage, its key for an app, a budget, or a job whose sessions end without a
// result.
type WorkerAlert struct {
	Kind string `json:"-"` // AlertStorage, AlertWorkerKey, AlertUnsettled or AlertBudget
	// What is the output that can't be stored, the code of the refused key,
	// "sessions", or of a budget "warning" or "spent".
	What     string    `json:"what"`
	AppID    string    `json:"app_id,omitempty"` // of AlertWorkerKey and AlertUnsettled, and of the budget of an app
	JobID    string    `json:"job_id,omitempty"` // of AlertUnsettled
	Message  string    `json:"message"`          // what is wrong, and what to do
	Worker   string    `json:"worker"`
	WorkerID string    `json:"worker_id"`
	Time     time.Time `json:"time"`

	// Of AlertBudget: the budget, and how much of it was spent.
	Key     string    `json:"key,omitempty"`   // app_id or label.NAME
	Value   string    `json:"value,omitempty"` // the app, or the value of the label
	Credits int64     `json:"credits,omitempty"`
	Spent   int64     `json:"spent,omitempty"` // credits
	Per     string    `json:"per,omitempty"`
	Until   time.Time `json:"until,omitzero"` // when the period ends
}

func (a WorkerAlert) ceType() string            { return "avatar.alert." + a.Kind }
func (a WorkerAlert) jobID() string             { return a.JobID }
func (a WorkerAlert) subject(n Subjects) string { return n.Alerts(a.Kind, a.What) }

// Utterance describes one utterance in a completed event.
type Utterance struct {
	ReqID        string `json:"req_id"`
	Frames       int    `json:"frames"`
	Bytes        int64  `json:"bytes"`    // of the frames
	AudioMS      int64  `json:"audio_ms"` // length of the speech
	FirstFrameMS int64  `json:"first_frame_ms"`
	DurationMS   int64  `json:"duration_ms"`
	Interrupted  bool   `json:"interrupted,omitempty"`
	Converted    string `json:"converted,omitempty"` // what audio.convert did
	LiveSeq      uint64 `json:"-"`                   // of its last live audio message

	// Recorded is how much of the job's recording is stored with it; nil:
	// unchanged.
	Recorded *Recorded `json:"-"`
}

// Recorded is the part of a job's recording that is stored for good. A later
// session continues after it.
type Recorded struct {
	Utterances int    `json:"utterances"` // finished, those without a frame included
	Size       int64  `json:"size"`       // bytes of all chunks
	Chunks     int    `json:"chunks"`
	LastSeq    uint64 `json:"last_seq"` // stream sequence of the last chunk; 0: there is none
	Session    int    `json:"session"`  // the session that stored the last chunk
	Digest     []byte `json:"digest"`   // state of the SHA-256 over all chunks
}

// Error is the body of an error event, and the last_error of a record. A field
// that is absent is not known.
type Error struct {
	JobID        string            `json:"job_id"`
	Queue        string            `json:"queue"`
	AppID        string            `json:"app_id,omitempty"`
	AvatarID     string            `json:"avatar_id,omitempty"`
	Region       string            `json:"region,omitempty"`
	Worker       string            `json:"worker"`
	WorkerID     string            `json:"worker_id"`
	Run          int               `json:"run"`
	Session      int               `json:"session,omitempty"`
	Attempt      int               `json:"attempt,omitempty"`
	MaxAttempts  int               `json:"max_attempts,omitempty"`
	Code         errors.Code       `json:"code"`
	Class        errors.Class      `json:"class"`
	Phase        errors.Phase      `json:"phase"`
	Message      string            `json:"message"`
	HTTPStatus   int               `json:"http_status,omitempty"`
	ServerCode   string            `json:"server_code,omitempty"`
	ServerTitle  string            `json:"server_title,omitempty"`
	ServerDetail string            `json:"server_detail,omitempty"`
	ConnectionID string            `json:"connection_id,omitempty"`
	ReqID        string            `json:"req_id,omitempty"`
	CloseCode    int               `json:"close_code,omitempty"`
	CloseReason  string            `json:"close_reason,omitempty"`
	Action       errors.Action     `json:"action"`
	RetryAt      *time.Time        `json:"retry_at,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Time         time.Time         `json:"time"`
}
