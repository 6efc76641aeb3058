package jobs

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
)

// Control reaches a running attempt from outside: the control subject on one
// side, the Runner on the other. The zero value is ready for use.
type Control struct {
	mu        sync.Mutex
	interrupt func(ctx context.Context) (Interrupted, error)
}

// OnInterrupt sets what an interrupt does while the session lives; nil when
// there is nothing to interrupt any more.
func (c *Control) OnInterrupt(f func(ctx context.Context) (Interrupted, error)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupt = f
}

func (c *Control) handler() func(ctx context.Context) (Interrupted, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.interrupt
}

// Interrupted answers an interrupt.
type Interrupted struct {
	ReqID   string // the utterance that was interrupted
	LastSeq int64  // the last Avatar-Seq published; 0 where the output is not frames
}

// nudgeTimeout bounds the wait for the worker that runs a job.
const nudgeTimeout = 5 * time.Second

// RequestCancel asks for the end of a job, running or not: it notes the request
// in the job's record (made if there is none) and nudges the worker that runs it.
func RequestCancel(ctx context.Context, nc *nats.Conn, store *kv.Store, controlSubject, jobID string) (control.Reply, error) {
	reply, running, err := noteCancel(ctx, store, jobID)
	if err != nil || !running {
		return reply, err
	}
	return nudge(ctx, nc, controlSubject, reply), nil
}

// noteCancel sets cancel_requested, and reports whether a worker is said to run
// the job.
func noteCancel(ctx context.Context, store *kv.Store, jobID string) (_ control.Reply, running bool, err error) {
	for {
		now := time.Now().UTC()
		record := lifecycle.CancelBefore(jobID, now)
		revision, err := store.Get(ctx, jobID, record)
		if err != nil {
			return control.Reply{}, false, err
		}
		if record.State == lifecycle.StateCancelled {
			// Also the answer if the worker that ran the job ended it a moment ago.
			return control.Reply{JobID: jobID, Status: control.StatusCancelled}, false, nil
		}
		if record.State.Final() {
			return control.Reply{JobID: jobID, Status: control.StatusFinished, Outcome: string(record.Outcome)}, false, nil
		}
		reply := control.Reply{JobID: jobID, Status: control.StatusRequested}
		if record.CancelRequested {
			return reply, record.State == lifecycle.StateRunning, nil
		}
		record.RequestCancel(now)
		if _, err = store.Put(ctx, jobID, record, revision); err == nil {
			return reply, record.State == lifecycle.StateRunning, nil
		}
		if !errors.Is(err, kv.ErrConflict) {
			return control.Reply{}, false, err
		}
	}
}

// nudge tells the worker that runs the job. One that does not answer, or is too
// busy, finds the request in the record.
func nudge(ctx context.Context, nc *nats.Conn, subject string, otherwise control.Reply) control.Reply {
	ctx, cancel := context.WithTimeout(ctx, nudgeTimeout)
	defer cancel()
	msg, err := nc.RequestWithContext(ctx, subject, []byte(`{"op":"cancel"}`))
	if err != nil {
		return otherwise
	}
	var reply control.Reply
	if json.Unmarshal(msg.Data, &reply) != nil || reply.Status == "" || reply.Status == control.StatusRefused {
		return otherwise
	}
	return reply
}

// controlled is the worker as the control subject sees it.
type controlled struct{ w *Worker }

var _ control.Jobs = controlled{}

// Own implements control.Jobs.
func (c controlled) Own(jobID string) (control.Running, bool) {
	e := c.w.execution(jobID)
	return e, e != nil
}

// Look implements control.Jobs.
func (c controlled) Look(ctx context.Context, jobID string) (control.Standing, error) {
	var record lifecycle.Record
	revision, err := c.w.store.Get(ctx, jobID, &record)
	s := control.Standing{Known: revision != 0, State: string(record.State)}
	if err != nil || record.State != lifecycle.StateRunning {
		return s, err
	}
	s.Held, err = c.w.lease.Stands(ctx, record.WorkerID)
	return s, err
}

// NoteCancel implements control.Jobs.
func (c controlled) NoteCancel(ctx context.Context, jobID string) (control.Reply, error) {
	reply, _, err := noteCancel(ctx, c.w.store, jobID)
	return reply, err
}

// Cancel implements control.Running: it ends the job and waits until that is
// settled.
func (e *execution) Cancel(ctx context.Context) control.Reply {
	e.mu.Lock()
	e.ending = true
	cancel := e.cancel
	e.mu.Unlock()
	if cancel != nil {
		cancel(errCancelled)
	}
	select {
	case <-e.done:
	case <-ctx.Done():
	}
	e.mu.Lock()
	result := e.result
	e.mu.Unlock()
	switch result {
	case lifecycle.StateCancelled:
		return control.Reply{Status: control.StatusCancelled}
	case "": // it failed just then and waits for its retry, or is not settled yet
		return e.noteCancel(ctx)
	default:
		return control.Reply{Status: control.StatusFinished, Outcome: string(result)}
	}
}

// noteCancel leaves the request in the record, for the next delivery.
func (e *execution) noteCancel(ctx context.Context) control.Reply {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	reply, _, err := noteCancel(ctx, e.w.store, e.id.ID)
	if err != nil {
		return control.Reply{Status: control.StatusRequested, Message: "not yet written; ask again to be sure"}
	}
	return reply
}

// Interrupt implements control.Running: it ends the utterance in flight.
func (e *execution) Interrupt(ctx context.Context) control.Reply {
	interrupt := e.control.handler()
	if interrupt == nil {
		reply := control.Reply{Status: control.StatusNotRunning, Message: "no utterance is being spoken"}
		if record := e.record.Current(); record != nil { // it is being taken over
			reply.State = string(record.State)
		}
		return reply
	}
	got, err := interrupt(ctx)
	if err != nil {
		return control.Reply{Status: control.StatusNotRunning, State: string(lifecycle.StateRunning), Message: err.Error()}
	}
	return control.Reply{Status: control.StatusInterrupted, ReqID: got.ReqID, LastSeq: got.LastSeq}
}
