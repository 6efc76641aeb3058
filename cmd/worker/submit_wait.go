package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

// eventGrace is how long the outcome's event may come after the outcome in the
// record. It is published after the recording was assembled.
const eventGrace = 30 * time.Second

// marks are where the streams ended before the job was published: what an
// earlier job of the same id left there is not this one's.
type marks struct{ events, frames uint64 }

func (l *link) marks(ctx context.Context) (m marks, err error) {
	for _, s := range []struct {
		name string
		at   *uint64
	}{{l.names.EventsStream(), &m.events}, {l.names.FramesStream(), &m.frames}} {
		stream, err := l.js.Stream(ctx, s.name)
		if err != nil {
			return m, l.missing("stream "+s.name, err)
		}
		*s.at = stream.CachedInfo().State.LastSeq + 1
	}
	return m, nil
}

// ended is how a job ended.
type ended struct {
	state      lifecycle.State
	event      json.RawMessage
	text       string // for people
	recording  string
	utterances []event.Utterance
	spoken     int // utterances in all
}

// waiter follows one published job to its outcome.
type waiter struct {
	c     *cli
	l     *link
	s     *submission
	p     *published
	from  marks
	log   *progress
	file  *frameFile // nil: no frames are saved from the stream
	found chan ended
	fail  chan error
}

func (c *cli) waitFor(ctx context.Context, l *link, s *submission, p *published, from marks, live *liveSpeech, file *frameFile) error {
	w := &waiter{
		c: c, l: l, s: s, p: p, from: from, log: newProgress(c), file: file,
		found: make(chan ended, 2), fail: make(chan error, 4),
	}
	if p.Duplicate {
		w.from = marks{1, 1}
	}
	end, err := w.run(ctx, live)
	w.log.clear()
	if err != nil {
		return w.gaveUp(ctx, err)
	}
	p.Outcome, p.Event = end.state, end.event
	if end.state == lifecycle.StateCompleted && s.out != "" {
		p.Saved, err = w.save(ctx, end)
	}
	return w.verdict(end, err)
}

// gaveUp says what becomes of the job when nobody waits for it any more.
func (w *waiter) gaveUp(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted: job %s goes on; 'avatarworker status %s' shows it, 'avatarworker cancel %s' ends it", w.p.JobID, w.p.JobID, w.p.JobID)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no outcome within %s: job %s goes on; 'avatarworker status %s' shows it", w.s.timeout, w.p.JobID, w.p.JobID)
	}
	return err
}

func (w *waiter) verdict(end ended, err error) error {
	if w.s.asJSON {
		err = errors.Join(err, w.c.printJSON(w.p))
	}
	colour := red
	if end.state == lifecycle.StateCompleted {
		colour = green
	}
	w.c.note("%s: %s%s", w.p.JobID, w.c.colour(w.c.stderr, colour, string(end.state)), plain(end.text))
	if w.p.Saved != nil {
		w.c.note("saved %s: %s, %s, %.2f s, %d bytes", w.p.Saved.File, count(len(w.p.Saved.Utterances), "utterance"), count(w.p.Saved.Frames, "frame"), w.p.Saved.Seconds, w.p.Saved.Bytes)
	}
	if err == nil && end.state != lifecycle.StateCompleted {
		return errShown
	}
	return err
}

// run returns the outcome, when nothing that it started runs any more.
func (w *waiter) run(ctx context.Context, live *liveSpeech) (ended, error) {
	if w.s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.s.timeout)
		defer cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	start := func(f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				w.fail <- err
			}
		})
	}
	start(w.followEvents)
	start(w.followRecord)
	if w.file != nil {
		start(w.followFrames)
	}
	start(func(ctx context.Context) error { return live.publish(ctx, w.l, w.p.JobID) })
	select {
	case end := <-w.found:
		return end, nil
	case err := <-w.fail:
		return ended{}, err
	case <-ctx.Done():
		return ended{}, ctx.Err()
	}
}

// followEvents shows the job's events, and finds its outcome among them.
func (w *waiter) followEvents(ctx context.Context) error {
	stream, err := w.l.js.Stream(ctx, w.l.names.EventsStream())
	if err != nil {
		return w.l.missing("stream "+w.l.names.EventsStream(), err)
	}
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{w.l.names.EventsFilter("", w.p.JobID)},
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy, OptStartSeq: w.from.events,
	}
	return follow(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		e := status.NewEvent(msg.Subject(), msg.Headers(), msg.Data(), meta.Sequence.Stream, meta.Timestamp)
		return w.event(e)
	})
}

func (w *waiter) event(e status.Event) error {
	var body struct {
		Run        int               `json:"run"`
		StreamSeq  uint64            `json:"stream_seq"`
		Recording  string            `json:"recording"`
		Utterances []event.Utterance `json:"utterances"`
		Total      int               `json:"utterances_total"`
	}
	if json.Unmarshal(e.Data, &body) != nil || body.Run > 1 {
		return nil // not a worker's, or of a replay
	}
	kind := strings.TrimPrefix(e.Type, "avatar.job.")
	if kind == event.TypeDuplicate {
		if body.StreamSeq == w.p.Seq {
			return w.dropped()
		}
		return nil
	}
	if state := lifecycle.State(kind); state.Final() {
		w.offer(ended{state: state, event: e.Data, text: ": " + describeEvent(e), recording: body.Recording, utterances: body.Utterances, spoken: max(body.Total, len(body.Utterances))})
		return nil
	}
	w.log.line(w.c.eventLine(w.c.stderr, e))
	return nil
}

func (w *waiter) dropped() error {
	return fmt.Errorf("a worker dropped the job: the id %s was used before; 'avatarworker status %s' shows that job", w.p.JobID, w.p.JobID)
}

// offer hands over an outcome; the first one counts.
func (w *waiter) offer(end ended) {
	select {
	case w.found <- end:
	default:
	}
}

// followRecord is for an outcome whose event does not come, and for a job whose
// id another one has.
func (w *waiter) followRecord(ctx context.Context) error {
	kv, err := w.l.js.KeyValue(ctx, w.l.names.StateBucket())
	if err != nil {
		return w.l.missing("bucket "+w.l.names.StateBucket(), err)
	}
	watcher, err := kv.Watch(ctx, w.p.JobID, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("following the record of job %s: %w", w.p.JobID, err)
	}
	defer watcher.Stop() //nolint:errcheck // the connection's end does it too
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case entry, open := <-watcher.Updates():
			if !open {
				return nil
			}
			var r lifecycle.Record
			if entry == nil || json.Unmarshal(entry.Value(), &r) != nil {
				continue
			}
			if r.StreamSeq != 0 && r.StreamSeq != w.p.Seq {
				return w.dropped()
			}
			if r.State.Final() && r.Run <= 1 {
				return w.late(ctx, &r, entry.Value())
			}
		}
	}
}

// late gives the outcome of the record when its event stays out.
func (w *waiter) late(ctx context.Context, r *lifecycle.Record, data []byte) error {
	timer := time.NewTimer(eventGrace)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	end := ended{state: r.State, event: data, recording: r.Recording, utterances: r.Utterances, spoken: max(r.UtterancesDone, len(r.Utterances))}
	if r.LastError != nil {
		end.text = fmt.Sprintf(": %s (%s): %s", r.LastError.Code, r.LastError.Class, errors.RedactText(r.LastError.Message))
	}
	w.offer(end)
	return nil
}

func (w *waiter) followFrames(ctx context.Context) error {
	stream, err := w.l.js.Stream(ctx, w.l.names.FramesStream())
	if err != nil {
		return w.l.missing("stream "+w.l.names.FramesStream(), err)
	}
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{w.l.names.Frames(w.p.JobID)},
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy, OptStartSeq: w.from.frames,
	}
	return follow(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		if err := w.file.add(msg.Headers(), msg.Data(), meta.Sequence.Stream); err != nil {
			return err
		}
		w.log.count(w.file.count())
		return nil
	})
}

// save makes the file: from the frames, or from the job's recording.
func (w *waiter) save(ctx context.Context, end ended) (*savedRecording, error) {
	var saved *savedRecording
	var err error
	if end.recording != "" {
		saved, err = w.download(ctx, end.recording)
	} else if err = w.restOfFrames(ctx); err == nil {
		saved, err = w.file.save()
	}
	if err == nil && saved.Unreadable != "" {
		w.c.note("%s has the frames as they came, but not all of them can be read: %s", w.s.out, plain(saved.Unreadable))
		told := framesOf(end.utterances)
		saved.Whole = told == 0 || saved.Frames == told
	}
	empty := err == nil && end.spoken == 0 && saved.Frames == 0 // a live session in which nothing was said
	if err == nil && !saved.Whole && !empty && !interrupted(end.utterances) {
		err = fmt.Errorf("%s is not whole: frames are missing, they may have aged out", w.s.out)
	}
	return saved, err
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
	for _, u := range utterances {
		if u.Interrupted {
			return true
		}
	}
	return false
}

func (w *waiter) download(ctx context.Context, name string) (*savedRecording, error) {
	body, err := w.l.openRecording(ctx, name)
	if err != nil {
		return nil, err
	}
	defer body.Close() // it was only read
	return saveFile(w.s.out, func(to io.Writer) error {
		_, err := io.Copy(to, body)
		return err
	})
}

// restOfFrames reads what had not arrived when the outcome did: every frame was
// stored before it.
func (w *waiter) restOfFrames(ctx context.Context) error {
	stream, err := w.l.js.Stream(ctx, w.l.names.FramesStream())
	if err != nil {
		return w.l.missing("stream "+w.l.names.FramesStream(), err)
	}
	var failed error
	cfg := jetstream.ConsumerConfig{
		FilterSubject: w.l.names.Frames(w.p.JobID), DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq: max(w.from.frames, w.file.reached+1),
	}
	err = status.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		failed = w.file.add(msg.Headers(), msg.Data(), meta.Sequence.Stream)
		return failed == nil
	})
	return errors.Join(err, failed)
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

func newProgress(c *cli) *progress { return &progress{c: c, terminal: isTerminal(c.stderr)} }

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
