package dlq

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobpb"
)

// Status says what Replay did, or with DryRun would do.
type Status string

const (
	// StatusReplayed: the job is in its queue again, its letter removed.
	StatusReplayed Status = "replayed"
	// StatusWouldReplay: the same under DryRun; nothing was changed.
	StatusWouldReplay Status = "would_replay"
	// StatusAlready: an earlier replay had been interrupted after it published;
	// only the letter was removed (under DryRun: would be).
	StatusAlready Status = "already"
	// StatusDeadlinePassed: skipped; the letter stays.
	StatusDeadlinePassed Status = "deadline_passed"
)

// ReplayOptions change what Replay does.
type ReplayOptions struct {
	IgnoreDeadline bool // replay also what is past its deadline, and let it run
	DryRun         bool // say what would be done, change nothing
}

// Result is what became of one letter.
type Result struct {
	Seq      uint64     `json:"seq"`
	JobID    string     `json:"job_id"`
	Run      int        `json:"run"` // the new run
	Subject  string     `json:"subject"`
	Status   Status     `json:"status"`
	Deadline *time.Time `json:"deadline,omitempty"` // the job's
}

// Replay publishes the letter's job again on its original subject, as its next
// run, and removes the letter once the publish is acknowledged. It may be
// interrupted and repeated: the job does not run twice for it, since every
// repetition is the same run of the same job. Where the job was published but
// the letter could not be removed, both the result (StatusReplayed) and the
// error are set.
func (s *Store) Replay(ctx context.Context, seq uint64, o ReplayOptions) (Result, error) {
	stream, err := s.stream(ctx)
	if err != nil {
		return Result{}, err
	}
	letter, err := s.show(ctx, stream, seq)
	if err != nil {
		return Result{}, err
	}
	r := Result{Seq: seq, JobID: letter.JobID, Run: letter.Run + 1, Subject: letter.Subject, Deadline: deadline(letter)}
	if err := s.replayable(letter); err != nil {
		return r, fmt.Errorf("dead letter %d: %w", seq, err)
	}
	r.Status, err = s.plan(ctx, r, o)
	if err != nil || o.DryRun || r.Status == StatusDeadlinePassed {
		return r, err
	}
	if r.Status == StatusWouldReplay {
		if r.Status, err = s.publish(ctx, letter, r.Run, o); err != nil {
			r.Status = ""
			return r, err
		}
	}
	// Not there: another replay of the same letter was quicker to remove it.
	if err := remove(ctx, stream, seq); err != nil && !errors.Is(err, ErrNoLetter) {
		return r, fmt.Errorf("job %s is in its queue again, but its letter stays (repeating is harmless): %w", r.JobID, err)
	}
	return r, nil
}

func (s *Store) replayable(l Letter) error {
	if omitted := l.Header.Get(HeaderOmitted); omitted != "" {
		return fmt.Errorf("the job's bytes (%s) did not fit into it: publish the job anew", omitted)
	}
	if l.JobID == "" || l.Run < 1 {
		return fmt.Errorf("it has no %s and %s: it was not written by a worker", HeaderJobID, HeaderRun)
	}
	if l.Run >= jobs.MaxRun {
		return fmt.Errorf("a job has at most %d runs, and this one's next would be %d: publish the job anew under another id", jobs.MaxRun, l.Run+1)
	}
	if _, ok := s.names.QueueOf(l.Subject); !ok {
		return fmt.Errorf("its %s %q is no subject for jobs under this nats.prefix", HeaderSubject, l.Subject)
	}
	return nil
}

// plan looks at the job's record and deadline. What was published already is
// finished first: the deadline has no say in it any more.
func (s *Store) plan(ctx context.Context, r Result, o ReplayOptions) (Status, error) {
	run, err := s.recordedRun(ctx, r.JobID)
	if err != nil {
		return "", err
	}
	switch {
	case run >= r.Run:
		return StatusAlready, nil
	case r.Deadline != nil && !s.now().Before(*r.Deadline) && !o.IgnoreDeadline:
		return StatusDeadlinePassed, nil
	}
	return StatusWouldReplay, nil
}

// recordedRun is the run that the job's record stands at; 0 where it has none
// (any more).
func (s *Store) recordedRun(ctx context.Context, jobID string) (int, error) {
	kv, err := s.js.KeyValue(ctx, s.names.StateBucket())
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("bucket %s: %w", s.names.StateBucket(), err)
	}
	value, err := kv.Get(ctx, jobID)
	if errors.Is(err, jetstream.ErrKeyNotFound) || errors.Is(err, jetstream.ErrInvalidKey) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("record of job %s: %w", jobID, err)
	}
	var record struct {
		Run int `json:"run"`
	}
	if err := json.Unmarshal(value.Value(), &record); err != nil {
		return 0, fmt.Errorf("record of job %s: %w", jobID, err)
	}
	return record.Run, nil
}

func (s *Store) publish(ctx context.Context, l Letter, run int, o ReplayOptions) (Status, error) {
	msg := nats.NewMsg(l.Subject)
	msg.Header = restored(l.Header)
	msg.Data = l.Data
	msg.Header.Set(HeaderJobID, l.JobID)
	msg.Header.Set(HeaderRun, strconv.Itoa(run))
	if o.IgnoreDeadline {
		msg.Header.Set(HeaderIgnoreDeadline, "true")
	}
	ack, err := s.js.PublishMsg(ctx, msg,
		jetstream.WithMsgID(fmt.Sprintf("%s.run%d", l.JobID, run)),
		jetstream.WithExpectStream(s.names.JobsStream()))
	if err != nil {
		return "", fmt.Errorf("replaying job %s: %w%s", l.JobID, err, publishHint(err, s.names.JobsStream()))
	}
	if ack.Duplicate {
		return StatusAlready, nil
	}
	return StatusReplayed, nil
}

// codeStoreFailed answers a publish into a full stream.
const codeStoreFailed = 10077

func publishHint(err error, stream string) string {
	var api *jetstream.APIError
	switch {
	case !errors.As(err, &api):
		return ""
	case api.ErrorCode == jetstream.JSErrCodeStreamMessageExceedsMaximum:
		return fmt.Sprintf(": with the headers of a replay the job is larger than max_msg_size of %s: raise that by 1 KiB", stream)
	case api.ErrorCode == codeStoreFailed:
		return fmt.Sprintf(": %s is full or takes nothing: repeat when jobs have been done", stream)
	}
	return ""
}

// deadline reads the job's deadline and nothing else: of a job that is not
// valid no more is known than that.
func deadline(l Letter) *time.Time {
	if jobs.IsProtobuf(l.Header) {
		var job jobpb.Job
		if proto.Unmarshal(l.Data, &job) != nil || !job.GetDeadline().IsValid() {
			return nil
		}
		at := job.GetDeadline().AsTime()
		return &at
	}
	var job struct {
		Deadline *time.Time `json:"deadline"`
	}
	if json.Unmarshal(l.Data, &job) != nil {
		return nil
	}
	return job.Deadline
}
