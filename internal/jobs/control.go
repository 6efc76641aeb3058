package jobs

import (
	"context"
	"sync"

	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

// Control reaches a running attempt from outside: the control subject on one
// side, the Runner on the other. The zero value is ready for use.
type Control struct {
	mu        sync.Mutex
	interrupt func(ctx context.Context) (Interrupted, error)
}

// OnInterrupt sets what an interrupt does while the session is open; nil when
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

// controlled is the worker as the control subject sees it.
type controlled struct{ w *Worker }

var _ control.Jobs = controlled{}

// Own implements control.Jobs.
func (c controlled) Own(jobID string) (control.Running, bool) {
	e := c.w.execution(jobID)
	return e, e != nil
}

// Lookup implements control.Jobs.
func (c controlled) Lookup(ctx context.Context, jobID string) (control.JobState, error) {
	var record lifecycle.Record
	revision, err := c.w.store.Get(ctx, jobID, &record)
	s := control.JobState{Known: revision != 0, State: string(record.State)}
	if err != nil || record.State != lifecycle.StateRunning {
		return s, err
	}
	s.Held, err = c.w.lease.Valid(ctx, record.WorkerID)
	return s, err
}

// NoteCancel implements control.Jobs.
func (c controlled) NoteCancel(ctx context.Context, jobID string) (control.Reply, error) {
	state, err := lifecycle.NoteCancel(ctx, c.w.store, jobID, c.w.now())
	return control.CancelReply(string(state), state.Final()), err
}

// Cancel implements control.Running: it ends the job and waits until it is settled.
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
	if result == "" { // it failed just then and waits for its retry, or is not settled yet
		return e.noteCancel(ctx)
	}
	return control.CancelReply(string(result), true)
}

// noteCancel leaves the request in the record, for the next delivery.
func (e *execution) noteCancel(ctx context.Context) control.Reply {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	reply, err := controlled{e.w}.NoteCancel(ctx, e.id.ID)
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
