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
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// saveAfter is how long a session is open before the record says that the backend
// confirmed it. Shorter sessions have ended by then. If the worker dies before, the
// ledger counts from the session's start.
const saveAfter = 100 * time.Millisecond

// run runs the job against the backend, until its session is closed.
func (e *execution) run() {
	p := e.announceStart()
	defer e.closed(p)
	e.session.report, e.session.err = e.w.o.Runner.Run(e.session.ctx, e.attempt(p))
}

// announceStart says that the session starts.
func (e *execution) announceStart() *progress {
	record := e.setCancel(e.session.cancel)
	e.w.o.Observer.TakenOver(e.session.startedAs)
	if record.Session == 1 && !record.PublishedAt.IsZero() {
		e.w.o.Observer.FirstStarted(e.id.Queue, record.StartedAt.Sub(record.PublishedAt))
	}
	e.publishStarted(record)
	e.w.o.Storage.Started(e.job)
	e.storeLost(record)
	return &progress{e: e, ctx: e.session.ctx}
}

// storeLost writes what the sessions before this one used that were lost with their
// workers.
func (e *execution) storeLost(r *lifecycle.Record) {
	if !e.w.ledger.Owed(r) {
		return
	}
	update := e.record.UpdateLocal
	e.w.background.Go(func() {
		ctx, cancel := context.WithTimeout(e.w.base, e.w.o.SettleTimeout)
		defer cancel()
		if err := e.w.ledger.StoreLost(ctx, r, update); err != nil {
			e.log().Debug().Err(err).Msg("could not write the usage of a session that was lost yet")
		}
	})
}

// recordClosed sets in next, which is written later, that the session is closed.
func (e *execution) recordClosed(next *lifecycle.Record) {
	next.Closed(e.session.report.Connected, e.w.ledger.Code(e.session.err, e.session.cause))
}

// closed is called when the session is closed. A panic of the attempt becomes a
// failure of this job alone.
func (e *execution) closed(p *progress) {
	if v := recover(); v != nil {
		e.log().Error().Str("panic", fmt.Sprint(v)).Bytes("stack", debug.Stack()).Msg("panic in the worker during a session")
		e.session.err = errors.Newf(errors.CodeInternal, errors.PhaseRuntime, "fault of the worker: %v", v)
		if p.closed != nil { // the Runner's report is lost
			e.session.report.Connected = time.Since(p.opened)
		}
	}
	e.w.o.Storage.Ended(e.job, e.session.err)
	failpoint.Here("session_closed")
	if e.session.ctx.Err() != nil {
		e.session.cause = context.Cause(e.session.ctx)
	}
	p.end()
	e.setCancel(nil)
}

// setCancel makes the session under way known to those that may want to end it;
// nil: there is none any more.
func (e *execution) setCancel(cancel context.CancelCauseFunc) *lifecycle.Record {
	e.mu.Lock()
	ending := e.ending
	e.cancel = cancel
	e.mu.Unlock()
	if ending && cancel != nil { // asked for while the job was taken over
		cancel(errCancelled)
	}
	return e.record.Current()
}

// attempt is what the Runner is asked to do.
func (e *execution) attempt(p *progress) *Attempt {
	r := e.record.Current()
	return &Attempt{
		Job: e.job, AppID: r.AppID, Region: r.Region,
		Session: r.Session, Number: r.Attempt,
		Checkpoint: r.Checkpoint, LiveSeq: r.LiveSeq, LiveBegun: r.LiveBegun, Recorded: r.Recorded, PreviousSession: e.session.previousSession,
		Progress: p, Control: &e.control,
	}
}

// publishStarted publishes that a session starts. Nothing waits for it: the outcome is
// what counts.
func (e *execution) publishStarted(r *lifecycle.Record) {
	events := e.events()
	err := e.w.publisher.Send(events.Event(event.TypeStarted, r, event.Started{
		JobFields: events.Fields(r), MaxAttempts: r.BudgetFrom + r.MaxAttempts,
		Output: e.job.OutputKind(), Checkpoint: r.Checkpoint, Crashes: r.AllCrashes(),
	}))
	if err != nil {
		e.log().Debug().Err(err).Msg("could not publish that the session starts")
	}
}

// progress is what the Runner reports while it runs.
type progress struct {
	e      *execution
	ctx    context.Context
	worked bool      // the first frame came
	closed func()    // marks the session as closed in the presence
	opened time.Time // when the backend confirmed the session

	saving sync.Mutex  // held while the record is written down, and guards what follows
	saver  *time.Timer // writes it again and again; nil: not yet, or not any more
}

var _ Progress = (*progress)(nil)

// Connected implements Progress.
func (p *progress) Connected(connectionID, region string) {
	e := p.e
	e.record.UpdateLocal(func(r *lifecycle.Record) {
		r.Connected(connectionID, region, e.w.now())
	})
	if p.closed != nil {
		return
	}
	app := e.record.Current().AppID
	p.closed = e.w.fleet.Connected(app)
	p.opened = time.Now()
	e.w.o.Observer.SessionOpened(app)
	p.saving.Lock()
	p.saver = time.AfterFunc(min(saveAfter, p.again()), p.save)
	p.saving.Unlock()
	failpoint.Here("connected")
}

// again is the time until the record is written the next time: a session may be open
// for longer than the bucket keeps a record.
func (p *progress) again() time.Duration {
	if p.e.w.refresh == 0 {
		return math.MaxInt64
	}
	return p.e.w.refresh
}

// save writes the record as it is.
func (p *progress) save() {
	p.saving.Lock()
	defer p.saving.Unlock()
	if p.saver == nil {
		return
	}
	defer p.saver.Reset(p.again())
	e := p.e
	ctx, cancel := context.WithTimeout(p.ctx, storeTimeout)
	defer cancel()
	err := e.record.Change(ctx, func(*lifecycle.Record) {})
	if errors.Is(err, lifecycle.ErrSuperseded) {
		e.end(lifecycle.ErrSuperseded)
	}
	if err != nil {
		e.log().Debug().Err(err).Msg("could not write the connection id")
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
	if err := p.e.session.permit.Success(ctx); err != nil {
		p.e.log().Warn().Err(err).Msg("could not report a working session to the circuit")
		return
	}
	failpoint.Here("first_frame")
}

// Speaking implements Progress. Only give_up and live speech need to know later
// that an utterance was begun; for all others it would be a write for nothing.
func (p *progress) Speaking(ctx context.Context, utterance int, liveBegun uint64) error {
	if p.e.job.RedeliveryPolicy() != jobspec.OnRedeliveryGiveUp && liveBegun == 0 {
		return nil
	}
	return p.record(ctx, func(r *lifecycle.Record) { r.Speak(utterance, liveBegun) })
}

// Delivered implements Progress.
func (p *progress) Delivered(ctx context.Context, u event.Utterance) error {
	e := p.e
	failpoint.Here("delivered_frames")
	e.w.o.Observer.Utterance(u)
	e.w.o.Observer.FramesOut(e.job.OutputKind(), u.Frames, u.Bytes)
	keeps := e.job.RedeliveryPolicy() != jobspec.OnRedeliveryRestart
	if e.outcomeFollows() {
		// The outcome, which comes next, says the same.
		e.record.UpdateLocal(func(r *lifecycle.Record) { r.Delivered(u, keeps) })
		return nil
	}
	err := p.record(ctx, func(r *lifecycle.Record) { r.Delivered(u, keeps) })
	if err != nil && !errors.Is(err, lifecycle.ErrSuperseded) {
		// It was spoken all the same: whatever settles the session says so.
		e.record.UpdateLocal(func(r *lifecycle.Record) { r.Delivered(u, keeps) })
	}
	failpoint.Here("checkpoint")
	return err
}

// record writes a change that must be stored before the session continues. If it
// can't be written in time the session is closed, and the job continues from what is
// stored then.
func (p *progress) record(ctx context.Context, f func(*lifecycle.Record)) error {
	ctx, cancel := context.WithTimeout(ctx, p.e.w.o.SettleTimeout)
	defer cancel()
	err := p.e.record.Change(ctx, f)
	switch {
	case errors.Is(err, lifecycle.ErrSuperseded):
		p.e.end(lifecycle.ErrSuperseded)
	case err != nil:
		p.e.end(errUnrecorded) // unless it is ending already, for another reason
	}
	return err
}

// outcomeFollows reports whether the utterance just delivered is the job's last
// and may come twice if the worker dies right now: frames have session numbers
// to tell them apart, but in egress it would be spoken twice.
func (e *execution) outcomeFollows() bool {
	if e.job.RedeliveryPolicy() == jobspec.OnRedeliveryGiveUp {
		return false
	}
	switch e.job.OutputKind() {
	case jobspec.OutputFrames, jobspec.OutputDiscard:
		return e.job.GetLive() == nil && e.record.Current().Checkpoint+1 == len(e.job.AudioSpecs())
	default:
		return false
	}
}

// end is called when the session is closed.
func (p *progress) end() {
	p.stopSaving()
	if p.closed != nil {
		p.closed()
		r := p.e.record.Current()
		p.e.w.o.Observer.SessionClosed(r.AppID, time.Since(p.opened))
	}
	p.e.control.OnInterrupt(nil)
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
