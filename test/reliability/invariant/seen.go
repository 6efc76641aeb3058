package invariant

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/simulator"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

// Seen is what NATS and the backend show when the run is over.
type Seen struct {
	Waiting  uint64                // messages in the jobs stream
	History  map[string][]Revision // of the job records, oldest first
	Events   []Event               // as stored, repetitions too
	Letters  []Letter
	Sessions []simulator.Session // the backend's session log
	Ledger   *Ledger             // of connected time; nil: not looked at
}

// Revision is one state that a job record was in.
type Revision struct {
	Record lifecycle.Record
	Time   time.Time // when it was stored
}

// Event is a job event or an error event.
type Event struct {
	ID      string // ce-id
	Type    string // started, completed, …; event.TypeError for an error event
	JobID   string
	Run     int
	Session int
	Code    errors.Code
	Time    time.Time // when it was stored
}

// Letter is a dead letter.
type Letter struct {
	ID     string // Nats-Msg-Id
	JobID  string
	Run    int
	Code   string
	Reason string
}

// History is how many revisions of a record the bucket has to keep for the
// check; create it with this before the first worker starts.
const History = 64

// CreateState makes the bucket of job records so that it keeps the history of
// each. Workers leave a bucket that is there as it is.
func CreateState(ctx context.Context, js jetstream.JetStream, names topology.Names, settings topology.Settings) error {
	_, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: names.StateBucket(), History: History, Replicas: settings.Replicas, Placement: settings.Placement, Storage: settings.Storage,
		// A server gives no key of a bucket with history a shorter life than its
		// markers have, and leases are to expire in time.
		LimitMarkerTTL: time.Second,
	})
	if errors.Is(err, jetstream.ErrBucketExists) {
		return nil // a test has made it where it wants it
	}
	return err
}

// Read collects everything that Check looks at.
func Read(ctx context.Context, js jetstream.JetStream, names topology.Names, book []simulator.Session) (Seen, error) {
	seen := Seen{History: map[string][]Revision{}, Sessions: book}
	stream, err := js.Stream(ctx, names.JobsStream())
	if err != nil {
		return seen, err
	}
	seen.Waiting = stream.CachedInfo().State.Msgs
	if seen.Ledger, err = readLedger(ctx, js, names); err != nil {
		return seen, err
	}
	return seen, errors.Join(
		each(ctx, js, "KV_"+names.StateBucket(), ">", seen.record),
		each(ctx, js, names.EventsStream(), names.AllEvents(), seen.event),
		each(ctx, js, names.EventsStream(), names.AllErrors(), seen.event),
		each(ctx, js, names.DLQStream(), names.AllDLQ(), seen.letter),
	)
}

// each hands over every message that the stream holds under filter. How many are
// pending a message says itself, and sometimes wrongly where others expire meanwhile: so
// the last one must have come.
func each(ctx context.Context, js jetstream.JetStream, stream, filter string, f func(jetstream.Msg, *jetstream.MsgMetadata) error) error {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	last, err := s.GetLastMsgForSubject(ctx, filter)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	var read uint64
	var failed error
	err = streams.Scan(ctx, s, jetstream.ConsumerConfig{FilterSubject: filter}, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		if failed = f(msg, meta); failed != nil {
			failed = fmt.Errorf("message %d: %w", meta.Sequence.Stream, failed)
		}
		read = meta.Sequence.Stream
		return failed == nil
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("stream %s: %w", stream, err)
	}
	if read < last.Sequence {
		if _, err := s.GetMsg(ctx, last.Sequence); !errors.Is(err, jetstream.ErrMsgNotFound) { // it has not expired
			return fmt.Errorf("stream %s: read up to message %d of %d", stream, read, last.Sequence)
		}
	}
	return nil
}

func (s *Seen) record(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
	if strings.Count(msg.Subject(), ".") > 2 {
		return nil // $KV.<bucket>.<key>: a key with a dot is not a job's
	}
	if msg.Headers().Get("KV-Operation") != "" {
		return fmt.Errorf("the record under %s was deleted", msg.Subject())
	}
	r := Revision{Time: meta.Timestamp}
	if err := json.Unmarshal(msg.Data(), &r.Record); err != nil {
		return err
	}
	s.History[r.Record.JobID] = append(s.History[r.Record.JobID], r)
	return nil
}

func (s *Seen) event(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
	var body struct {
		JobID   string      `json:"job_id"`
		Run     int         `json:"run"`
		Session int         `json:"session"`
		Code    errors.Code `json:"code"`
	}
	if err := json.Unmarshal(msg.Data(), &body); err != nil {
		return err
	}
	kind := strings.TrimPrefix(msg.Headers().Get("ce-type"), "avatar.job.")
	if kind == "avatar.session.error" {
		kind = event.TypeError
	}
	s.Events = append(s.Events, Event{
		ID: msg.Headers().Get("ce-id"), Type: kind, JobID: body.JobID, Run: body.Run, Session: body.Session,
		Code: body.Code, Time: meta.Timestamp,
	})
	return nil
}

func (s *Seen) letter(msg jetstream.Msg, _ *jetstream.MsgMetadata) error {
	h := msg.Headers()
	run, err := strconv.Atoi(h.Get(dlq.HeaderRun))
	if err != nil {
		return fmt.Errorf("header %s: %w", dlq.HeaderRun, err)
	}
	s.Letters = append(s.Letters, Letter{
		ID: h.Get(nats.MsgIdHdr), JobID: h.Get(dlq.HeaderJobID), Run: run,
		Code: h.Get(dlq.HeaderCode), Reason: h.Get(dlq.HeaderReason),
	})
	return nil
}
