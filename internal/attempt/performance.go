package attempt

import (
	"context"
	"strconv"

	"avatarworker/internal/jobs"
	"avatarworker/internal/output"
	"avatarworker/internal/session"
)

// performance speaks a script in one session.
type performance struct {
	a       *jobs.Attempt
	session *session.Session
	sink    output.Sink
	script  script
	egress  bool
	spoken  int // utterances of this session
	worked  bool
	frames  int
	bytes   int64
}

// open opens the session.
func (p *performance) open(ctx context.Context, r *Runner) (err error) {
	p.session, err = r.o.Sessions.Open(ctx, r.params(p.a, p.script))
	return err
}

func (p *performance) perform(ctx context.Context) error {
	p.a.Progress.Connected(p.session.ConnectionID(), p.session.Region())
	p.a.Control.OnInterrupt(p.interrupt)
	for {
		line, err := p.script.next(ctx)
		if err != nil || line == nil {
			return err
		}
		err = p.speak(ctx, line)
		line.done()
		if err != nil {
			return err
		}
	}
}

// speak speaks one utterance and delivers it.
func (p *performance) speak(ctx context.Context, l *line) error {
	number := p.a.Checkpoint + p.spoken + 1
	begun, err := p.begin(ctx, l, number)
	if err != nil {
		return err
	}
	spoken, err := p.session.Speak(ctx, p.utterance(ctx, l, number))
	if beginErr := begun(); err == nil {
		err = beginErr
	}
	return p.deliver(ctx, l, number, &spoken, err)
}

func (p *performance) utterance(ctx context.Context, l *line, number int) session.Utterance {
	return session.Utterance{
		Speech:  l.speech,
		OnFrame: func(f session.Frame) error { return p.frame(ctx, number, f) },
	}
}

// deliver finishes an utterance that was spoken, unless err says that it failed.
func (p *performance) deliver(ctx context.Context, l *line, number int, spoken *session.Spoken, err error) error {
	p.frames += spoken.Frames
	p.bytes += spoken.Bytes
	if err != nil {
		return err
	}
	if p.egress && !spoken.Interrupted {
		p.working()
	}
	if err := p.sink.Finish(ctx, number); err != nil {
		return err
	}
	p.spoken++
	if spoken.Interrupted && l.interrupted != nil {
		if err := l.interrupted(ctx); err != nil {
			return err
		}
	}
	return p.a.Progress.Delivered(ctx, jobs.Utterance{
		ReqID: spoken.ReqID, Frames: spoken.Frames, Bytes: spoken.Bytes,
		AudioMS: spoken.Audio.Milliseconds(), FirstFrameMS: spoken.FirstFrame.Milliseconds(),
		DurationMS: spoken.Duration.Milliseconds(), Interrupted: spoken.Interrupted,
		Converted: l.converted, LiveSeq: l.liveLast(),
	})
}

// begin notes that the utterance is begun. For live speech, where each
// millisecond counts, that is done while it is spoken.
func (p *performance) begin(ctx context.Context, l *line, number int) (wait func() error, err error) {
	if l.liveBegun == 0 {
		return func() error { return nil }, p.a.Progress.Speaking(ctx, number, 0)
	}
	noted := make(chan error, 1) // the function returned waits for it
	go func() { noted <- p.a.Progress.Speaking(ctx, number, l.liveBegun) }()
	return func() error { return <-noted }, nil
}

func (p *performance) frame(ctx context.Context, utterance int, f session.Frame) error {
	if p.egress {
		return nil // playback signals without data
	}
	p.working()
	return p.sink.Write(ctx, output.Envelope{Utterance: utterance, ReqID: f.ReqID, End: f.End, Data: f.Data})
}

// working tells once that the session works: by its first frame, in egress by
// its first utterance.
func (p *performance) working() {
	if !p.worked {
		p.worked = true
		p.a.Progress.FirstFrame()
	}
}

// interrupt stops the utterance in flight. No frame of it comes after.
func (p *performance) interrupt(ctx context.Context) (jobs.Interrupted, error) {
	reqID, err := p.session.Interrupt(ctx)
	if err != nil {
		return jobs.Interrupted{}, err
	}
	return jobs.Interrupted{ReqID: reqID, LastSeq: p.sink.LastSeq()}, nil
}

func (p *performance) report() jobs.Report {
	return jobs.Report{
		ConnectionID: p.session.ConnectionID(), Region: p.session.Region(), Connected: p.session.Connected(),
		Recording: p.a.Job.RecordingName(), Frames: p.frames, Bytes: p.bytes,
	}
}

func itoa(n int) string { return strconv.Itoa(n) }
