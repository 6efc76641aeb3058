package attempt

import (
	"context"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/session"
	"avatarworker/internal/topology"
)

// source gives a job's speech from the checkpoint on, utterance by utterance.
type source interface {
	// done reports whether no utterance is left. It opens nothing.
	done() bool
	// config opens the first speech and returns the audio configuration of the
	// session. It is called while the token is minted.
	config(ctx context.Context) (session.AudioConfig, error)
	// next returns the next utterance, or nil if there is none.
	next(ctx context.Context) (*utterance, error)
	close()
}

// utterance is one utterance of a source.
type utterance struct {
	speech    session.Speech
	converted string        // what audio.convert did
	liveBegun uint64        // sequence of its first live message
	liveLast  func() uint64 // sequence of its last live message, once it was sent
	release   func()        // frees the speech once it was sent
	// interrupted skips the rest of the utterance's speech after an interrupt;
	// nil if nothing has to be skipped.
	interrupted func(ctx context.Context) error
}

func format(f audio.Format) session.Format {
	if f == audio.OggOpus {
		return session.FormatOggOpus
	}
	return session.FormatPCM
}

// clips is speech that is complete when the job starts: inline, objects, URLs.
type clips struct {
	job       *jobspec.Job
	opener    *audio.Opener
	ctx       context.Context // of everything opened
	cancel    context.CancelFunc
	specs     []audio.Spec // not delivered yet
	delivered int          // utterances of the job, including those of earlier sessions
	first     *audio.Speech
	want      session.AudioConfig
	ahead     chan opened // the next utterance, while it is opened; nil: none
}

type opened struct {
	speech *audio.Speech
	err    error
}

// newClips checks everything that can be checked before a session is paid for.
func newClips(ctx context.Context, opener *audio.Opener, a *jobs.Attempt) (*clips, error) {
	c := &clips{job: a.Job, opener: opener, delivered: a.Checkpoint}
	c.ctx, c.cancel = context.WithCancel(ctx)
	if err := c.check(a); err != nil {
		c.cancel()
		return nil, err
	}
	return c, nil
}

func (c *clips) check(a *jobs.Attempt) error {
	for i, s := range a.Job.AudioSpecs() {
		spec := audio.Spec{
			Inline: s.Inline, HasInline: s.HasInline, Object: s.Object, URL: s.URL,
			Format: s.Format, SampleRate: s.SampleRate, Field: s.Field,
		}
		if err := c.opener.Check(spec); err != nil {
			return err
		}
		if i >= a.Checkpoint {
			c.specs = append(c.specs, spec)
		}
	}
	return c.checkInline()
}

// checkInline returns an error if the inline utterances differ in format or rate.
func (c *clips) checkInline() error {
	var first session.AudioConfig
	for i, spec := range c.specs {
		if !spec.HasInline || len(c.specs) == 1 {
			continue
		}
		speech, err := c.opener.Open(c.ctx, spec) // reads memory only
		if err != nil {
			return err
		}
		conf := configOf(speech)
		if err := speech.Close(); err != nil {
			return err
		}
		if i == 0 || first == (session.AudioConfig{}) {
			first = conf
		}
		if err := checkFormat(spec, conf, first); err != nil {
			return err
		}
	}
	return nil
}

func configOf(s *audio.Speech) session.AudioConfig {
	return session.AudioConfig{SampleRate: s.SampleRate(), Format: format(s.Format())}
}

// checkFormat returns an error unless the utterance has the session's format and
// rate.
func checkFormat(spec audio.Spec, got, want session.AudioConfig) error {
	if got == want {
		return nil
	}
	return errors.Newf(errors.CodeInvalidJob, errors.PhaseAudio,
		"%s: %s; the utterances before it have %s, and a session has one format and rate. Bring them to the same, or send them as separate jobs",
		spec.Field, describe(got), describe(want))
}

func describe(c session.AudioConfig) string {
	name := "PCM"
	if c.Format == session.FormatOggOpus {
		name = "Ogg Opus"
	}
	return name + " at " + itoa(c.SampleRate) + " Hz"
}

func (c *clips) done() bool { return len(c.specs) == 0 }

func (c *clips) config(ctx context.Context) (session.AudioConfig, error) {
	if c.first == nil {
		c.openAhead()
		speech, err := c.opened(ctx)
		if err != nil {
			return session.AudioConfig{}, err
		}
		c.first, c.want = speech, configOf(speech)
	}
	return c.want, c.checkLater(ctx)
}

// checkLater opens each later utterance for its header, so that a fault shows
// before a session is paid for. A URL would be fetched twice, so it is checked
// only when its turn comes.
func (c *clips) checkLater(ctx context.Context) error {
	for _, spec := range c.specs[1:] {
		if spec.URL != "" {
			continue
		}
		speech, err := c.opener.Open(ctx, spec)
		if err != nil {
			return err
		}
		err = checkFormat(spec, configOf(speech), c.want)
		if closeErr := speech.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *clips) next(ctx context.Context) (*utterance, error) {
	if len(c.specs) == 0 {
		return nil, nil //nolint:nilnil // nil means that no utterance is left
	}
	spec := c.specs[0]
	speech, err := c.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkFormat(spec, configOf(speech), c.want); err != nil {
		return nil, errors.Join(err, speech.Close())
	}
	c.specs[0] = audio.Spec{}
	c.specs = c.specs[1:]
	c.openAhead()
	return &utterance{
		speech: speech, converted: speech.Converted(), liveLast: func() uint64 { return 0 },
		release: func() { c.spoken(speech) },
	}, nil
}

// spoken releases speech that was sent or given up: the session may stay open for
// long.
func (c *clips) spoken(speech *audio.Speech) {
	_ = speech.Close() // nothing more is read from it
	c.delivered++
	c.job.DropInline(c.delivered)
	if len(c.specs) == 0 {
		c.specs = nil
		c.cancel()
		c.ctx, c.cancel = nil, func() {} // the session may stay open without them
	}
}

func (c *clips) open(ctx context.Context) (*audio.Speech, error) {
	switch {
	case c.first != nil:
		speech := c.first
		c.first = nil
		return speech, nil
	default:
		c.openAhead()
		return c.opened(ctx)
	}
}

// opened waits for the speech that openAhead opens.
func (c *clips) opened(ctx context.Context) (*audio.Speech, error) {
	select {
	case got := <-c.ahead:
		c.ahead = nil
		return got.speech, got.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// openAhead opens the next utterance while the current one is played: a connected
// session is paid for even while it is silent.
func (c *clips) openAhead() {
	if len(c.specs) == 0 || c.ahead != nil {
		return
	}
	spec, ahead := c.specs[0], make(chan opened, 1)
	c.ahead = ahead
	go func() { // close waits for it
		var got opened
		defer func() { ahead <- got }()
		defer errors.Recover(&got.err, errors.PhaseAudio)
		got.speech, got.err = c.opener.Open(c.ctx, spec)
	}()
}

func (c *clips) close() {
	c.cancel()
	if c.ahead != nil {
		if got := <-c.ahead; got.speech != nil {
			_ = got.speech.Close() // never used
		}
	}
	if c.first != nil {
		_ = c.first.Close() // never used
	}
}

// live is speech that is published while the session runs.
type live struct {
	js     jetstream.JetStream
	spec   audio.LiveSpec
	source *audio.Live
	closed bool // the publisher closed an earlier session of the job
}

func liveSpec(names topology.Names, a *jobs.Attempt) audio.LiveSpec {
	spec := audio.LiveSpec{
		Stream: names.AudioStream(), Subject: names.Audio(a.Job.ID), Begun: a.LiveBegun,
		SampleRate: int(a.Job.GetLive().GetSampleRate()), MaxSilence: a.Job.MaxSilence(),
	}
	if a.Job.LiveFormat() == jobspec.FormatOggOpus {
		spec.Format = audio.OggOpus
	}
	if a.LiveSeq > 0 {
		spec.From = a.LiveSeq + 1
	}
	return spec
}

func newLive(ctx context.Context, js jetstream.JetStream, names topology.Names, a *jobs.Attempt) (*live, error) {
	l := &live{js: js, spec: liveSpec(names, a)}
	if a.LiveSeq == 0 {
		return l, nil
	}
	// A session that only waited for the silence to end would be paid for.
	closed, err := audio.Closes(ctx, js, l.spec.Stream, a.LiveSeq)
	l.closed = closed
	return l, err
}

func (l *live) done() bool { return l.closed }

func (l *live) config(ctx context.Context) (session.AudioConfig, error) {
	if err := audio.CheckRate("live.sample_rate", l.spec.Format, l.spec.SampleRate); err != nil {
		return session.AudioConfig{}, err
	}
	if l.source == nil {
		source, err := audio.OpenLive(ctx, l.js, l.spec)
		if err != nil {
			return session.AudioConfig{}, err
		}
		l.source = source
	}
	return session.AudioConfig{SampleRate: l.spec.SampleRate, Format: format(l.spec.Format)}, nil
}

func (l *live) next(ctx context.Context) (*utterance, error) {
	if l.source.Closed() {
		return nil, nil //nolint:nilnil // nil means that no utterance is left
	}
	begun, err := l.source.Begin(ctx)
	if err != nil || !begun {
		return nil, err
	}
	return &utterance{speech: l.source, liveBegun: l.source.Begun(), liveLast: l.source.Last, interrupted: l.source.Skip, release: func() {}}, nil
}

func (l *live) close() {
	if l.source != nil {
		l.source.Close()
	}
}
