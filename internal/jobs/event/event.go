// Package event defines the events, error events and alerts that workers publish,
// and publishes them. It owns their JSON, headers and IDs. It must not know when an
// event is due.
package event

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

// Types of events: the ce-type without its prefix, and the token in the subject.
const (
	TypeStarted      = "started"
	TypeRetrying     = "retrying"
	TypeHeld         = "held"
	TypeCompleted    = "completed"
	TypeDeadLettered = "dead_lettered"
	TypeExpired      = "expired"
	TypeCancelled    = "cancelled"
	TypeReleased     = "released"
	TypeDuplicate    = "duplicate"

	// TypeError is the type in the ID of an error event.
	TypeError = "error"

	AlertRecurring     = "recurring"
	AlertCircuitOpened = "circuit_opened"
	AlertCircuitClosed = "circuit_closed"
	AlertStorage       = "storage"
	AlertWorkerKey     = "worker_key"
	AlertUnsettled     = "unsettled"
	AlertBudget        = "budget"
)

// Subjects returns the subjects of events.
type Subjects interface {
	Events(eventType, jobID string) string
	Errors(class, code string) string
	Alerts(kind, code string) string
}

// Body is the content of an event: one of the types of this package. It
// determines the event's type and subject, so that the three always agree.
type Body interface {
	// ceType is the CloudEvents type.
	ceType() string
	// subject is the NATS subject.
	subject(names Subjects) string
	// jobID is the CloudEvents subject; "" for what concerns no one job.
	jobID() string
}

// Event is a CloudEvent, version 1.0.
type Event struct {
	// ID is made from what happened, not from when it was published: an event
	// that is published again after a crash is the same event. See the function
	// ID.
	ID   string
	Time time.Time
	Body Body

	TraceParent string // W3C; may be empty
	TraceState  string
}

// ID returns the ID of an event, such as "J.run1.s2.completed". A session of 0 is
// omitted. An event that can occur several times in a session needs more to
// distinguish it, such as the number of the hold.
func ID(jobID string, run, session int, eventType string, more ...any) string {
	id := jobID + ".run" + strconv.Itoa(run)
	if session > 0 {
		id += ".s" + strconv.Itoa(session)
	}
	id += "." + eventType
	for _, m := range more {
		id += fmt.Sprintf(".%v", m)
	}
	return id
}

// AlertID returns the ID of an alert, made from its kind, subject and time. All
// workers that publish the same alert use the same ID.
func AlertID(kind string, at time.Time, about ...string) string {
	parts := append([]string{"alert", kind}, about...)
	return strings.Join(append(parts, strconv.FormatInt(at.UnixMilli(), 10)), ".")
}

// Subject returns the subject on which the event is published.
func (e Event) Subject(names Subjects) string { return e.Body.subject(names) }

// Message returns the NATS message of an event in CloudEvents' binary mode:
// attributes in headers, the body as JSON. source is the ce-source, a URI
// reference; see Source.
func (e Event) Message(names Subjects, source string) (*nats.Msg, error) {
	data, err := marshal(e.Body)
	if err != nil {
		return nil, fmt.Errorf("event %s: %w", e.ID, err)
	}
	return &nats.Msg{Subject: e.Body.subject(names), Header: e.header(source), Data: data}, nil
}

// header returns the event's attributes. Keys are set as they are: nats.Header
// keeps their case.
func (e Event) header(source string) nats.Header {
	const most = 10
	header := make(nats.Header, most)
	values := make([]string, 0, most) // one array for all
	set := func(key, value string) {
		if value != "" {
			values = append(values, value)
			header[key] = values[len(values)-1 : len(values) : len(values)]
		}
	}
	set("ce-specversion", "1.0")
	set("ce-id", e.ID)
	set("ce-source", source)
	set("ce-type", e.Body.ceType())
	set("ce-time", e.Time.UTC().Format(time.RFC3339Nano))
	set("ce-subject", e.Body.jobID())
	set("Content-Type", "application/json")
	set(jetstream.MsgIDHeader, e.ID)
	set(jobspec.HeaderTraceParent, e.TraceParent)
	if e.TraceParent != "" {
		set(jobspec.HeaderTraceState, e.TraceState)
	}
	return header
}

// Source returns the ce-source of a worker's events.
func Source(worker string) string { return "/avatarworker/" + url.PathEscape(worker) }

// maxEventText bounds each text of an error event: a backend's error body may
// have a MiB, and the event has to fit a message. Bytes.
const maxEventText = 4 << 10

// Failure is a failed attempt and the decision on it.
type Failure struct {
	Err         *errors.Error // not nil
	Class       errors.Class
	Action      errors.Action
	MaxAttempts int       // 0: not known, the job could not be read
	RetryAt     time.Time // when it is tried again; zero: it is not
	Secrets     []string  // taken out of every text: a backend may echo what it was sent
}

// NewError returns the error event of a failed attempt; job.Attempt is its number.
func NewError(job JobFields, f Failure) Error {
	err := f.Err.Redact(f.Secrets...)
	ev := Error{
		JobID:       job.JobID,
		Queue:       job.Queue,
		AppID:       job.AppID,
		AvatarID:    job.AvatarID,
		Region:      job.Region,
		Worker:      job.Worker,
		WorkerID:    job.WorkerID,
		Run:         job.Run,
		Session:     job.Session,
		Attempt:     job.Attempt,
		MaxAttempts: f.MaxAttempts,
		Labels:      job.Labels,
		Time:        job.Time,

		Code:         err.Code,
		Class:        f.Class,
		Phase:        err.Phase,
		Message:      errors.Cut(err.Message, maxEventText),
		HTTPStatus:   err.HTTPStatus,
		ServerCode:   errors.Cut(err.ServerCode, maxEventText),
		ServerTitle:  errors.Cut(err.ServerTitle, maxEventText),
		ServerDetail: errors.Cut(err.ServerDetail, maxEventText),
		ConnectionID: errors.Cut(err.ConnectionID, maxEventText),
		ReqID:        errors.Cut(err.ReqID, maxEventText),
		CloseCode:    err.CloseCode,
		CloseReason:  errors.Cut(err.CloseReason, maxEventText),
		Action:       f.Action,
	}
	if err.Region != "" {
		ev.Region = err.Region // where it happened, after a failover
	}
	if !f.RetryAt.IsZero() {
		at := f.RetryAt.UTC()
		if at.Before(ev.Time) {
			at = ev.Time // a short wait is over before the event is made
		}
		ev.RetryAt = &at
	}
	return ev
}

func (e Error) ceType() string { return "avatar.session.error" }
func (e Error) jobID() string  { return e.JobID }
func (e Error) subject(names Subjects) string {
	return names.Errors(string(e.Class), string(e.Code))
}
