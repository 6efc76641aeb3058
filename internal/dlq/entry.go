package dlq

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/topology"
)

// Entry is what a list shows of a dead letter: everything but the job's bytes.
type Entry struct {
	Seq      uint64       `json:"seq"` // in the dead letter stream: what Show, Replay and Remove take
	JobID    string       `json:"job_id"`
	Run      int          `json:"run"`
	Queue    string       `json:"queue"`
	AppID    string       `json:"app_id,omitempty"`
	AvatarID string       `json:"avatar_id,omitempty"`
	Code     errors.Code  `json:"code"`
	Class    errors.Class `json:"class"`
	Phase    errors.Phase `json:"phase"`
	Reason   string       `json:"reason"`
	Message  string       `json:"message"`
	// What the backend said of it; empty: nothing.
	ServerTitle  string `json:"server_title,omitempty"`
	ServerDetail string `json:"server_detail,omitempty"`

	Attempts  int               `json:"attempts"`
	Crashes   int               `json:"crashes"`
	Worker    string            `json:"worker"`
	FailedAt  time.Time         `json:"failed_at"`
	StoredAt  time.Time         `json:"stored_at"`
	Subject   string            `json:"subject"` // where the job was published
	StreamSeq uint64            `json:"stream_seq"`
	Size      int               `json:"size"` // of the body as stored, in bytes
	Labels    map[string]string `json:"labels,omitempty"`
}

// Letter is a whole dead letter. Data are the job's own bytes: they may hold
// the tokens that its publisher put in.
type Letter struct {
	Entry
	Header nats.Header     `json:"headers"`
	Error  json.RawMessage `json:"error"` // the error event's body, at most 4 KiB
	Data   []byte          `json:"data"`
}

// stored is a message of the dead letter stream as the server gives it.
type stored struct {
	seq     uint64
	subject string
	header  nats.Header
	time    time.Time
	size    int
}

// entry reads the headers. A message that something else put into the stream
// still gives an entry, so that it can be seen and removed.
func entry(names topology.Names, m stored) Entry {
	h := m.header
	e := Entry{
		Seq: m.seq, StoredAt: m.time, Size: m.size,
		JobID: h.Get(HeaderJobID), Run: number(h, HeaderRun), Queue: h.Get(HeaderQueue),
		Code: errors.Code(h.Get(HeaderCode)), Class: errors.Class(h.Get(HeaderClass)), Phase: errors.Phase(h.Get(HeaderPhase)),
		Reason: h.Get(HeaderReason), Attempts: number(h, HeaderAttempts), Crashes: number(h, HeaderCrashes),
		Worker: h.Get(HeaderWorker), Subject: h.Get(HeaderSubject), StreamSeq: uint64(number(h, HeaderStreamSeq)),
	}
	class, code, _ := names.DLQOf(m.subject)
	if e.Class == "" {
		e.Class = errors.Class(class)
	}
	if e.Code == "" {
		e.Code = errors.Code(code)
	}
	var err error
	if e.FailedAt, err = time.Parse(time.RFC3339Nano, h.Get(HeaderFailedAt)); err != nil {
		e.FailedAt = m.time
	}
	var event event.Error
	if json.Unmarshal([]byte(h.Get(HeaderError)), &event) == nil {
		e.AppID, e.AvatarID, e.Message, e.Labels = event.AppID, event.AvatarID, event.Message, event.Labels
		e.ServerTitle, e.ServerDetail = event.ServerTitle, event.ServerDetail
	}
	return e
}

// number is 0 where the header is missing or no count.
func number(h nats.Header, name string) int {
	n, err := strconv.Atoi(h.Get(name))
	if err != nil || n < 0 {
		return 0
	}
	return n
}
