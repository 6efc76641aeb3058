package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
)

// Statuses of a Retry.
const (
	StatusDelivered = "delivered" // it is delivered now
	StatusHeld      = "held"      // its circuit is open: nothing was changed
	StatusRunning   = "running"   // a worker runs it: nothing to do
	StatusWaiting   = "waiting"   // no worker has had it yet: it is in its queue
	StatusFinished  = "finished"  // too late: it has an outcome
	StatusLost      = "lost"      // it has a record, but no message any more
	StatusUnknown   = "unknown"   // it has no record
)

// Retried is what became of a job that was to be retried.
type Retried struct {
	JobID   string          `json:"job_id"`
	Status  string          `json:"status"`
	State   lifecycle.State `json:"state,omitempty"` // of its record
	Message string          `json:"message,omitempty"`
}

// Done reports whether the job is on its way now.
func (r Retried) Done() bool {
	return r.Status == StatusDelivered || r.Status == StatusRunning || r.Status == StatusWaiting
}

// Retry has a job in backoff or held delivered at once.
//
// Its record says by compare-and-set that its time has come; then JetStream is asked
// to deliver its message again. If that request is lost the job comes when it would
// have come, and finds its time past. A delivery too many does no harm: the record
// decides who runs the job.
//
// A job whose circuit is open stays held, unless probe lets the next job of it
// through.
func (o *Operator) Retry(ctx context.Context, jobID string, probe bool) (Retried, error) {
	record, result, err := o.makeDue(ctx, jobID, probe)
	if err != nil || record == nil {
		return result, err
	}
	until, err := o.Paused(ctx, record.Queue)
	if err != nil {
		return result, err
	}
	if err := o.redeliver(ctx, record.Queue, record.StreamSeq); err != nil {
		return result, fmt.Errorf("job %s is due, but could not be delivered at once (repeating is harmless): %w", jobID, err)
	}
	if !until.IsZero() {
		result.Message = fmt.Sprintf("queue %s is paused: it is delivered when that ends", record.Queue)
	}
	return result, nil
}

// makeDue ends the job's wait in its record. A nil record: there is nothing to
// deliver, and the result says why.
func (o *Operator) makeDue(ctx context.Context, jobID string, probe bool) (*lifecycle.Record, Retried, error) {
	for {
		record := new(lifecycle.Record)
		result := Retried{JobID: jobID}
		revision, err := o.records.Get(ctx, jobID, record)
		if err != nil {
			return nil, result, fmt.Errorf("record of job %s: %w", jobID, err)
		}
		if revision == 0 || record.StreamSeq == 0 {
			result.Status, result.Message = StatusUnknown, "it has no record: it waits in its queue, or there is no job of this id"
			return nil, result, nil
		}
		result.State = record.State
		switch {
		case record.State.Final():
			result.Status, result.Message = StatusFinished, "its outcome is "+string(record.Outcome)
			if record.Outcome == lifecycle.StateDeadLettered {
				result.Message += ": avatarworker dlq replay --job " + jobID
			}
			return nil, result, nil
		case record.State == lifecycle.StateRunning:
			result.Status = StatusRunning
			return nil, result, nil
		}
		if held, err := o.circuitHolds(ctx, record, probe); held != nil || err != nil {
			result.Status = StatusHeld
			if held != nil {
				result.Message = fmt.Sprintf("the circuit of app %s is %s because of %s; --probe lets the next job through", held.App, held.State, held.Code)
			}
			return nil, result, err
		}
		exists, err := o.messageExists(ctx, record.StreamSeq)
		if err != nil {
			return nil, result, err
		}
		if !exists {
			result.Status, result.Message = StatusLost, "its message is gone from the jobs stream: submit the job again"
			return nil, result, nil
		}
		result.Status = StatusDelivered
		if !record.MakeDue(o.now()) {
			return record, result, nil
		}
		_, err = o.records.Put(ctx, jobID, record, revision)
		if !errors.Is(err, kv.ErrConflict) {
			return record, result, err
		}
	}
}

// circuitHolds returns the circuit that would hold the job; nil: none does, or it
// lets the next job through.
func (o *Operator) circuitHolds(ctx context.Context, r *lifecycle.Record, probe bool) (*circuit.Circuit, error) {
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return nil, err
	}
	open, err := o.openCircuit(ctx, circuits, r.AppID, r.Region)
	if err != nil || open == nil {
		return nil, err
	}
	if !probe {
		return open, nil
	}
	after, err := circuits.Probe(ctx, open.App, open.Region)
	switch {
	case errors.Is(err, circuit.ErrNone):
		return nil, nil //nolint:nilnil // it closed meanwhile
	case err != nil:
		return nil, fmt.Errorf("circuit of app %s: %w", open.App, err)
	case after.State == circuit.Probing:
		return &after, nil
	}
	return nil, nil //nolint:nilnil // the next job is the probe
}

func (o *Operator) messageExists(ctx context.Context, seq uint64) (bool, error) {
	_, err := leader.Message(ctx, o.js, o.names.JobsStream(), seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("message %d of the jobs stream: %w", seq, err)
	}
	return true, nil
}

// nakTime bounds the wait for the consumer's leader.
const nakTime = 5 * time.Second

// redeliver ends the delay with which a message was handed back: it is handed back
// once more, without one. The server takes that for any message that is delivered
// and not acknowledged, whichever worker has it, and answers.
func (o *Operator) redeliver(ctx context.Context, queue string, seq uint64) error {
	consumer, err := o.jobs.Consumer(ctx, queue)
	if err != nil {
		return queueError(queue, err)
	}
	ctx, cancel := context.WithTimeout(ctx, nakTime)
	defer cancel()
	// The server wants a number of a delivery that it has made; which one does
	// not matter.
	subject := fmt.Sprintf("$JS.ACK.%s.%s.1.%d.%d.%d.0", o.names.JobsStream(), queue, seq, consumer.CachedInfo().Delivered.Consumer, o.now().UnixNano())
	_, err = o.nc.RequestWithContext(ctx, subject, []byte("-NAK"))
	return err
}

// ProbeCircuit lets the next job of an open circuit through, and wakes the job of
// it that has been held the longest. It returns the circuit, and that job; "": none
// was found.
func (o *Operator) ProbeCircuit(ctx context.Context, app, region string, held []string) (circuit.Circuit, string, error) {
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return circuit.Circuit{}, "", err
	}
	after, err := circuits.Probe(ctx, app, region)
	if err != nil || after.State == circuit.Probing {
		return after, "", err
	}
	for _, id := range held {
		if r, err := o.Retry(ctx, id, true); err != nil {
			return after, "", err
		} else if r.Status == StatusDelivered {
			return after, id, nil
		}
	}
	return after, "", nil
}
