package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"avatarworker/internal/client"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

// waiter shows how one published job goes, and how it ended.
type waiter struct {
	c    *cli
	l    *link
	s    *submission
	p    *published
	from client.Position
	log  *progress
	file *frameFile // nil: no frames are saved from the stream
}

func (c *cli) waitFor(ctx context.Context, l *link, s *submission, p *published, from client.Position, live *liveSpeech, file *frameFile) error {
	w := &waiter{c: c, l: l, s: s, p: p, from: from, log: newProgress(c), file: file}
	if p.Duplicate {
		w.from = client.Position{}
	}
	end, err := w.run(ctx, live)
	w.log.clear()
	if err != nil {
		err = errors.Join(w.explain(ctx, err), w.keep())
		w.noteSaved()
		return err
	}
	p.Outcome, p.Event = end.State, end.Body
	switch {
	case s.out == "":
	case end.State == lifecycle.StateCompleted:
		p.Saved, err = w.save(ctx, end)
	default:
		err = errors.Join(w.restOfFrames(ctx), w.keep())
	}
	return w.verdict(end, err)
}

// explain adds to an error what becomes of the job after the wait has ended.
func (w *waiter) explain(ctx context.Context, err error) error {
	id := w.p.JobID
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted: job %s goes on; 'avatarworker status %s' shows it, 'avatarworker cancel %s' ends it", id, id, id)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no outcome within %s: job %s goes on; 'avatarworker status %s' shows it", w.s.timeout, id, id)
	case errors.Is(err, client.ErrDropped):
		return fmt.Errorf("a worker dropped the job: the id %s was used before; 'avatarworker status %s' shows that job", id, id)
	}
	return err
}

func (w *waiter) verdict(end client.Outcome, err error) error {
	if w.s.asJSON {
		err = errors.Join(err, w.c.printJSON(w.p))
	}
	colour := terminal.Red
	if end.State == lifecycle.StateCompleted {
		colour = terminal.Green
	}
	w.c.note("%s: %s%s", w.p.JobID, w.c.colour(w.c.stderr, colour, string(end.State)), terminal.Plain(outcomeText(end)))
	if end.State == lifecycle.StateDeadLettered {
		w.c.note("'avatarworker dlq show --job %s' explains it", w.p.JobID)
	}
	w.noteSaved()
	if err == nil && end.State != lifecycle.StateCompleted {
		return errShown
	}
	return err
}

// outcomeText is an outcome's details, for people.
func outcomeText(end client.Outcome) string {
	switch e := end.LastError; {
	case end.Event != nil:
		return ": " + describeEvent(*end.Event)
	case e != nil:
		return fmt.Sprintf(": %s (%s): %s", e.Code, e.Class, status.Cause(e.Message, e.ServerTitle, e.ServerDetail))
	}
	return ""
}

// run waits for the outcome, and publishes live speech meanwhile. When it
// returns, nothing that it started is running.
func (w *waiter) run(ctx context.Context, live *liveSpeech) (client.Outcome, error) {
	if w.s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.s.timeout)
		defer cancel()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		if err := live.publish(ctx, w.l, w.p.JobID); err != nil {
			cancel(err)
		}
	})
	options := client.WaitOptions{
		From:    w.from,
		OnEvent: func(e status.Event) { w.log.line(w.c.eventLine(w.c.stderr, e, "")) },
		OnFrame: w.log.count,
	}
	if w.file != nil {
		options.Frames = w.file.Frames
	}
	end, err := w.l.client.Wait(ctx, w.p.Published, options)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return end, err
}

// save makes the file: from the frames, or from the job's recording.
func (w *waiter) save(ctx context.Context, end client.Outcome) (*savedRecording, error) {
	var saved *savedRecording
	var err error
	if end.Recording != "" {
		saved, err = w.download(ctx, end.Recording)
	} else if err = w.restOfFrames(ctx); err == nil {
		saved, err = w.file.save()
	}
	if err == nil && saved.Unreadable != "" {
		w.noteUnreadable(saved)
		published := framesOf(end.Utterances)
		saved.Whole = published == 0 || saved.Frames == published
	}
	empty := err == nil && end.UtterancesTotal == 0 && saved.Frames == 0 // a live session in which nothing was said
	if err == nil && !saved.Whole && !empty && !interrupted(end.Utterances) {
		err = fmt.Errorf("%s is not whole: frames are missing, they may have aged out", w.s.out)
	}
	return saved, err
}

// keep saves the frames that came of a job that did not complete, or whose wait
// has ended. Where none came it writes no file.
func (w *waiter) keep() error {
	if w.file == nil {
		return nil
	}
	if w.file.Count() == 0 {
		w.c.note("no frames came: %s was not written", w.s.out)
		return nil
	}
	saved, err := w.file.save()
	if err != nil {
		return err
	}
	if saved.Unreadable != "" {
		w.noteUnreadable(saved)
	}
	w.p.Saved = saved
	return nil
}

func (w *waiter) restOfFrames(ctx context.Context) error {
	return w.l.client.RestOfFrames(ctx, w.p.JobID, w.from, w.file.Frames)
}

func (w *waiter) noteUnreadable(saved *savedRecording) {
	w.c.note("%s has the frames as they came, but not all of them can be read: %s", w.s.out, terminal.Plain(saved.Unreadable))
}

// noteSaved says what is in the file, and that it is not whole where it isn't.
func (w *waiter) noteSaved() {
	saved := w.p.Saved
	if saved == nil {
		return
	}
	part := ""
	if !saved.Whole && w.p.Outcome != lifecycle.StateCompleted {
		part = "; the last utterance is not whole"
	}
	w.c.note("saved %s: %s, %s, %.2f s, %d bytes%s", saved.File, terminal.Count(len(saved.Utterances), "utterance"), terminal.Count(saved.Frames, "frame"), saved.Seconds, saved.Bytes, part)
}

// framesOf is how many frames the worker published.
func framesOf(utterances []event.Utterance) int {
	n := 0
	for _, u := range utterances {
		n += u.Frames
	}
	return n
}

// interrupted reports whether an utterance was meant to have no end.
func interrupted(utterances []event.Utterance) bool {
	return slices.ContainsFunc(utterances, func(u event.Utterance) bool { return u.Interrupted })
}

func (w *waiter) download(ctx context.Context, name string) (*savedRecording, error) {
	body, err := w.l.client.Recording(ctx, name)
	if err != nil {
		return nil, err
	}
	defer body.Close() // it was only read
	return saveFile(w.s.out, func(to io.Writer) error {
		_, err := io.Copy(to, body)
		return err
	})
}

// progress shows what happens on stderr: lines, and on a terminal a counter
// under them.
type progress struct {
	c        *cli
	terminal bool
	mu       sync.Mutex
	frames   int
	shown    time.Time // when the counter was last written
}

func newProgress(c *cli) *progress { return &progress{c: c, terminal: terminal.Is(c.stderr)} }

const eraseLine = "\r\x1b[K"

func (p *progress) line(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal {
		text = eraseLine + text
	}
	p.c.note("%s", text)
}

// count shows how many frames there are, ten times a second at most.
func (p *progress) count(frames int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frames = frames
	if !p.terminal || time.Since(p.shown) < 100*time.Millisecond {
		return
	}
	p.shown = time.Now()
	_, _ = fmt.Fprintf(p.c.stderr, "%s%d frames", eraseLine, frames) // only for show
}

func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal {
		_, _ = io.WriteString(p.c.stderr, eraseLine) // only for show
	}
}
