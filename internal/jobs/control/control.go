// Package control answers the requests that users send to a job: cancel it, or
// interrupt the utterance in flight.
//
// Every worker receives every request. The worker that runs the job answers it;
// for a job that no worker runs one worker of the fleet does. A request takes the
// first reply, so a second one does no harm.
//
// Whoever may publish to the control subject may send any number of requests
// under any names. So a request costs no goroutine of its own: two bounded pools
// handle them, one request at a time for each job, and what they have no room for
// is refused at once. Requests to the jobs that this worker runs have a pool of
// their own, which a flood of other names does not reach.
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

// Request is what users send. Other fields are ignored.
type Request struct {
	Op string `json:"op"` // "cancel" or "interrupt"
}

// Reply answers it.
type Reply struct {
	JobID   string `json:"job_id"`
	Status  string `json:"status"`
	Outcome string `json:"outcome,omitempty"`  // with finished
	State   string `json:"state,omitempty"`    // with not_running
	ReqID   string `json:"req_id,omitempty"`   // with interrupted
	LastSeq int64  `json:"last_seq,omitempty"` // with interrupted: the last Avatar-Seq published
	Message string `json:"message,omitempty"`
}

// Jobs is what the worker knows of jobs. Its methods are called by many
// goroutines at once.
type Jobs interface {
	// Own returns the job if this worker has it in hand. It is called for every
	// request of the fleet and must not block.
	Own(jobID string) (Running, bool)
	// Look reads how the job stands.
	Look(ctx context.Context, jobID string) (Standing, error)
	// NoteCancel writes into the job's record that it is to end; it makes the
	// record if there is none.
	NoteCancel(ctx context.Context, jobID string) (Reply, error)
}

// Running is a job that this worker has in hand. The methods return when ctx
// ends at the latest.
type Running interface {
	Cancel(ctx context.Context) Reply
	Interrupt(ctx context.Context) Reply
}

// Standing says how a job stands.
type Standing struct {
	Known bool   // it has a record
	State string // of the record
	Held  bool   // the record is in state running, and the lease of its worker stands
}

// Options configure a Server. Those that are 0 have defaults.
type Options struct {
	NC      *nats.Conn
	Subject string // of the requests; the last token is the job's id
	Jobs    Jobs
	Valid   func(jobID string) bool // reports whether a job may have this id; nil: any
	Log     zerolog.Logger

	OwnPool   int // requests to own jobs handled at once; 64
	OtherPool int // requests to other jobs handled at once; 16
	Queue     int // requests that wait in each pool; 1024
	JobQueue  int // of which for one job; 16

	// A cancel of a name without a record makes one, since the job may still be
	// on its way. How many in a minute and in a day; 1000 and 10000.
	NotesPerMinute, NotesPerDay int

	// A job may end between the look of its worker and that of another, so it is
	// looked at again: after Recheck (300 ms), and for the last time after
	// Patience (2 s).
	Recheck, Patience time.Duration
}

const (
	queueGroup = "workers"
	// maxRequest is the size of the largest request in bytes.
	maxRequest = 4 << 10
	// pendingBytes bounds what the client keeps of requests that it has received
	// for each subscription.
	pendingBytes = 32 << 20
	// requestTime bounds the work for one request: ending a session takes a
	// moment.
	requestTime = 10 * time.Second
	// drainTime bounds the receiving of what was sent before Close.
	drainTime = 2 * time.Second
	// maxTaken bounds what is remembered of requests that this worker answers as
	// the one that runs the job.
	maxTaken = 4096
)

// Server answers requests until it is closed.
type Server struct {
	o           Options
	base        context.Context // of all work; it does not end with the caller's
	subs        []*nats.Subscription
	own, others *pool
	minute, day *rate.Limiter // of records made for unknown names

	mu      sync.Mutex
	closed  bool            // Close was called
	stopped bool            // nothing is looked at later any more
	taken   map[string]bool // requests to own jobs, by reply subject
	timers  map[*request]*time.Timer
}

// request is one to be handled.
type request struct {
	msg    *nats.Msg
	jobID  string
	op     string
	mine   bool      // this worker ran the job when it came: no other answers
	looked int       // how often the job was found to be another worker's
	since  time.Time // of the first look
}

// Serve subscribes and begins to answer. ctx gives values, not an end.
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

// unsubscribe receives what was sent before the server knew of it, for drainTime
// at most.
func (s *Server) unsubscribe() (err error) {
	limit := time.NewTimer(drainTime)
	defer limit.Stop()
	// The one with a share of all requests first: what it has received of own
	// jobs, the other has received too.
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

// Close ends the subscriptions and waits for the requests in hand, 10 s at most.
// Those that have not begun are refused.
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
			if p == s.others && s.isTaken(r.msg.Reply) {
				continue // the other pool has it too
			}
			s.reply(r, refused("this worker is stopping: ask again"))
		}
	}
}

// read makes a request of a message. It returns "" as the operation where the
// message asks for nothing that there is.
func read(msg *nats.Msg) *request {
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

// receiveOwn takes the requests to jobs that this worker runs. It must not wait.
func (s *Server) receiveOwn(msg *nats.Msg) {
	jobID := lastToken(msg.Subject)
	if _, own := s.o.Jobs.Own(jobID); !own {
		return
	}
	r := read(msg)
	if r.op == "" {
		return // one worker of the fleet refuses it
	}
	s.take(msg.Reply)
	if !s.own.add(r) {
		s.reply(r, busy())
	}
}

// receiveOther takes this worker's share of all requests. It must not wait.
func (s *Server) receiveOther(msg *nats.Msg) {
	r := read(msg)
	switch {
	case r.op == "":
		s.reply(r, refused(`want {"op":"cancel"} or {"op":"interrupt"}`))
	case s.o.Valid != nil && !s.o.Valid(r.jobID):
		s.reply(r, refused("no job has such an id: want 1 to 64 of A-Z a-z 0-9 _ -"))
	default:
		s.queueOther(r)
	}
}

// queueOther hands a request to the pool. Where it has no room, a request to an
// own job is left to the pool of those.
func (s *Server) queueOther(r *request) {
	if s.others.add(r) || s.isTaken(r.msg.Reply) {
		return
	}
	if _, own := s.o.Jobs.Own(r.jobID); !own {
		s.reply(r, busy())
	}
}

// handleOwn answers for a job that this worker ran when the request came.
func (s *Server) handleOwn(r *request) {
	ctx, cancel := context.WithTimeout(s.base, requestTime)
	defer cancel()
	job, own := s.o.Jobs.Own(r.jobID)
	switch {
	case own && r.op == opCancel:
		s.reply(r, job.Cancel(ctx))
	case own:
		s.reply(r, job.Interrupt(ctx))
	default:
		r.mine = true // it has ended since
		s.answer(ctx, r)
	}
}

// handleOther answers for a job that no worker runs.
func (s *Server) handleOther(r *request) {
	ctx, cancel := context.WithTimeout(s.base, requestTime)
	defer cancel()
	if !r.mine && s.isTaken(r.msg.Reply) {
		return
	}
	if _, own := s.o.Jobs.Own(r.jobID); own {
		s.lookLater(r)
		return
	}
	s.answer(ctx, r)
}

// answer answers by the job's record.
func (s *Server) answer(ctx context.Context, r *request) {
	standing, err := s.o.Jobs.Look(ctx, r.jobID)
	switch {
	case err != nil:
		s.o.Log.Debug().Err(err).Str("job_id", r.jobID).Msg("read the record of a job that a control request is for")
		s.reply(r, refused("the job's record could not be read: ask again"))
	case standing.Held && s.lookLater(r):
	case r.op == opCancel:
		s.note(ctx, r, standing)
	case standing.Held:
		// Only the worker that runs the job can interrupt it.
	default:
		s.reply(r, Reply{Status: StatusNotRunning, State: standing.State, Message: "no session of this job is open"})
	}
}

// note writes down that the job is to end. Where a worker has the job and has not
// answered, it finds that in the record.
func (s *Server) note(ctx context.Context, r *request, standing Standing) {
	if !standing.Known && !s.mayMakeRecord() {
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

// mayMakeRecord counts a record made for a name that has none.
func (s *Server) mayMakeRecord() bool { return s.minute.Allow() && s.day.Allow() }

// lookLater has a job that a worker runs looked at again, and returns false if
// that was done often enough. Nothing waits for it meanwhile.
func (s *Server) lookLater(r *request) bool {
	var wait time.Duration
	switch r.looked {
	case 0:
		r.since, wait = time.Now(), s.o.Recheck
	case 1:
		wait = max(s.o.Patience-time.Since(r.since), 0)
	default:
		return false
	}
	r.looked++
	s.mu.Lock()
	defer s.mu.Unlock()
	// Beyond the bound the worker that runs the job is relied on.
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

// take notes that this worker answers a request as the one that runs the job. A
// request without a reply subject has nothing to be
// known by, and may be handled twice: its wish is then noted twice.
func (s *Server) take(reply string) {
	if reply == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken == nil || len(s.taken) >= maxTaken {
		s.taken = make(map[string]bool)
	}
	s.taken[reply] = true
}

func (s *Server) isTaken(reply string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken[reply]
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
