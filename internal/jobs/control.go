package jobs

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
)

// Answers of the control subject.
const (
	StatusCancelled   = "cancelled"   // it is: by this request or one before
	StatusRequested   = "requested"   // it will be when it is next delivered
	StatusFinished    = "finished"    // too late: it has an outcome
	StatusInterrupted = "interrupted" // the utterance in flight was
	StatusNotRunning  = "not_running" // nothing to interrupt
	StatusRefused     = "refused"     // the request is not one
)

// ControlRequest is what users publish to avatar.control.<job_id>.
type ControlRequest struct {
	Op string `json:"op"` // "cancel" or "interrupt"
}

// ControlReply answers it.
type ControlReply struct {
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Outcome State  `json:"outcome,omitempty"`  // with finished
	State   State  `json:"state,omitempty"`    // with not_running
	ReqID   string `json:"req_id,omitempty"`   // with interrupted
	LastSeq int64  `json:"last_seq,omitempty"` // with interrupted: the last Avatar-Seq published
	Message string `json:"message,omitempty"`
}

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

// controlTimeout bounds the work for one request.
const controlTimeout = 10 * time.Second

// RequestCancel asks for the end of a job, running or not: it notes the wish in
// the job's record (made if there is none) and nudges the worker that has it.
func RequestCancel(ctx context.Context, nc *nats.Conn, store *kv.Store, controlSubject, jobID string) (ControlReply, error) {
	reply, running, err := noteCancel(ctx, store, jobID)
	if err != nil || !running {
		return reply, err
	}
	return nudge(ctx, nc, controlSubject, reply), nil
}

// noteCancel sets cancel_requested, and tells whether a worker is said to run
// the job.
func noteCancel(ctx context.Context, store *kv.Store, jobID string) (_ ControlReply, running bool, err error) {
	for {
		record := &Record{JobID: jobID, Run: 1, State: StateReleased, CreatedAt: time.Now().UTC()}
		revision, err := store.Get(ctx, jobID, record)
		if err != nil {
			return ControlReply{}, false, err
		}
		if record.State == StateCancelled {
			// Also the answer of whoever looks a moment after the worker that
			// has the job ended it.
			return ControlReply{JobID: jobID, Status: StatusCancelled}, false, nil
		}
		if record.State.Final() {
			return ControlReply{JobID: jobID, Status: StatusFinished, Outcome: record.Outcome}, false, nil
		}
		reply := ControlReply{JobID: jobID, Status: StatusRequested}
		if record.CancelRequested {
			return reply, record.State == StateRunning, nil
		}
		record.CancelRequested = true
		record.UpdatedAt = time.Now().UTC()
		if _, err = store.Put(ctx, jobID, record, revision); err == nil {
			return reply, record.State == StateRunning, nil
		}
		if !errors.Is(err, kv.ErrConflict) {
			return ControlReply{}, false, err
		}
	}
}

// nudge tells the worker that runs the job. One that does not answer finds the
// wish in the record.
func nudge(ctx context.Context, nc *nats.Conn, subject string, otherwise ControlReply) ControlReply {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	msg, err := nc.RequestWithContext(ctx, subject, []byte(`{"op":"cancel"}`))
	if err != nil {
		return otherwise
	}
	var reply ControlReply
	if json.Unmarshal(msg.Data, &reply) != nil || reply.Status == "" {
		return otherwise
	}
	return reply
}

// controls serves the control subject: the worker that runs a job answers for
// it; for a job that nobody runs one worker of the fleet does.
type controls struct {
	w    *Worker
	subs []*nats.Subscription
	wg   sync.WaitGroup

	open context.Context // ends with close
	shut context.CancelFunc

	mu     sync.Mutex
	closed bool
	taken  map[string]bool // requests that forOwn took, by reply subject
}

// maxTaken bounds what is remembered of requests that another worker's
// forOthers looks after.
const maxTaken = 1024

func (w *Worker) serveControl(ctx context.Context) (*controls, error) {
	c := &controls{w: w}
	c.open, c.shut = context.WithCancel(context.WithoutCancel(ctx))
	subject := w.o.Names.AllControl()
	own, err := w.o.NC.Subscribe(subject, func(m *nats.Msg) { c.serve(ctx, m, c.forOwn) })
	if err != nil {
		return nil, err
	}
	c.subs = append(c.subs, own)
	others, err := w.o.NC.QueueSubscribe(subject, "workers", func(m *nats.Msg) { c.serve(ctx, m, c.forOthers) })
	if err != nil {
		return nil, errors.Join(err, own.Unsubscribe())
	}
	c.subs = append(c.subs, others)
	return c, nil
}

func (c *controls) close() {
	for _, sub := range c.subs {
		if err := sub.Unsubscribe(); err != nil {
			c.w.log.Debug().Err(err).Msg("unsubscribe from the control subject")
		}
	}
	c.mu.Lock()
	c.closed = true // a request may still be on its way to serve
	c.mu.Unlock()
	c.shut()
	c.wg.Wait()
}

// serve answers in a goroutine of its own: ending a session takes a moment.
func (c *controls) serve(ctx context.Context, msg *nats.Msg, answer func(ctx context.Context, op, jobID, reply string) (ControlReply, bool)) {
	jobID := lastToken(msg.Subject)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), controlTimeout)
		defer cancel()
		var request ControlRequest
		if err := json.Unmarshal(msg.Data, &request); err != nil {
			request.Op = ""
		}
		reply, mine := answer(ctx, request.Op, jobID, msg.Reply)
		if !mine || msg.Reply == "" {
			return
		}
		reply.JobID = jobID
		data, err := json.Marshal(reply)
		if err == nil {
			err = msg.Respond(data)
		}
		if err != nil {
			c.w.log.Debug().Err(err).Str("job_id", jobID).Msg("could not answer a control request")
		}
	})
}

// forOwn answers for the jobs that this worker runs.
func (c *controls) forOwn(ctx context.Context, op, jobID, reply string) (ControlReply, bool) {
	t := c.w.execution(jobID)
	if t == nil {
		return ControlReply{}, false
	}
	c.take(reply)
	switch op {
	case "cancel":
		return t.cancelled(ctx), true
	case "interrupt":
		return t.interrupted(ctx), true
	default:
		return refused(), true
	}
}

// controlRecheck is when forOthers looks again whether a job is still run.
const controlRecheck = 300 * time.Millisecond

// forOthers answers for the jobs that nobody runs. While somebody runs the job
// he answers; but it may have ended between our look and his, and then nobody
// would, so the look is repeated. An answer too many is not heard: a request
// takes the first.
func (c *controls) forOthers(ctx context.Context, op, jobID, reply string) (ControlReply, bool) {
	var record Record
	for {
		held, err := c.held(ctx, jobID, &record)
		if err != nil {
			return ControlReply{}, false
		}
		if c.wasTaken(reply) {
			return ControlReply{}, false
		}
		if !held {
			break
		}
		if retry.Pause(c.open, controlRecheck, nil) != nil || ctx.Err() != nil {
			return ControlReply{}, false
		}
	}
	switch op {
	case "cancel":
		noted, _, err := noteCancel(ctx, c.w.store, jobID)
		return noted, err == nil
	case "interrupt":
		return ControlReply{Status: StatusNotRunning, State: record.State, Message: "no session of this job is open"}, true
	default:
		return refused(), true
	}
}

// take notes that forOwn answers a request. One that wants no reply has nothing
// to be known by, and may be looked after twice: its wish is noted twice.
func (c *controls) take(reply string) {
	if reply == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.taken == nil || len(c.taken) >= maxTaken {
		c.taken = make(map[string]bool)
	}
	c.taken[reply] = true
}

func (c *controls) wasTaken(reply string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken[reply]
}

// held tells whether a worker runs the job, and reads its record if that is not
// this one.
func (c *controls) held(ctx context.Context, jobID string, record *Record) (bool, error) {
	if c.w.execution(jobID) != nil {
		return true, nil
	}
	*record = Record{}
	revision, err := c.w.store.Get(ctx, jobID, record)
	if err != nil || revision == 0 || record.State != StateRunning {
		return false, err
	}
	return c.w.lease.Stands(ctx, record.WorkerID)
}

func refused() ControlReply {
	return ControlReply{Status: StatusRefused, Message: `want {"op":"cancel"} or {"op":"interrupt"}`}
}
