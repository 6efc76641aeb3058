package attempt

import (
	"context"
	"strconv"
	"sync/atomic"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
	"avatarworker/internal/session"
)

// run delivers a job's utterances in one session.
type run struct {
	r      *Runner
	a      *jobs.Attempt
	ctx    context.Context // ends when backend.max_session is over
	cancel context.CancelFunc

	sink    output.Sink
	source  source           // nil: not open
	session *session.Session // nil: none was opened, or none was needed
	egress  bool

	// The utterance in flight.
	utterance *utterance
	number    int // in the job, from 1
	call      session.Call
	begun     *begun // of live speech; nil: there is nothing to record

	interrupted atomic.Pointer[delivery] // the last that was interrupted; nil: none was

	spoken          int // utterances of this session
	workingReported bool
	frames          int
	bytes           int64
}

// delivery is the result of delivering one utterance.
type delivery struct {
	utterance int           // its number
	done      chan struct{} // closed when the delivery has ended
	err       error         // read after done
}

// open prepares the speech and the output, then opens the session. It opens none
// if every utterance has been delivered.
func (p *run) open() error {
	if err := p.r.catchUp(p.ctx, p.a); err != nil {
		return err
	}
	src, err := p.r.source(p.ctx, p.a)
	if err != nil {
		return err
	}
	p.source = src
	if src.done() {
		return nil
	}
	if err := p.sink.Open(p.ctx); err != nil {
		return err
	}
	if p.session, err = p.r.o.Sessions.Open(p.ctx, p.r.params(p.a, src)); err != nil {
		return err
	}
	p.a.Progress.Connected(p.session.ConnectionID(), p.session.Region())
	p.a.Control.OnInterrupt(p.interrupt)
	return nil
}

// loop plays each utterance. The job waits here for the backend, as long as the
// session lasts, so the stack is kept small: start and deliver have returned.
func (p *run) loop() error {
	for {
		done, err := p.start()
		if done == nil || err != nil {
			return err
		}
		<-done
		if err := p.deliver(); err != nil {
			return err
		}
	}
}

// start begins the next utterance. It returns nil if there is none.
func (p *run) start() (done <-chan struct{}, err error) {
	if p.session == nil {
		return nil, nil //nolint:nilnil // nil means that every utterance was delivered
	}
	p.utterance, err = p.source.next(p.ctx)
	if err != nil || p.utterance == nil {
		return nil, err
	}
	p.number = p.a.Checkpoint + p.spoken + 1
	defer p.dropSpeech()
	if err := p.begin(); err != nil {
		return nil, err
	}
	number, begun := p.number, p.begun
	p.call = p.session.Start(p.ctx, session.Utterance{
		Speech:      p.utterance.speech,
		OnFrame:     func(f session.Frame) error { return p.frame(number, begun, f) },
		OnInterrupt: func() { p.interrupted.Store(&delivery{utterance: number, done: make(chan struct{})}) },
	})
	return p.call.Done(), nil
}

// dropSpeech releases the speech before the wait for the backend, which may be
// long.
func (p *run) dropSpeech() {
	p.utterance.release()
	p.utterance.speech, p.utterance.release = nil, nil
}

// deliver waits for the utterance's end, finishes its output and moves the
// checkpoint.
func (p *run) deliver() (err error) {
	defer func() {
		if d := p.interrupted.Load(); d != nil && d.utterance == p.number {
			d.err = err
			close(d.done)
		}
	}()
	spoken, err := p.call.Wait()
	if storeErr := p.begun.wait(); err == nil {
		err = storeErr
	}
	p.frames += spoken.Frames
	p.bytes += spoken.Bytes
	if err != nil {
		return err
	}
	if p.egress && !spoken.Interrupted {
		p.reportWorking()
	}
	if err := p.sink.Finish(p.ctx, p.number); err != nil {
		return err
	}
	p.spoken++
	if spoken.Interrupted && p.utterance.interrupted != nil {
		if err := p.utterance.interrupted(p.ctx); err != nil {
			return err
		}
	}
	recorded, err := p.recorded()
	if err != nil {
		return err
	}
	return p.a.Progress.Delivered(p.ctx, event.Utterance{
		ReqID: spoken.ReqID, Frames: spoken.Frames, Bytes: spoken.Bytes,
		AudioMS: spoken.Audio.Milliseconds(), FirstFrameMS: spoken.FirstFrame.Milliseconds(),
		DurationMS: spoken.Duration.Milliseconds(), Interrupted: spoken.Interrupted,
		Converted: p.utterance.converted, LiveSeq: p.utterance.liveLast(), Recorded: recorded,
	})
}

// recorded returns how much of the recording is stored, or nil if the output is
// not a recording.
func (p *run) recorded() (*event.Recorded, error) {
	at, err := p.sink.Checkpoint()
	if at == nil || err != nil {
		return nil, err
	}
	recorded := event.Recorded(*at)
	return &recorded, nil
}

// begin records that the utterance has begun. For live speech the record is
// written later, because each millisecond counts.
func (p *run) begin() error {
	p.begun = nil
	if p.utterance.liveBegun == 0 {
		return p.a.Progress.Speaking(p.ctx, p.number, 0)
	}
	number, first := p.number, p.utterance.liveBegun
	if p.a.Job.RedeliveryPolicy() == jobspec.OnRedeliveryGiveUp {
		return p.a.Progress.Speaking(p.ctx, number, first)
	}
	p.begun = newBegun(func() error { return p.a.Progress.Speaking(p.ctx, number, first) })
	return nil
}

func (p *run) frame(utterance int, begun *begun, f session.Frame) error {
	if p.egress {
		return nil // egress envelopes carry no data
	}
	p.reportWorking()
	if f.End {
		begun.start()
	}
	err := p.sink.Write(p.ctx, output.Envelope{Utterance: utterance, ReqID: f.ReqID, End: f.End, Data: f.Data})
	begun.start()
	return err
}

// reportWorking reports, once, that the session works: at its first frame or, in
// egress, after its first utterance.
func (p *run) reportWorking() {
	if !p.workingReported {
		p.workingReported = true
		p.a.Progress.FirstFrame()
	}
}

// interrupt stops the utterance in flight: no frame of it follows. It returns
// once the end of the interrupted speech is recorded. Live speech published after
// that is played, whatever happens to this session.
func (p *run) interrupt(ctx context.Context) (jobs.Interrupted, error) {
	reqID, err := p.session.Interrupt(ctx)
	if err != nil {
		return jobs.Interrupted{}, err
	}
	interrupted := jobs.Interrupted{ReqID: reqID, LastSeq: p.sink.LastSeq()}
	stopped := p.interrupted.Load()
	select {
	case <-stopped.done:
		err = stopped.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-p.ctx.Done():
		err = context.Cause(p.ctx)
	}
	if err != nil {
		return jobs.Interrupted{}, errors.Wrap(errors.CodeInternal, errors.PhaseSend, err,
			"the utterance was stopped, but the end of its speech could not be recorded")
	}
	return interrupted, nil
}

// close closes the session and returns the attempt's report.
func (p *run) close(err error) (jobs.Report, error) {
	report := jobs.Report{Recording: p.a.Job.RecordingName(), Frames: p.frames, Bytes: p.bytes}
	if p.session != nil {
		if closeErr := p.session.Close(); err == nil {
			err = closeErr
		}
		report.ConnectionID, report.Region, report.Connected = p.session.ConnectionID(), p.session.Region(), p.session.Connected()
	}
	return report, p.r.overtime(p.ctx, err)
}

// release frees everything, even after a panic.
func (p *run) release() {
	if p.session != nil {
		_ = p.session.Close() // already closed, except after a panic
	}
	if p.source != nil {
		p.source.close()
	}
	p.cancel()
}

func itoa(n int) string { return strconv.Itoa(n) }
