package dlq

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/topology"
)

const (
	maxText   = 256 // bytes of a header of ours that is not the error's body
	maxToken  = 128 // bytes of a code or class, which are tokens of the subject
	maxError  = 4 << 10
	leanError = 1 << 10 // where there is hardly any room
)

// Writer writes dead letters.
type Writer struct {
	js    jetstream.JetStream
	names topology.Names
}

// NewWriter writes into the dead letter stream of these names.
func NewWriter(js jetstream.JetStream, names topology.Names) *Writer {
	return &Writer{js: js, names: names}
}

// Last returns the sequence of the newest letter that there has been, which may have
// been removed since.
func (w *Writer) Last(ctx context.Context) (uint64, error) {
	stream, err := w.js.Stream(ctx, w.names.DLQStream())
	if err != nil {
		return 0, fmt.Errorf("stream %s: %w", w.names.DLQStream(), err)
	}
	return stream.CachedInfo().State.LastSeq, nil
}

// Write stores the letter and returns when the server acknowledged it. The
// same job and run written again (within 24 h) stores nothing new. A try
// without an answer is repeated until ctx ends; give it a deadline. After an
// error it is unknown whether the letter is stored: write it again.
//
// Every job can become a dead letter: where a letter would be larger than the
// server takes, it leaves out what is needed least and says so in its headers.
func (w *Writer) Write(ctx context.Context, d lifecycle.DeadLetter) error {
	if d.Job.ID == "" {
		return fmt.Errorf("dead letter of message %d on %s: it has no job id", d.Job.StreamSeq, d.Job.Subject)
	}
	id := fmt.Sprintf("%s.run%d.dead", d.Job.ID, d.Job.Run)
	ack, err := w.store(ctx, d, id)
	// The stream knows an id for 24 h, longer than the letter may stay, and a
	// job's id may be used again once its record is gone. Then the one stored
	// is the earlier job's. Its sequence shows which it is: the letter itself
	// may have been replayed or removed, and if it was this job's it is not
	// written again.
	if err == nil && ack.Duplicate && ack.Sequence <= d.LettersBefore {
		_, err = w.store(ctx, d, fmt.Sprintf("%s.%d", id, d.Job.StreamSeq))
	}
	if err != nil {
		return fmt.Errorf("dead letter of job %s: %w", d.Job.ID, err)
	}
	return nil
}

// store publishes the letter under that message id.
func (w *Writer) store(ctx context.Context, d lifecycle.DeadLetter, id string) (jetstream.PubAck, error) {
	msg, err := w.compose(d, id)
	if err != nil {
		return jetstream.PubAck{}, err
	}
	return event.PublishStored(ctx, w.js.Conn(), msg, nil)
}

func (w *Writer) compose(d lifecycle.DeadLetter, id string) (*nats.Msg, error) {
	event, err := eventJSON(d.Error, maxError)
	if err != nil {
		return nil, err
	}
	msg := nats.NewMsg(w.names.DLQ(orUnknown(string(d.Error.Class)), orUnknown(string(d.Error.Code))))
	msg.Header = carried(d.Header)
	msg.Data = d.Data
	for name, value := range map[string]string{
		nats.MsgIdHdr:                  id,
		jetstream.ExpectedStreamHeader: w.names.DLQStream(),
		HeaderJobID:                    d.Job.ID,
		HeaderRun:                      strconv.Itoa(d.Job.Run),
		HeaderCrashes:                  strconv.Itoa(d.Crashes),
		HeaderQueue:                    d.Job.Queue,
		HeaderSubject:                  d.Job.Subject,
		HeaderStreamSeq:                strconv.FormatUint(d.Job.StreamSeq, 10),
		HeaderCode:                     orUnknown(string(d.Error.Code)),
		HeaderClass:                    orUnknown(string(d.Error.Class)),
		HeaderPhase:                    cut(string(d.Error.Phase), maxText),
		HeaderReason:                   cut(d.Reason, maxText),
		HeaderAttempts:                 strconv.Itoa(d.Attempts),
		HeaderFailedAt:                 d.FailedAt.UTC().Format(time.RFC3339Nano),
		HeaderWorker:                   cut(d.Worker, maxText),
		HeaderError:                    event,
	} {
		msg.Header.Set(name, value)
	}
	return msg, w.fit(msg, d.Error)
}

func orUnknown(text string) string {
	if text == "" {
		return "unknown"
	}
	return cut(text, maxToken)
}
