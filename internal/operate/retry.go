package operate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
	"avatarworker/internal/status"
)

// Statuses of a Retry.
const (
	StatusDelivered = "delivered" // it is delivered now
	StatusHeld      = "held"      // its circuit is open, or its budget is spent; nothing was changed
	StatusRunning   = "running"   // a worker runs it; there is nothing to do
	StatusWaiting   = "waiting"   // it is in its queue and has no record
	StatusFinished  = "finished"  // too late: it has an outcome
	StatusLost      = "lost"      // it has a record, but its message is gone
	StatusUnknown   = "unknown"   // it has no record and is in no queue
)

// Retried is the result of a retry.
type Retried struct {
	JobID   string          `json:"job_id"`
	Status  string          `json:"status"`
	State   lifecycle.State `json:"state,omitempty"` // of its record
	Message string          `json:"message,omitempty"`
}

// Done reports whether the job runs, is delivered, or waits in its queue.
func (r Retried) Done() bool {
	return r.Status == StatusDelivered || r.Status == StatusRunning || r.Status == StatusWaiting
}

// Retry has a job that is in backoff or held delivered at once.
//
// It first sets the time of the next attempt in the record to now, by compare-and-set,
// and then asks JetStream to deliver the message again. If that request is lost, the job
// is delivered when its backoff ends. A delivery too many does no harm: the record decides
// who runs the job.
//
// A job whose budget is spent or whose circuit is open stays held. With probe, the
// circuit lets its next job through first.
func (o *Operator) Retry(ctx context.Context, jobID string, probe bool) (Retried, error) {
	record, result, err := o.makeDue(ctx, jobID, probe)
	if err == nil && result.Status == StatusUnknown {
		return o.findWaiting(ctx, result)
	}
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
		return result, nil
	}
	if probe {
		err = o.redeliverUntilProbed(ctx, record)
	}
	return result, err
}

// redeliverUntilProbed has a job delivered again as long as its circuit waits for a probe: a worker
// may get the job before it learns that the circuit takes one, and hold it once more.
func (o *Operator) redeliverUntilProbed(ctx context.Context, record *lifecycle.Record) error {
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return err
	}
	for wait := 100 * time.Millisecond; wait < 2*time.Second; wait *= 2 {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		open, err := o.openCircuit(ctx, circuits, record.AppID, record.Region)
		if err != nil || open == nil || open.State != circuit.Open {
			return err
		}
		if err := o.redeliver(ctx, record.Queue, record.StreamSeq); err != nil {
			return err
		}
	}
	return nil // it comes by itself when its wait ends
}

// findWaiting looks for a job without a record in the queues.
func (o *Operator) findWaiting(ctx context.Context, result Retried) (Retried, error) {
	found, looked, err := o.status.Waiting(ctx, result.JobID)
	switch {
	case err != nil:
		return result, err
	case found != nil:
		result.Status, result.Message = StatusWaiting, "no worker has received it yet"
		if found.Delivered {
			result.Message = "it was delivered and handed back, and comes again by itself; it waits for " + found.WaitsFor
		}
	case looked.All:
		result.Message = "no record and no waiting job has this id"
	default:
		result.Message = fmt.Sprintf("it has no record, and is not among the %d of %d jobs in the queues that there was time to look at", looked.Looked, looked.Of)
	}
	return result, nil
}

// makeDue ends the job's wait in its record. If there is nothing to deliver, it returns no
// record, and the result says why.
func (o *Operator) makeDue(ctx context.Context, jobID string, probe bool) (*lifecycle.Record, Retried, error) {
	for {
		record := new(lifecycle.Record)
		result := Retried{JobID: jobID}
		revision, err := o.records.Get(ctx, jobID, record)
		if err != nil {
			return nil, result, fmt.Errorf("record of job %s: %w", jobID, err)
		}
		if revision == 0 || record.StreamSeq == 0 {
			result.Status = StatusUnknown
			return nil, result, nil
		}
		result.State = record.State
		switch {
		case record.State.Final():
			if run, err := o.replayed(ctx, record); run != 0 || err != nil {
				result.Status, result.Message = StatusWaiting, fmt.Sprintf("run %d waits in its queue", run)
				return nil, result, err
			}
			result.Status, result.Message = StatusFinished, "its outcome is "+string(record.Outcome)
			if record.Outcome == lifecycle.StateDeadLettered {
				result.Message += ": avatarworker dlq replay --job " + jobID
			}
			return nil, result, nil
		case record.State == lifecycle.StateRunning:
			result.Status = StatusRunning
			return nil, result, nil
		}
		if record.HeldReason == lifecycle.HeldBudget && record.State == lifecycle.StateHeld {
			refused, err := o.status.Refused(ctx, budget.Job{App: record.AppID, Labels: record.Labels})
			switch {
			case refused != nil:
				result.Status, result.Message = StatusHeld, refused.String()
				return nil, result, nil
			case err != nil:
				result.Message = "whether its budget is still spent is not known: " + errors.RedactText(err.Error())
			}
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
			// An outcome is written before the message is acknowledged, so the record
			// that was read may be older.
			if now, err := o.records.Get(ctx, jobID, new(lifecycle.Record)); err != nil || now != revision {
				if err != nil {
					return nil, result, fmt.Errorf("record of job %s: %w", jobID, err)
				}
				continue
			}
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

// replayed returns the later run of a job with an outcome whose message is in the jobs
// stream, or 0.
func (o *Operator) replayed(ctx context.Context, record *lifecycle.Record) (int, error) {
	later, err := record.LaterRun(ctx, o.records)
	if err != nil || later.StreamSeq == 0 {
		return 0, err
	}
	if exists, err := o.messageExists(ctx, later.StreamSeq); !exists {
		return 0, err
	}
	return later.Run, nil
}

// circuitHolds returns the circuit that would hold the job, or nil if none does or it
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

// nakTimeout bounds the wait for the consumer's leader.
const nakTimeout = 5 * time.Second

// redeliver ends the delay of a message's redelivery: it sends another nak, without a
// delay. The server accepts that for any message that is delivered and not acknowledged,
// from any client, and replies.
func (o *Operator) redeliver(ctx context.Context, queue string, seq uint64) error {
	consumer, err := o.jobs.Consumer(ctx, queue)
	if err != nil {
		return queueError(queue, err)
	}
	ctx, cancel := context.WithTimeout(ctx, nakTimeout)
	defer cancel()
	// The subject must hold the number of a delivery that the server has made; any of
	// them will do.
	subject := fmt.Sprintf("$JS.ACK.%s.%s.1.%d.%d.%d.0", o.names.JobsStream(), queue, seq, consumer.CachedInfo().Delivered.Consumer, o.now().UnixNano())
	_, err = o.nc.RequestWithContext(ctx, subject, []byte("-NAK"))
	return err
}

// probed is how many of the jobs that a circuit holds a probe tries to deliver.
const probed = 20

// ProbeCircuit lets the next job of an open circuit through, and has the job delivered
// that the circuit has held longest. It returns the circuit and the id of that job, or ""
// if there is none. If the circuit is closed, the error has circuit.ErrNone in its chain.
func (o *Operator) ProbeCircuit(ctx context.Context, c circuit.Circuit) (circuit.Circuit, string, error) {
	held, err := o.heldBy(ctx, c)
	if err != nil {
		return c, "", err
	}
	circuits, err := o.Circuits(ctx)
	if err != nil {
		return c, "", err
	}
	after, err := circuits.Probe(ctx, c.App, c.Region)
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

// heldBy lists jobs that the circuit holds, the one published first at the front.
func (o *Operator) heldBy(ctx context.Context, c circuit.Circuit) ([]string, error) {
	list, err := o.status.Jobs(ctx, status.Query{Filter: status.Filter{
		States: []lifecycle.State{lifecycle.StateHeld}, Apps: []string{c.App}, Codes: []errors.Code{c.Code},
	}, Limit: probed})
	if err != nil {
		return nil, err
	}
	var held []string
	for _, row := range slices.Backward(list.Rows) {
		if c.Region == "" || row.Region() == c.Region {
			held = append(held, row.ID)
		}
	}
	return held, nil
}
