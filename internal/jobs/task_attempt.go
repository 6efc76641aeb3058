package jobs

import (
	"context"
	"fmt"
	"math"
	"runtime/debug"
	"sync"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

// saveAfter is how long a session lives before its connection id is written
// down: short ones are over before anybody could look.
const saveAfter = 2 * time.Second

// attempt runs the job against the backend, until its session is closed.
func (t *task) attempt() {
	p := t.begun()
	defer t.attempted(p)
	t.work.report, t.work.err = t.w.o.Runner.Run(t.work.ctx, t.order(p))
}

// begun tells that the session starts.
func (t *task) begun() *progress {
	record := t.working(t.work.cancel)
	t.w.o.Observer.TakenOver(t.work.as)
	t.announce(record)
	return &progress{t: t, ctx: t.work.ctx}
}

// attempted is called when the session is closed. A panic of the attempt becomes
// a failure of this job alone.
func (t *task) attempted(p *progress) {
	if v := recover(); v != nil {
		t.log().Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("fault of the worker in an attempt")
		t.work.err = errors.Newf(errors.CodeInternal, errors.PhaseRuntime, "fault of the worker: %v", v)
	}
	failpoint.Here("session_closed")
	if t.work.ctx.Err() != nil {
		t.work.cause = context.Cause(t.work.ctx)
	}
	p.end()
	t.working(nil)
}

// working makes the work under way known to whoever may want to end it; nil:
// there is none any more.
func (t *task) working(cancel context.CancelCauseFunc) *Record {
	t.mu.Lock()
	record, ending := t.record, t.ending
	t.cancel = cancel
	t.mu.Unlock()
	if ending && cancel != nil { // asked for while the job was taken over
		cancel(errCancelled)
	}
	return record
}

// order is what the Runner is asked to do.
func (t *task) order(p *progress) *Attempt {
	r := t.current()
	return &Attempt{
		Job: t.job, AppID: r.AppID, Region: r.Region,
		Session: r.Session, Number: r.Attempt,
		Checkpoint: r.Checkpoint, LiveSeq: r.LiveSeq, LiveBegun: r.LiveBegun, Recorded: r.Recorded, PreviousSession: t.work.before,
		Progress: p, Control: &t.control,
	}
}

// takenOverAs says why the job had no session. was is its record as it was
// found, from what prior made of it.
func takenOverAs(was, from *Record) string {
	switch {
	case from == nil || from.Session == 0:
		return "new"
	case from.State == StateRetrying:
		return "retry"
	case from.State == StateHeld:
		return "held"
	case from.Crashes > was.Crashes:
		return "crash"
	default: // or its worker, which lives, let go of it
		return "released"
	}
}

// announce tells that a session starts. Nothing waits for it: whoever needs to
// be sure looks at the outcome.
func (t *task) announce(r *Record) {
	_, err := t.w.publisher.PublishAsync(t.event(EventStarted, r, Started{
		JobFields: t.fields(r), MaxAttempts: r.BudgetFrom + r.MaxAttempts,
		Output: t.job.OutputKind(), Checkpoint: r.Checkpoint,
	}))
	if err != nil {
		t.log().Debug().Err(err).Msg("could not tell that the session starts")
	}
}

// progress is what the Runner tells while it runs.
type progress struct {
	t      *task
	ctx    context.Context
	worked bool      // the first frame came
	closed func()    // the session counts no more as one that lives
	opened time.Time // when the backend confirmed the session

	saving sync.Mutex  // held while the record is written down, and guards what follows
	saver  *time.Timer // writes it again and again; nil: not yet, or not any more
}

var _ Progress = (*progress)(nil)

// Connected implements Progress.
func (p *progress) Connected(connectionID, region string) {
	t := p.t
	t.note(func(r *Record) {
		r.ConnectionID = connectionID
		r.ConnectionIDs = newest(append(r.ConnectionIDs, connectionID), maxEventConnections)
		if region != "" {
			r.Region = region
		}
	})
	if p.closed != nil {
		return
	}
	app := t.current().AppID
	p.closed = t.w.fleet.connected(app)
	p.opened = time.Now()
	t.w.o.Observer.SessionOpened(app)
	p.saving.Lock()
	p.saver = time.AfterFunc(min(saveAfter, p.again()), p.save)
	p.saving.Unlock()
	failpoint.Here("connected")
}

// again is the time until the record is written the next time: a session may
// live longer than the bucket remembers.
func (p *progress) again() time.Duration {
	if p.t.w.refresh == 0 {
		return math.MaxInt64
	}
	return p.t.w.refresh
}

// save writes the record as it stands.
func (p *progress) save() {
	p.saving.Lock()
	defer p.saving.Unlock()
	if p.saver == nil {
		return
	}
	defer p.saver.Reset(p.again())
	t := p.t
	ctx, cancel := context.WithTimeout(p.ctx, storeTimeout)
	defer cancel()
	if err := t.change(ctx, func(*Record) {}); err != nil {
		t.log().Debug().Err(err).Msg("could not write the connection id down")
	}
}

// FirstFrame implements Progress.
func (p *progress) FirstFrame() {
	if p.worked {
		return
	}
	p.worked = true
	// The frames wait meanwhile: not for long.
	ctx, cancel := context.WithTimeout(p.ctx, storeTimeout)
	defer cancel()
	if err := p.t.w.circuits.Succeeded(ctx, p.t.current().AppID, p.t.circuitRegion(), p.t.id.ID, p.t.work.pass.Probe); err != nil {
		p.t.log().Warn().Err(err).Msg("could not tell the circuit of a session that works")
		return
	}
	p.t.work.pass.Probe = false
	failpoint.Here("first_frame")
}

// Speaking implements Progress. Only give_up and live speech need to know later
// that an utterance was begun; for all others it would be a write for nothing.
func (p *progress) Speaking(ctx context.Context, utterance int, liveBegun uint64) error {
	if p.t.job.Resume() != OnRedeliveryGiveUp && liveBegun == 0 {
		return nil
	}
	return p.record(ctx, func(r *Record) { r.Speaking, r.LiveBegun = utterance, liveBegun })
}

// Delivered implements Progress.
func (p *progress) Delivered(ctx context.Context, u Utterance) error {
	t := p.t
	failpoint.Here("delivered_frames")
	t.w.o.Observer.Utterance(u)
	t.w.o.Observer.FramesOut(t.job.OutputKind(), u.Frames, u.Bytes)
	keeps := t.job.Resume() != OnRedeliveryRestart
	if t.outcomeFollows() {
		// The outcome, which comes next, says the same.
		t.note(func(r *Record) { r.delivered(u, keeps) })
		return nil
	}
	err := p.record(ctx, func(r *Record) { r.delivered(u, keeps) })
	if err != nil && !errors.Is(err, errSuperseded) {
		// It was spoken all the same: whatever settles the session says so.
		t.note(func(r *Record) { r.delivered(u, keeps) })
	}
	failpoint.Here("checkpoint")
	return err
}

// record writes what the session may not go on without. The lease is extended
// while it waits, so it does not wait without end: the session is closed, and
// the job goes on from what is written in the end.
func (p *progress) record(ctx context.Context, f func(*Record)) error {
	ctx, cancel := context.WithTimeout(ctx, p.t.w.o.SettleTimeout)
	defer cancel()
	err := p.t.change(ctx, f)
	if err != nil {
		p.t.end(errUnrecorded) // unless it ends already, for a reason of its own
	}
	return err
}

// outcomeFollows tells whether the utterance just delivered is the job's last
// and may come twice if the worker dies right now: frames have session numbers
// to tell them apart, but in egress it would be spoken twice.
func (t *task) outcomeFollows() bool {
	if t.job.Resume() == OnRedeliveryGiveUp {
		return false
	}
	switch t.job.OutputKind() {
	case OutputFrames, OutputDiscard:
		return t.job.GetLive() == nil && t.current().Checkpoint+1 == len(t.job.AudioSpecs())
	default:
		return false
	}
}

// end is called when the session is closed.
func (p *progress) end() {
	p.stopSaving()
	if p.closed != nil {
		p.closed()
		r := p.t.current()
		p.t.w.o.Observer.SessionClosed(r.AppID, time.Since(p.opened))
	}
	p.t.control.OnInterrupt(nil)
}

// stopSaving returns when nothing is being written any more.
func (p *progress) stopSaving() {
	p.saving.Lock()
	defer p.saving.Unlock()
	if p.saver != nil {
		p.saver.Stop()
		p.saver = nil
	}
}

// circuitRegion names the circuit by what was asked for, not by the region that
// happened to serve.
func (t *task) circuitRegion() string { return orElse(t.job.GetRegion(), t.w.o.DefaultRegion) }

func (t *task) current() *Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.record
}

// cancelled ends the job for its publisher and waits until that is settled.
func (t *task) cancelled(ctx context.Context) ControlReply {
	t.mu.Lock()
	t.ending = true
	cancel := t.cancel
	t.mu.Unlock()
	if cancel != nil {
		cancel(errCancelled)
	}
	select {
	case <-t.done:
	case <-ctx.Done():
	}
	t.mu.Lock()
	result := t.result
	t.mu.Unlock()
	switch result {
	case StateCancelled:
		return ControlReply{Status: StatusCancelled}
	case "": // it failed just then and waits for its retry, or is not settled yet
		return t.noteCancel(ctx)
	default:
		return ControlReply{Status: StatusFinished, Outcome: result}
	}
}

// noteCancel leaves the wish in the record, for whoever has the job next.
func (t *task) noteCancel(ctx context.Context) ControlReply {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	reply, _, err := noteCancel(ctx, t.w.store, t.id.ID)
	if err != nil {
		return ControlReply{Status: StatusRequested, Message: "not yet written down; ask again to be sure"}
	}
	return reply
}

// interrupted ends the utterance in flight.
func (t *task) interrupted(ctx context.Context) ControlReply {
	interrupt := t.control.handler()
	if interrupt == nil {
		reply := ControlReply{Status: StatusNotRunning, Message: "no utterance is being spoken"}
		if record := t.current(); record != nil { // it is being taken over
			reply.State = record.State
		}
		return reply
	}
	got, err := interrupt(ctx)
	if err != nil {
		return ControlReply{Status: StatusNotRunning, State: StateRunning, Message: err.Error()}
	}
	return ControlReply{Status: StatusInterrupted, ReqID: got.ReqID, LastSeq: got.LastSeq}
}
