package dlq

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/leader"
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
	// Correct returns the job to publish instead of the letter's own bytes, as
	// JSON; nil: those. It is validated before anything is changed.
	Correct func(Letter) ([]byte, error)
}

// Result is what became of one letter.
type Result struct {
	Seq      uint64     `json:"seq"`
	JobID    string     `json:"job_id"`
	Run      int        `json:"run"` // the new run
	Subject  string     `json:"subject"`
	Status   Status     `json:"status"`
	Deadline *time.Time `json:"deadline,omitempty"` // the job's
	// Corrected is the digest of the letter's own bytes where another job is
	// published in their place.
	Corrected string `json:"corrected,omitempty"`
}

// Replay publishes the letter's job again on its original subject, as its next
// run, and removes the letter once the publish is acknowledged. A corrected job's letter
// is stored beside the job's record first; Original returns it. It may be interrupted
// and repeated without a second run, since every repetition is the same run of the
// same job. Two letters with one job id, which is free again after
// nats.state_ttl, are two runs. If the job was published but the letter could not
// be removed, or the claim not written, both the result (StatusReplayed) and the
// error are set.
func (s *Store) Replay(ctx context.Context, seq uint64, o ReplayOptions) (Result, error) {
	letter, err := s.Show(ctx, seq)
	if err != nil {
		return Result{}, err
	}
	r := Result{Seq: seq, JobID: letter.JobID, Run: letter.Run + 1, Subject: letter.Subject}
	if err := s.replayable(letter, o.Correct != nil); err != nil {
		return r, &InvalidError{seq, err}
	}
	job, err := jobOf(letter, o)
	if err != nil {
		return r, &InvalidError{seq, err}
	}
	r.Deadline, r.Corrected = deadline(job), job.corrected
	runs, err := s.openRuns(ctx, letter)
	if err != nil {
		return r, err
	}
	own, done, err := runs.look(ctx)
	r.Run = own.Run
	switch {
	case err != nil:
		return r, err
	case done:
		// What was published already is finished first, whatever the deadline.
		r.Status = StatusAlready
	case r.Deadline != nil && !runs.now().Before(*r.Deadline) && !o.IgnoreDeadline:
		r.Status = StatusDeadlinePassed
	default:
		r.Status = StatusWouldReplay
	}
	if o.DryRun || r.Status == StatusDeadlinePassed {
		return r, nil
	}
	if r.Status == StatusWouldReplay {
		if r.Run, r.Status, err = s.publish(ctx, runs, job, o); err != nil {
			return r, err
		}
	}
	// Not there: another replay of the same letter was quicker to remove it.
	if err := s.Remove(ctx, seq); err != nil && !errors.Is(err, ErrNoLetter) {
		return r, fmt.Errorf("job %s is in its queue again, but its letter stays (repeating is harmless): %w", r.JobID, err)
	}
	return r, nil
}

// InvalidError says that a letter can't be replayed as it is, or not with this
// correction. Nothing was changed.
type InvalidError struct {
	Seq uint64
	err error
}

func (e *InvalidError) Error() string { return fmt.Sprintf("dead letter %d: %s", e.Seq, e.err) }
func (e *InvalidError) Unwrap() error { return e.err }

// replayable returns an error if the letter can't be replayed. corrected means that
// another job is published instead of the letter's own.
func (s *Store) replayable(l Letter, corrected bool) error {
	if omitted := l.Header.Get(HeaderOmitted); omitted != "" && !corrected {
		return fmt.Errorf("the job's bytes (%s) did not fit into it: replay it with --body FILE, or publish the job again", omitted)
	}
	if l.JobID == "" || l.Run < 1 {
		return fmt.Errorf("it has no %s and %s: it was not written by a worker", HeaderJobID, HeaderRun)
	}
	if !jobspec.ValidID(l.JobID) {
		return fmt.Errorf("its %s %q names no job: it was not written by a worker", HeaderJobID, cut(l.JobID, maxText))
	}
	if l.Run >= jobspec.MaxRun {
		return fmt.Errorf("a job has at most %d runs, and this one's next would be %d: publish the job again under another id", jobspec.MaxRun, l.Run+1)
	}
	if _, ok := s.names.QueueOf(l.Subject); !ok {
		return fmt.Errorf("its %s %q is not a subject for jobs under this nats.prefix", HeaderSubject, l.Subject)
	}
	return nil
}

// maxTaken is how many message ids of other messages a replay steps over.
const maxTaken = 100

// publish claims a run for the letter and publishes it.
func (s *Store) publish(ctx context.Context, runs *runs, l replayed, o ReplayOptions) (int, Status, error) {
	after := 0 // the run whose message id another message already has
	for range maxTaken {
		own, done, err := runs.claim(ctx, after, l.corrected)
		switch {
		case err != nil:
			return own.Run, "", err
		case done: // another replay of the same letter was quicker
			return own.Run, StatusAlready, nil
		}
		before, err := runs.before(ctx, own)
		if err != nil {
			return own.Run, "", err
		}
		if l.corrected != "" { // first, because the letter is removed after the publish
			if err := runs.keepOriginal(ctx, own.Run); err != nil {
				return own.Run, "", err
			}
		}
		ack, err := s.publishRun(ctx, l, own.Run, before, o)
		switch {
		case err != nil:
			return own.Run, "", err
		case !ack.Duplicate:
			return own.Run, StatusReplayed, runs.published(ctx, own.Run, ack.Sequence, l.corrected)
		}
		mine, corrected, err := s.isOwn(ctx, ack.Sequence, l, own.Run, runs)
		switch {
		case err != nil:
			return own.Run, "", err
		case mine:
			return own.Run, StatusAlready, runs.published(ctx, own.Run, ack.Sequence, corrected)
		}
		after = own.Run
	}
	return after, "", fmt.Errorf("replaying job %s: the last %d message ids up to %s.run%d are those of other messages: repeat when the duplicate window of %s is over",
		l.JobID, maxTaken, l.JobID, after, s.names.JobsStream())
}

func (s *Store) publishRun(ctx context.Context, l replayed, run int, before uint64, o ReplayOptions) (*jetstream.PubAck, error) {
	msg := nats.NewMsg(l.Subject)
	msg.Header, msg.Data = maps.Clone(l.header), l.body
	msg.Header.Set(HeaderJobID, l.JobID)
	msg.Header.Set(HeaderRun, strconv.Itoa(run))
	if before != 0 {
		msg.Header.Set(HeaderAfterSeq, strconv.FormatUint(before, 10))
	}
	if o.IgnoreDeadline {
		msg.Header.Set(HeaderIgnoreDeadline, "true")
	}
	ack, err := s.js.PublishMsg(ctx, msg,
		jetstream.WithMsgID(fmt.Sprintf("%s.run%d", l.JobID, run)),
		jetstream.WithExpectStream(s.names.JobsStream()))
	if err != nil {
		return nil, fmt.Errorf("replaying job %s: %w%s", l.JobID, err, publishHint(err, s.names.JobsStream()))
	}
	return ack, nil
}

// isOwn reports whether the message that the jobs stream has under the id of a
// replay is this letter's: an earlier try of the same replay. Publishers choose
// message ids freely, so another job's message may have that id. corrected is the digest
// that the message was corrected from.
func (s *Store) isOwn(ctx context.Context, seq uint64, l replayed, run int, runs *runs) (own bool, corrected string, err error) {
	msg, err := leader.Message(ctx, s.js, s.names.JobsStream(), seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		// It was taken. A worker writes the record before it acknowledges, and
		// only this letter has claimed the run.
		recorded, err := runs.recorded(ctx)
		return recorded.Run >= run, l.corrected, err
	}
	if err != nil {
		return false, "", fmt.Errorf("replaying job %s: %w", l.JobID, err)
	}
	h := msg.Header
	// Another operator may have corrected the letter otherwise.
	if correctedFrom(h) == digest(l.Data) {
		corrected = digest(l.Data)
	}
	own = bytes.Equal(msg.Data, l.Data) || corrected != ""
	return h.Get(HeaderJobID) == l.JobID && number(h, HeaderRun) == run && own, corrected, nil
}

// codeStoreFailed is the server's error code for a publish into a full stream.
const codeStoreFailed = 10077

func publishHint(err error, stream string) string {
	var api *jetstream.APIError
	switch {
	case !errors.As(err, &api):
		return ""
	case api.ErrorCode == jetstream.JSErrCodeStreamMessageExceedsMaximum:
		return fmt.Sprintf(": with the headers of a replay the job is larger than max_msg_size of %s: raise that by 1 KiB", stream)
	case api.ErrorCode == codeStoreFailed:
		return fmt.Sprintf(": %s is full or can't store messages: repeat when jobs have been done", stream)
	}
	return ""
}

// deadline reads only the job's deadline, which also an invalid job may have.
func deadline(l replayed) *time.Time {
	if jobspec.IsProtobuf(l.header) {
		var job jobpb.Job
		if proto.Unmarshal(l.body, &job) != nil || !job.GetDeadline().IsValid() {
			return nil
		}
		at := job.GetDeadline().AsTime()
		return &at
	}
	var job struct {
		Deadline *time.Time `json:"deadline"`
	}
	if json.Unmarshal(l.body, &job) != nil {
		return nil
	}
	return job.Deadline
}
