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

// script is the speech of a job from its checkpoint on, utterance by utterance.
type script interface {
	// finished tells whether nothing is left to be spoken, without opening
	// anything.
	finished() bool
	// config opens the first speech and says what the session is configured
	// with; it is called while the token is minted.
	config(ctx context.Context) (session.AudioConfig, error)
	// next gives the next utterance; nil: there is none.
	next(ctx context.Context) (*line, error)
	close()
}

// line is one utterance of a script.
type line struct {
	speech    session.Speech
	converted string        // what was done to the audio
	liveBegun uint64        // sequence of its first live message
	liveLast  func() uint64 // and of its last, once it is spoken
	done      func()        // lets go of what has been said
	// interrupted passes over what was said of it before the interrupt; nil:
	// the source is its own.
	interrupted func(ctx context.Context) error
}

func format(f audio.Format) session.Format {
	if f == audio.OggOpus {
		return session.FormatOggOpus
	}
	return session.FormatPCM
}

// clips is speech that is all there: inline, objects, URLs.
type clips struct {
	job    *jobspec.Job
	opener *audio.Opener
	life   context.Context // of everything opened
	end    context.CancelFunc
	specs  []audio.Spec // those not yet spoken
	said   int          // utterances of the job, those of earlier sessions among them
	first  *audio.Speech
	conf   session.AudioConfig
	ahead  chan opened // the next one, being opened; nil: none
}

type opened struct {
	speech *audio.Speech
	err    error
}

// newClips checks everything that can be checked before a session costs money.
func newClips(ctx context.Context, opener *audio.Opener, a *jobs.Attempt) (*clips, error) {
	c := &clips{job: a.Job, opener: opener, said: a.Checkpoint}
	c.life, c.end = context.WithCancel(ctx)
	if err := c.check(a); err != nil {
		c.end()
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
	return c.agree()
}

// agree refuses inline utterances that one session can't be configured for.
func (c *clips) agree() error {
	var first session.AudioConfig
	for i, spec := range c.specs {
		if !spec.HasInline || len(c.specs) == 1 {
			continue
		}
		speech, err := c.opener.Open(c.life, spec) // reads memory only
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
		if err := same(spec, conf, first); err != nil {
			return err
		}
	}
	return nil
}

func configOf(s *audio.Speech) session.AudioConfig {
	return session.AudioConfig{SampleRate: s.SampleRate(), Format: format(s.Format())}
}

// same refuses an utterance that the session is not configured for: it has one
// format and rate.
func same(spec audio.Spec, got, want session.AudioConfig) error {
	if got == want {
		return nil
	}
	return errors.Newf(errors.CodeInvalidJob, errors.PhaseAudio,
		"%s: %s; the utterances before it have %s, and a session has one format and rate. Bring them to the same, or send them as jobs of their own",
		spec.Field, describe(got), describe(want))
}

func describe(c session.AudioConfig) string {
	name := "PCM"
	if c.Format == session.FormatOggOpus {
		name = "Ogg Opus"
	}
	return name + " at " + itoa(c.SampleRate) + " Hz"
}

func (c *clips) finished() bool { return len(c.specs) == 0 }

func (c *clips) config(ctx context.Context) (session.AudioConfig, error) {
	if c.first == nil {
		c.openAhead()
		speech, err := c.opened(ctx)
		if err != nil {
			return session.AudioConfig{}, err
		}
		c.first, c.conf = speech, configOf(speech)
	}
	return c.conf, c.look(ctx)
}

// look opens each later utterance for its header: what is wrong with it is told
// before a session is paid for. A URL would be fetched twice; what is wrong there
// is told when its turn has come.
func (c *clips) look(ctx context.Context) error {
	for _, spec := range c.specs[1:] {
		if spec.URL != "" {
			continue
		}
		speech, err := c.opener.Open(ctx, spec)
		if err != nil {
			return err
		}
		err = same(spec, configOf(speech), c.conf)
		if closeErr := speech.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *clips) next(ctx context.Context) (*line, error) {
	if len(c.specs) == 0 {
		return nil, nil //nolint:nilnil // no more utterances, and that is no error
	}
	spec := c.specs[0]
	speech, err := c.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := same(spec, configOf(speech), c.conf); err != nil {
		return nil, errors.Join(err, speech.Close())
	}
	c.specs[0] = audio.Spec{}
	c.specs = c.specs[1:]
	c.openAhead()
	return &line{
		speech: speech, converted: speech.Converted(), liveLast: func() uint64 { return 0 },
		done: func() { c.done(speech) },
	}, nil
}

// done lets go of speech that was read to its end, or given up: the session may
// live on for long.
func (c *clips) done(speech *audio.Speech) {
	_ = speech.Close() // read as far as it will be
	c.said++
	c.job.DropInline(c.said)
	if len(c.specs) == 0 {
		c.specs = nil
		c.end()
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

// opened waits for what openAhead opens.
func (c *clips) opened(ctx context.Context) (*audio.Speech, error) {
	select {
	case got := <-c.ahead:
		c.ahead = nil
		return got.speech, got.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// openAhead opens the next utterance while this one is spoken: connected time
// in which nothing is said is paid for too.
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
		got.speech, got.err = c.opener.Open(c.life, spec)
	}()
}

func (c *clips) close() {
	c.end()
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
	over   bool // the publisher closed the session before this one
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
	// A session that only waits for its silence to end would be paid for.
	over, err := audio.Closes(ctx, js, l.spec.Stream, a.LiveSeq)
	l.over = over
	return l, err
}

func (l *live) finished() bool { return l.over }

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

func (l *live) next(ctx context.Context) (*line, error) {
	if l.source.Closed() {
		return nil, nil //nolint:nilnil // no more utterances, and that is no error
	}
	begun, err := l.source.Begin(ctx)
	if err != nil || !begun {
		return nil, err
	}
	return &line{speech: l.source, liveBegun: l.source.Begun(), liveLast: l.source.Last, interrupted: l.source.Skip, done: func() {}}, nil
}

func (l *live) close() {
	if l.source != nil {
		l.source.Close()
	}
}
