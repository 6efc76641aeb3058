package attempt

import (
	"context"
	"strconv"
	"sync/atomic"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/output"
	"avatarworker/internal/session"
)

// performance speaks a job's script in one session.
type performance struct {
	r   *Runner
	a   *jobs.Attempt
	ctx context.Context // ends with the attempt's time
	end context.CancelFunc

	sink    output.Sink
	script  script           // nil: not open
	session *session.Session // nil: none was opened, or none was needed
	egress  bool

	// The utterance under way.
	line   *line
	number int // in the job, from 1
	saying session.Saying
	noted  func() error // waits until it is written down that it is begun
	done   *delivery    // of this utterance

	stopped atomic.Pointer[delivery] // of the utterance interrupted last

	spoken int // utterances of this session
	worked bool
	frames int
	bytes  int64
}

// delivery is how the delivery of an utterance ended.
type delivery struct {
	over chan struct{} // closed at its end
	err  error         // read after over
}

// open does what needs no session, then opens it, unless everything is spoken.
func (p *performance) open() error {
	if err := p.r.catchUp(p.ctx, p.a); err != nil {
		return err
	}
	script, err := p.r.script(p.ctx, p.a)
	if err != nil {
		return err
	}
	p.script = script
	if script.finished() {
		return nil
	}
	if err := p.sink.Open(p.ctx); err != nil {
		return err
	}
	if p.session, err = p.r.o.Sessions.Open(p.ctx, p.r.params(p.a, script)); err != nil {
		return err
	}
	p.a.Progress.Connected(p.session.ConnectionID(), p.session.Region())
	p.a.Control.OnInterrupt(p.interrupt)
	return nil
}

// perform speaks what there is to speak. Here a job waits for the backend, for
// as long as a session may last, so next to nothing is on its stack meanwhile:
// saying and delivering have returned.
func (p *performance) perform() error {
	for {
		answered, err := p.say()
		if answered == nil || err != nil {
			return err
		}
		<-answered
		if err := p.deliver(); err != nil {
			return err
		}
	}
}

// say says the next utterance; nil: there is none.
func (p *performance) say() (answered <-chan struct{}, err error) {
	if p.session == nil {
		return nil, nil //nolint:nilnil // everything is spoken, and that is no error
	}
	p.line, err = p.script.next(p.ctx)
	if err != nil || p.line == nil {
		return nil, err
	}
	p.number = p.a.Checkpoint + p.spoken + 1
	defer p.said()
	if err := p.begin(); err != nil {
		return nil, err
	}
	number, done := p.number, &delivery{over: make(chan struct{})}
	p.done = done
	p.saying = p.session.Say(p.ctx, session.Utterance{
		Speech:      p.line.speech,
		OnFrame:     func(f session.Frame) error { return p.frame(number, f) },
		OnInterrupt: func() { p.stopped.Store(done) },
	})
	return p.saying.Answered(), nil
}

// said lets go of the speech: the wait for its answer may be long.
func (p *performance) said() {
	p.line.done()
	p.line.speech, p.line.done = nil, nil
}

// deliver finishes the utterance, unless it failed.
func (p *performance) deliver() (err error) {
	defer func() {
		p.done.err = err
		close(p.done.over)
	}()
	spoken, err := p.saying.End()
	if noteErr := p.noted(); err == nil {
		err = noteErr
	}
	p.frames += spoken.Frames
	p.bytes += spoken.Bytes
	if err != nil {
		return err
	}
	if p.egress && !spoken.Interrupted {
		p.working()
	}
	if err := p.sink.Finish(p.ctx, p.number); err != nil {
		return err
	}
	p.spoken++
	if spoken.Interrupted && p.line.interrupted != nil {
		if err := p.line.interrupted(p.ctx); err != nil {
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
		Converted: p.line.converted, LiveSeq: p.line.liveLast(), Recorded: recorded,
	})
}

// recorded is how far the recording is stored; nil: there is none.
func (p *performance) recorded() (*event.Recorded, error) {
	at, err := p.sink.Checkpoint()
	if at == nil || err != nil {
		return nil, err
	}
	recorded := event.Recorded(*at)
	return &recorded, nil
}

// begin notes that the utterance is begun. For live speech, where each
// millisecond counts, that is done while it is spoken.
func (p *performance) begin() error {
	p.noted = func() error { return nil }
	if p.line.liveBegun == 0 {
		return p.a.Progress.Speaking(p.ctx, p.number, 0)
	}
	noted := make(chan error, 1) // the function waits for it
	number, begun := p.number, p.line.liveBegun
	go func() {
		var err error
		defer func() { noted <- err }()
		defer errors.Recover(&err, errors.PhaseAudio)
		err = p.a.Progress.Speaking(p.ctx, number, begun)
	}()
	p.noted = func() error { return <-noted }
	return nil
}

func (p *performance) frame(utterance int, f session.Frame) error {
	if p.egress {
		return nil // playback signals without data
	}
	p.working()
	return p.sink.Write(p.ctx, output.Envelope{Utterance: utterance, ReqID: f.ReqID, End: f.End, Data: f.Data})
}

// working tells once that the session works: by its first frame, in egress by
// its first utterance.
func (p *performance) working() {
	if !p.worked {
		p.worked = true
		p.a.Progress.FirstFrame()
	}
}

// interrupt stops the utterance in flight. No frame of it comes after. It returns
// when the line between old and new speech is drawn and written down: live
// speech that is published from then on is spoken, whatever happens to this
// session.
func (p *performance) interrupt(ctx context.Context) (jobs.Interrupted, error) {
	reqID, err := p.session.Interrupt(ctx)
	if err != nil {
		return jobs.Interrupted{}, err
	}
	interrupted := jobs.Interrupted{ReqID: reqID, LastSeq: p.sink.LastSeq()}
	done := p.stopped.Load()
	select {
	case <-done.over:
		err = done.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-p.ctx.Done():
		err = context.Cause(p.ctx)
	}
	if err != nil {
		return jobs.Interrupted{}, errors.Wrap(errors.CodeInternal, errors.PhaseSend, err,
			"the utterance was stopped, but it is not written down which speech comes after it")
	}
	return interrupted, nil
}

// close ends what is left of the session, and says how it went.
func (p *performance) close(err error) (jobs.Report, error) {
	report := jobs.Report{Recording: p.a.Job.RecordingName(), Frames: p.frames, Bytes: p.bytes}
	if p.session != nil {
		if closeErr := p.session.Close(); err == nil {
			err = closeErr
		}
		report.ConnectionID, report.Region, report.Connected = p.session.ConnectionID(), p.session.Region(), p.session.Connected()
	}
	return report, p.r.overtime(p.ctx, err)
}

// release lets go of everything, also after a panic.
func (p *performance) release() {
	if p.session != nil {
		_ = p.session.Close() // closed already, but after a panic
	}
	if p.script != nil {
		p.script.close()
	}
	p.end()
}

func itoa(n int) string { return strconv.Itoa(n) }
