// Package control answers the requests that users send to a job: cancel it, or
// interrupt the utterance in flight. It owns the subscriptions, the queues of
// requests and the limits against floods. It must not know how a job is run or
// recorded.
//
// Every worker receives every request. The worker that runs the job answers; for
// a job that no worker runs, one worker of the fleet does. The requester takes
// the first reply, so a second one does no harm.
//
// Any user who may publish to the control subject can send any number of requests
// under any job ID. So a request does not get its own goroutine: two bounded
// pools handle requests, one at a time for each job, and refuse at once what does
// not fit. Requests to jobs that this worker runs have a separate pool, which a
// flood of other IDs does not reach.
package control

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"golang.org/x/time/rate"

	"avatarworker/internal/errors"
)

// Statuses of a reply.
const (
	StatusCancelled   = "cancelled"   // it is: by this request or one before
	StatusRequested   = "requested"   // it will be when it is next delivered
	StatusFinished    = "finished"    // too late: it has an outcome
	StatusInterrupted = "interrupted" // the utterance in flight was
	StatusNotRunning  = "not_running" // nothing to interrupt
	StatusRefused     = "refused"     // nothing was done: the message says why
)

// Operations of a request.
const (
	opCancel    = "cancel"
	opInterrupt = "interrupt"
)

// Request is the body that users send. Other fields are ignored.
type Request struct {
	Op string `json:"op"` // "cancel" or "interrupt"
}

// Reply is the answer to a Request.
type Reply struct {
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Outcome string `json:"outcome,omitempty"`  // with finished
	State   string `json:"state,omitempty"`    // with not_running
	ReqID   string `json:"req_id,omitempty"`   // with interrupted
	LastSeq int64  `json:"last_seq,omitempty"` // with interrupted: the last Avatar-Seq published
	Message string `json:"message,omitempty"`
}

// Jobs gives access to the worker's jobs. Its methods are called concurrently.
type Jobs interface {
	// Own returns the job if this worker holds it. It is called for every request
	// of the fleet and must not block.
	Own(jobID string) (Running, bool)
	// Lookup reads the job's state from its record.
	Lookup(ctx context.Context, jobID string) (JobState, error)
	// NoteCancel records that the job is to be cancelled. It creates the record
	// if there is none.
	NoteCancel(ctx context.Context, jobID string) (Reply, error)
}

// Running is a job that this worker holds. The methods return at the latest when
// ctx ends.
type Running interface {
	Cancel(ctx context.Context) Reply
	Interrupt(ctx context.Context) Reply
}

// JobState is what is known of a job.
type JobState struct {
	Known bool   // it has a record
	State string // of the record
	Held  bool   // the record is in state running, and the lease of its worker is valid
}

// Options configure a Server. A field that is 0 gets its default.
type Options struct {
	NC      *nats.Conn
	Subject string // of the requests; the last token is the job's id
	Jobs    Jobs
	Valid   func(jobID string) bool // reports whether a job may have this ID; nil: any
	Log     zerolog.Logger

	OwnPool   int // requests to own jobs handled at once; 64
	OtherPool int // requests to other jobs handled at once; 16
	Queue     int // requests that wait in each pool; 1024
	JobQueue  int // of which for one job; 16

	// A cancel creates the record of a job that has none, since the job may not
	// have arrived yet. How many records may be created per minute and per day;
	// 1000 and 10000.
	NotesPerMinute, NotesPerDay int

	// A job may end between the checks of two workers, so it is checked again:
	// after Recheck (300 ms), and for the last time after Patience (2 s).
	Recheck, Patience time.Duration
}

const (
	queueGroup = "workers"
	// maxRequest is the maximum size of a request in bytes.
	maxRequest = 4 << 10
	// pendingBytes bounds the received requests that the client buffers for each
	// subscription.
	pendingBytes = 32 << 20
	// requestTimeout bounds the work for one request: ending a session takes a
	// moment.
	requestTimeout = 10 * time.Second
	// drainTimeout bounds the receiving of requests sent before Close.
	drainTimeout = 2 * time.Second
	// maxClaimed bounds the remembered requests that this worker answers as the
	// one that runs the job.
	maxClaimed = 4096
)

// Server answers requests until it is closed.
type Server struct {
	o           Options
	base        context.Context // of all work; does not end with the caller's context
	subs        []*nats.Subscription
	own, others *pool
	minute, day *rate.Limiter // of records made for unknown names

	mu      sync.Mutex
	closed  bool            // Close was called
	stopped bool            // no more rechecks
	claimed map[string]bool // claimed requests, by reply subject
	timers  map[*request]*time.Timer
}

// request is a request to be handled.
type request struct {
	msg     *nats.Msg
	jobID   string
	op      string
	claimed bool      // this worker ran the job when the request arrived: no other answers
	checks  int       // how often the job was found to run on another worker
	since   time.Time // of the first check
}

// Serve subscribes and starts to answer. ctx provides values only; its end is
// ignored.
func Serve(ctx context.Context, o Options) (*Server, error) {
	o.OwnPool, o.OtherPool = cmp.Or(o.OwnPool, 64), cmp.Or(o.OtherPool, 16)
	o.Queue, o.JobQueue = cmp.Or(o.Queue, 1024), cmp.Or(o.JobQueue, 16)
	o.NotesPerMinute, o.NotesPerDay = cmp.Or(o.NotesPerMinute, 1000), cmp.Or(o.NotesPerDay, 10_000)
	o.Recheck, o.Patience = cmp.Or(o.Recheck, 300*time.Millisecond), cmp.Or(o.Patience, 2*time.Second)
	s := &Server{
		o: o, base: context.WithoutCancel(ctx), timers: make(map[*request]*time.Timer),
		minute: rate.NewLimiter(rate.Limit(float64(o.NotesPerMinute)/time.Minute.Seconds()), o.NotesPerMinute),
		day:    rate.NewLimiter(rate.Limit(float64(o.NotesPerDay)/(24*time.Hour).Seconds()), o.NotesPerDay),
	}
	s.own = newPool(o.OwnPool, o.Queue, o.JobQueue, s.handleOwn)
	s.others = newPool(o.OtherPool, o.Queue, o.JobQueue, s.handleOther)
	if err := s.subscribe(); err != nil {
		return nil, errors.Join(err, s.unsubscribe())
	}
	return s, nil
}

func (s *Server) subscribe() error {
	own, err := s.o.NC.Subscribe(s.o.Subject, s.receiveOwn)
	if err != nil {
		return err
	}
	s.subs = append(s.subs, own)
	others, err := s.o.NC.QueueSubscribe(s.o.Subject, queueGroup, s.receiveOther)
	if err != nil {
		return err
	}
	s.subs = append(s.subs, others)
	for _, sub := range s.subs {
		if err := sub.SetPendingLimits(nats.DefaultSubPendingMsgsLimit, pendingBytes); err != nil {
			return err
		}
	}
	return nil
}

// unsubscribe unsubscribes after receiving what was sent before, for at most
// drainTimeout.
func (s *Server) unsubscribe() (err error) {
	limit := time.NewTimer(drainTimeout)
	defer limit.Stop()
	// Drain the queue subscription first: what it has received for own jobs, the
	// other one has received too.
	for _, sub := range slices.Backward(s.subs) {
		ended := make(chan struct{})
		sub.SetClosedHandler(func(string) { close(ended) })
		if drainErr := sub.Drain(); drainErr != nil {
			err = errors.Join(err, drainErr) // the connection is closed, and so is the subscription
			continue
		}
		select {
		case <-ended:
		case <-limit.C:
			err = errors.Join(err, sub.Unsubscribe())
			limit.Reset(0)
		}
	}
	s.subs = nil
	return err
}

// Close ends the subscriptions and waits for the requests in progress, at most 10
// s. It refuses those that have not started.
func (s *Server) Close() {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if !closed {
		s.close()
	}
	s.own.running.Wait()
	s.others.running.Wait()
}

func (s *Server) close() {
	if err := s.unsubscribe(); err != nil {
		s.o.Log.Debug().Err(err).Msg("unsubscribe from the control subject")
	}
	s.mu.Lock()
	s.stopped = true
	for r, timer := range s.timers {
		timer.Stop()
		delete(s.timers, r)
	}
	s.mu.Unlock()
	for _, p := range []*pool{s.own, s.others} {
		for _, r := range p.stop() {
			if p == s.others && s.isClaimed(r.msg.Reply) {
				continue // the other pool holds it too
			}
			s.reply(r, refused("this worker is stopping: ask again"))
		}
	}
}

// parseRequest parses a message. The operation is "" if the message contains no
// known one.
func parseRequest(msg *nats.Msg) *request {
	r := &request{msg: msg, jobID: lastToken(msg.Subject)}
	var body Request
	if len(msg.Data) > maxRequest || json.Unmarshal(msg.Data, &body) != nil {
		return r
	}
	if body.Op == opCancel || body.Op == opInterrupt {
		r.op = body.Op
	}
	return r
}

// receiveOwn receives the requests to jobs that this worker runs. It must not
// block.
func (s *Server) receiveOwn(msg *nats.Msg) {
	jobID := lastToken(msg.Subject)
	if _, own := s.o.Jobs.Own(jobID); !own {
		return
	}
	r := parseRequest(msg)
	if r.op == "" {
		return // one worker of the fleet refuses it
	}
	s.claim(msg.Reply)
	if !s.own.add(r) {
		s.reply(r, busy())
	}
}

// receiveOther receives this worker's share of all requests. It must not block.
func (s *Server) receiveOther(msg *nats.Msg) {
	r := parseRequest(msg)
	switch {
	case r.op == "":
		s.reply(r, refused(`want {"op":"cancel"} or {"op":"interrupt"}`))
	case s.o.Valid != nil && !s.o.Valid(r.jobID):
		s.reply(r, refused("no job has such an id: want 1 to 64 of A-Z a-z 0-9 _ -"))
	default:
		s.queueOther(r)
	}
}

// queueOther adds a request to the pool for other jobs. If that is full, a
// request to an own job is left to the other pool.
func (s *Server) queueOther(r *request) {
	if s.others.add(r) || s.isClaimed(r.msg.Reply) {
		return
	}
	if _, own := s.o.Jobs.Own(r.jobID); !own {
		s.reply(r, busy())
	}
}

// handleOwn answers for a job that this worker ran when the request arrived.
func (s *Server) handleOwn(r *request) {
	ctx, cancel := context.WithTimeout(s.base, requestTimeout)
	defer cancel()
	job, own := s.o.Jobs.Own(r.jobID)
	switch {
	case own && r.op == opCancel:
		s.reply(r, job.Cancel(ctx))
	case own:
		s.reply(r, job.Interrupt(ctx))
	default:
		r.claimed = true // it has ended meanwhile
		s.answer(ctx, r)
	}
}

// handleOther answers for a job that no worker runs.
func (s *Server) handleOther(r *request) {
	ctx, cancel := context.WithTimeout(s.base, requestTimeout)
	defer cancel()
	if !r.claimed && s.isClaimed(r.msg.Reply) {
		return
	}
	if _, own := s.o.Jobs.Own(r.jobID); own {
		s.recheckLater(r)
		return
	}
	s.answer(ctx, r)
}

// answer answers from the job's record.
func (s *Server) answer(ctx context.Context, r *request) {
	state, err := s.o.Jobs.Lookup(ctx, r.jobID)
	switch {
	case err != nil:
		s.o.Log.Debug().Err(err).Str("job_id", r.jobID).Msg("read the record of a job that a control request is for")
		s.reply(r, refused("the job's record could not be read: ask again"))
	case state.Held && s.recheckLater(r):
	case r.op == opCancel:
		s.recordCancel(ctx, r, state)
	case state.Held:
		// Only the worker that runs the job can interrupt it.
	default:
		s.reply(r, Reply{Status: StatusNotRunning, State: state.State, Message: "no session of this job is open"})
	}
}

// recordCancel records that the job is to be cancelled. A worker that runs the
// job and has not answered finds that in the record.
func (s *Server) recordCancel(ctx context.Context, r *request, state JobState) {
	if !state.Known && !s.allowRecord() {
		s.reply(r, refused("no job of this id is known, and too many such ids were cancelled: ask again when the job was delivered, or in some minutes"))
		return
	}
	reply, err := s.o.Jobs.NoteCancel(ctx, r.jobID)
	if err != nil {
		s.o.Log.Debug().Err(err).Str("job_id", r.jobID).Msg("note a cancel")
		reply = refused("the cancel could not be written down: ask again")
	}
	s.reply(r, reply)
}

// allowRecord reports whether a record may be created for an unknown job, and
// counts it.
func (s *Server) allowRecord() bool { return s.minute.Allow() && s.day.Allow() }

// recheckLater schedules another check of a job that a worker runs. It returns
// false if the job was checked often enough. Nothing blocks meanwhile.
func (s *Server) recheckLater(r *request) bool {
	var wait time.Duration
	switch r.checks {
	case 0:
		r.since, wait = time.Now(), s.o.Recheck
	case 1:
		wait = max(s.o.Patience-time.Since(r.since), 0)
	default:
		return false
	}
	r.checks++
	s.mu.Lock()
	defer s.mu.Unlock()
	// Beyond the bound, rely on the worker that runs the job.
	if s.stopped || len(s.timers) >= s.o.Queue {
		return true
	}
	s.timers[r] = time.AfterFunc(wait, func() {
		s.mu.Lock()
		_, wanted := s.timers[r]
		delete(s.timers, r)
		s.mu.Unlock()
		if wanted {
			s.others.add(r)
		}
	})
	return true
}

// claim records that this worker answers a request as the one that runs the job.
// A request without a reply subject can't be identified and may be handled twice;
// its cancel is then recorded twice.
func (s *Server) claim(reply string) {
	if reply == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claimed == nil || len(s.claimed) >= maxClaimed {
		s.claimed = make(map[string]bool)
	}
	s.claimed[reply] = true
}

func (s *Server) isClaimed(reply string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.claimed[reply]
}

func (s *Server) reply(r *request, reply Reply) {
	if r.msg.Reply == "" {
		return
	}
	reply.JobID = r.jobID
	data, err := json.Marshal(reply)
	if err == nil {
		err = r.msg.Respond(data)
	}
	if err != nil {
		s.o.Log.Debug().Err(err).Str("job_id", r.jobID).Msg("answer a control request")
	}
}

func busy() Reply { return refused("busy: ask again") }

func refused(message string) Reply { return Reply{Status: StatusRefused, Message: message} }
