package status

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

// ErrNoJob says that a job is unknown: it has no record and no event, and waits
// in no queue.
var ErrNoJob = errors.New("unknown job")

// clockSlack is how far a worker's clock may be off the server's.
const clockSlack = 5 * time.Minute

// Job is one job's record and history.
type Job struct {
	Record  *lifecycle.Record `json:"record"`  // nil: it has none (any more), or only a cancel is noted
	History []Event           `json:"history"` // oldest first
	// Whole is false where looking for error events took too long.
	Whole bool `json:"history_whole"`
	// Waiting is set for a job without a record that is in its queue.
	Waiting *Waiting `json:"waiting,omitempty"`
	// NextRun is set for a dead-lettered job that was replayed: the run that waits in
	// its queue.
	NextRun *Waiting `json:"next_run,omitempty"`
	// Replays are its runs that came from dead letters, by run; none if the job was never
	// replayed, or that can't be read.
	Replays []dlq.ReplayedRun `json:"replays,omitempty"`
	// LetterGone is set for a dead-lettered job whose dead letter was removed or has
	// aged out.
	LetterGone bool `json:"letter_gone,omitempty"`
	// PausedUntil is when its queue's pause ends; zero: the queue is not paused, or the
	// job does not wait for a delivery.
	PausedUntil time.Time `json:"paused_until,omitzero"`
	// Cost is what the job's sessions cost so far, in all its runs.
	Cost Cost `json:"cost"`
}

// Event is one message of the events stream.
type Event struct {
	Subject string          `json:"subject"`
	ID      string          `json:"id"`
	Type    string          `json:"type"` // ce-type
	Time    time.Time       `json:"time"`
	JobID   string          `json:"job_id,omitempty"`
	Data    json.RawMessage `json:"data"`

	Seq uint64 `json:"-"` // in the stream
}

// NewEvent reads a message of the events stream. at is when it was stored, for
// a message without its own time.
func NewEvent(subject string, header map[string][]string, data []byte, seq uint64, at time.Time) Event {
	first := func(key string) string {
		if values := header[key]; len(values) > 0 {
			return values[0]
		}
		return ""
	}
	e := Event{Subject: subject, ID: first("ce-id"), Type: first("ce-type"), JobID: first("ce-subject"), Time: at.UTC(), Seq: seq}
	if t, err := time.Parse(time.RFC3339Nano, first("ce-time")); err == nil {
		e.Time = t.UTC()
	}
	e.Data = data
	if !json.Valid(data) { // not a worker's message
		e.Data, _ = json.Marshal(string(data)) // a string can always be encoded
	}
	return e
}

// Job reads a job's record and its events, or finds it in its queue. ErrNoJob is
// in the chain of the error where it is in none of them.
func (s *Store) Job(ctx context.Context, id string) (*Job, error) {
	record, err := s.record(ctx, id)
	if err != nil {
		return nil, err
	}
	j := &Job{Record: record, History: []Event{}, Whole: true}
	stream, err := s.js.Stream(ctx, s.names.EventsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", s.names.EventsStream(), err)
	}
	if err := s.history(ctx, stream, j, id); err != nil {
		return nil, fmt.Errorf("events of job %s: %w", id, err)
	}
	switch {
	case record == nil && len(j.History) == 0:
		j.Waiting, err = s.waiting(ctx, id)
	case record != nil && record.StreamSeq == 0:
		err = s.noted(ctx, j, id)
	}
	if err != nil {
		return nil, err
	}
	if j.Record != nil && j.Record.State == lifecycle.StateDeadLettered {
		s.afterLetter(ctx, j, id)
	}
	j.Replays = s.replays(ctx, id)
	if queue := j.queueItWaitsIn(); queue != "" {
		j.PausedUntil = s.pausedUntil(ctx, queue)
	}
	j.Cost = j.cost(s.now(), s.tariff)
	return j, nil
}

// queueItWaitsIn is the queue that has to deliver the job before it goes on; "": none.
func (j *Job) queueItWaitsIn() string {
	switch {
	case j.Waiting != nil:
		return j.Waiting.Queue
	case j.NextRun != nil:
		return j.NextRun.Queue
	case j.Record == nil:
		return ""
	}
	switch j.Record.State {
	case lifecycle.StateRetrying, lifecycle.StateHeld, lifecycle.StateReleased:
		return j.Record.Queue
	default:
		return ""
	}
}

// replays are those of the job. That they can't be read keeps nobody from seeing the job.
func (s *Store) replays(ctx context.Context, id string) []dlq.ReplayedRun {
	ctx, cancel := context.WithTimeout(ctx, storageTime)
	defer cancel()
	list, err := dlq.NewStore(s.js, s.names, nil).Replays(ctx, id)
	if err != nil {
		return nil
	}
	return list
}

// pausedUntil is when the pause of a queue ends; zero: it is not paused, or that can't be
// read, which keeps nobody from seeing the job. A user without the permission gets no answer.
func (s *Store) pausedUntil(ctx context.Context, queue string) (until time.Time) {
	ctx, cancel := context.WithTimeout(ctx, storageTime)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.names.JobsStream())
	if err != nil {
		return until
	}
	list := stream.ListConsumers(ctx)
	for consumer := range list.Info() {
		if at := consumer.Config.PauseUntil; consumer.Name == queue && consumer.Paused && at != nil {
			until = at.UTC()
		}
	}
	return until
}

// afterLetter looks for what became of a job's dead letter, as far as that can be
// read in the time for counting.
func (s *Store) afterLetter(ctx context.Context, j *Job, id string) {
	next, _, err := s.Waiting(ctx, id)
	if err == nil && next != nil && next.Run > j.Record.Run {
		j.NextRun = next
		return
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	filter := dlq.Filter{Jobs: []string{id}}
	if e := j.Record.LastError; e != nil {
		filter.Codes = append(filter.Codes, e.Code)
	}
	first, stop := iter.Pull2(dlq.NewStore(s.js, s.names, nil).List(short, filter, 1))
	defer stop()
	_, err, more := first()
	j.LetterGone = !more && err == nil && short.Err() == nil // else it is not known
}

// noted finds the job that a record without a message was made for: a cancel that was noted
// before a worker took the job. Until then the job waits as others do.
func (s *Store) noted(ctx context.Context, j *Job, id string) error {
	found, _, err := s.Waiting(ctx, id)
	if err == nil && found != nil {
		found.CancelRequested = j.Record.CancelRequested
		j.Waiting, j.Record = found, nil
	}
	return err
}

// waiting finds a job of which nothing else is known.
func (s *Store) waiting(ctx context.Context, id string) (*Waiting, error) {
	found, looked, err := s.Waiting(ctx, id)
	switch {
	case err != nil || found != nil:
		return found, err
	case !looked.All:
		return nil, fmt.Errorf("%w %s, unless it is one of many that wait: only %d of %d jobs in the queues could be read within the time; allow more with --count-for", ErrNoJob, id, looked.Looked, looked.Of)
	}
	return nil, fmt.Errorf("%w %s: it has no record, no event, and waits in no queue; is the id mistyped, or did its record age out?", ErrNoJob, id)
}

func (s *Store) record(ctx context.Context, id string) (*lifecycle.Record, error) {
	kv, err := s.js.KeyValue(ctx, s.names.StateBucket())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", s.names.StateBucket(), err)
	}
	entry, err := kv.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, nil //nolint:nilnil // it has none, which is not an error
	}
	if err != nil {
		return nil, fmt.Errorf("record of job %s: %w", id, err)
	}
	var r lifecycle.Record
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		return nil, fmt.Errorf("record of job %s can't be read by this version: %w", id, err)
	}
	return &r, nil
}

// history reads the job's own events, and looks for its error events: their
// subjects do not name the job.
func (s *Store) history(ctx context.Context, stream jetstream.Stream, j *Job, id string) error {
	cfg := jetstream.ConsumerConfig{FilterSubject: s.names.EventsFilter("", id)}
	err := streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		j.History = append(j.History, NewEvent(msg.Subject(), msg.Headers(), slices.Clone(msg.Data()), meta.Sequence.Stream, meta.Timestamp))
		return true
	})
	if err != nil {
		return err
	}
	from := j.begin()
	if from.IsZero() {
		return nil
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	err = s.errorEvents(short, stream, j, id, from.Add(-clockSlack))
	if ctx.Err() == nil && short.Err() != nil {
		j.Whole, err = false, nil
	}
	slices.SortFunc(j.History, func(a, b Event) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1
	})
	return err
}

// begin is the earliest time at which anything is known to have happened to the
// job.
func (j *Job) begin() time.Time {
	var from time.Time
	if j.Record != nil {
		from = j.Record.CreatedAt
		if at := j.Record.PublishedAt; !at.IsZero() && at.Before(from) {
			from = at
		}
	}
	if len(j.History) > 0 && (from.IsZero() || j.History[0].Time.Before(from)) {
		from = j.History[0].Time
	}
	return from
}

// ended is the sequence of the event of the job's outcome, which comes after the error
// events of all its attempts; 0: it has none yet, or it is gone.
func (j *Job) ended() uint64 {
	if j.Record == nil || !j.Record.State.Final() || len(j.History) == 0 {
		return 0
	}
	last := j.History[len(j.History)-1]
	var body struct {
		Run int `json:"run"`
	}
	if json.Unmarshal(last.Data, &body) != nil || body.Run != j.Record.Run || !strings.HasSuffix(last.Type, "."+string(j.Record.State)) {
		return 0
	}
	return last.Seq
}

// Deadline is the one that passed, of a job that expired; nil: it did not, or its event
// is gone.
func (j *Job) Deadline() *time.Time {
	if j.Record == nil || j.Record.State != lifecycle.StateExpired {
		return nil
	}
	for _, e := range slices.Backward(j.History) {
		var body struct {
			Deadline *time.Time `json:"deadline"`
		}
		if strings.HasSuffix(e.Type, "."+event.TypeExpired) && json.Unmarshal(e.Data, &body) == nil {
			return body.Deadline
		}
	}
	return nil
}

func (s *Store) errorEvents(ctx context.Context, stream jetstream.Stream, j *Job, id string, from time.Time) error {
	cfg := jetstream.ConsumerConfig{
		FilterSubject: s.names.AllErrors(), HeadersOnly: true,
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
	}
	var found []uint64
	end := j.ended()
	err := streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		if end > 0 && meta.Sequence.Stream > end {
			return false
		}
		if values := msg.Headers()["ce-subject"]; len(values) > 0 && values[0] == id {
			found = append(found, meta.Sequence.Stream)
		}
		return true
	})
	if err != nil && ctx.Err() == nil {
		return err
	}
	for _, seq := range found {
		msg, getErr := stream.GetMsg(context.WithoutCancel(ctx), seq)
		if errors.Is(getErr, jetstream.ErrMsgNotFound) {
			continue // aged out meanwhile
		}
		if getErr != nil {
			return getErr
		}
		j.History = append(j.History, NewEvent(msg.Subject, msg.Header, msg.Data, seq, msg.Time))
	}
	return err
}

// Kinds of events that Subjects chooses among.
const (
	KindErrors = "errors"
	KindAlerts = "alerts"
	KindJobs   = "jobs"
)

// Subjects returns the subjects of the kinds, or of all kinds if none is given. With
// a job id, job events are limited to that job.
func Subjects(names topology.Names, kinds []string, jobID string) []string {
	all := len(kinds) == 0
	var subjects []string
	if all || slices.Contains(kinds, KindErrors) {
		subjects = append(subjects, names.AllErrors())
	}
	if (all && jobID == "") || slices.Contains(kinds, KindAlerts) {
		subjects = append(subjects, names.AllAlerts())
	}
	if all || slices.Contains(kinds, KindJobs) {
		subjects = append(subjects, names.EventsFilter("", jobID))
	}
	return subjects
}
