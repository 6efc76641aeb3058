package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fleet"
	"avatarworker/internal/jobs/jobspec"
)

// liveSpeech is speech that is published while the job runs. nil is none.
type liveSpeech struct {
	speech   *audio.Speech
	opener   *audio.Opener
	realtime bool // publish it no faster than it is spoken
}

// openLive opens the speech of --live and says in the job what it is.
func (c *cli) openLive(ctx context.Context, s *submission, doc *document) (*liveSpeech, error) {
	if s.live == "" {
		return nil, nil //nolint:nilnil // there is none
	}
	if doc.fields == nil {
		return nil, usagef("--live needs a job that is a JSON object")
	}
	var (
		live *liveSpeech
		err  error
	)
	if s.live == "-" {
		live, err = c.liveInput(ctx, s, doc)
	} else {
		live, err = liveFile(ctx, s)
	}
	if err != nil {
		return nil, err
	}
	spec := map[string]any{"sample_rate": live.speech.SampleRate(), "format": jobspec.FormatPCM}
	if live.speech.Format() == audio.OggOpus {
		spec["format"] = jobspec.FormatOggOpus
	}
	if s.maxSilence != "" {
		spec["max_silence"] = s.maxSilence
	}
	delete(doc.fields, "audio")
	delete(doc.fields, "utterances")
	doc.set("live", spec)
	doc.data = encode(doc.fields)
	return live, nil
}

// liveInput is raw PCM on stdin, which has its own pace.
func (c *cli) liveInput(ctx context.Context, s *submission, doc *document) (*liveSpeech, error) {
	rate := s.sampleRate
	if rate == 0 {
		var spec struct {
			SampleRate int `json:"sample_rate"`
		}
		if json.Unmarshal(doc.fields["live"], &spec) == nil {
			rate = spec.SampleRate
		}
	}
	if rate == 0 {
		return nil, usagef("--live -: raw PCM needs --sample-rate")
	}
	if s.format != "" && s.format != jobspec.FormatPCM {
		return nil, usagef("--live - takes raw PCM (%s) only; give a file for %s", jobspec.FormatPCM, s.format)
	}
	speech, err := audio.NewPCM(interruptible(ctx, c.stdin), rate)
	if err != nil {
		return nil, fmt.Errorf("--live -: %w", err)
	}
	return &liveSpeech{speech: speech}, nil
}

// interruptible reads r until ctx ends, also while a read of r waits. That read
// can't be waited for then: it ends with its input, or with the process.
func interruptible(ctx context.Context, r io.Reader) io.ReadCloser {
	out, in := io.Pipe()
	context.AfterFunc(ctx, func() { _ = in.CloseWithError(context.Cause(ctx)) }) // never fails
	go func() {
		_, err := io.Copy(in, r)
		_ = in.CloseWithError(err) // never fails; nil is the end
	}()
	return out
}

func liveFile(ctx context.Context, s *submission) (*liveSpeech, error) {
	data, err := os.ReadFile(s.live)
	if err != nil {
		return nil, err
	}
	opener := audio.New(audio.Options{MaxBytes: int64(len(data)) + 1})
	speech, err := opener.Open(ctx, audio.Spec{
		Inline: data, HasInline: true, Format: s.format, SampleRate: s.sampleRate, Field: speechField,
	})
	if err != nil {
		opener.Close()
		return nil, fmt.Errorf("--live %s: %s", s.live, inFlags(err))
	}
	return &liveSpeech{speech: speech, opener: opener, realtime: s.pace == "realtime"}, nil
}

func (v *liveSpeech) close() {
	if v == nil {
		return
	}
	_ = v.speech.Close() // it was only read
	if v.opener != nil {
		v.opener.Close()
	}
}

// publish publishes the speech to its end, and then the session's end: also
// when it is interrupted, for a session that waits for speech is paid for.
func (v *liveSpeech) publish(ctx context.Context, l *link, jobID string) error {
	if v == nil {
		return nil
	}
	subject := l.names.Audio(jobID)
	err := v.chunks(ctx, l, subject)
	last := nats.NewMsg(subject)
	last.Header.Set(audio.HeaderEnd, "true")
	last.Header.Set(audio.HeaderClose, "true")
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTry)
	defer cancel()
	if _, endErr := l.js.PublishMsg(short, last); endErr != nil && err == nil {
		err = fmt.Errorf("publishing the end of the speech on %s: %w", subject, endErr)
	}
	return err
}

func (v *liveSpeech) chunks(ctx context.Context, l *link, subject string) error {
	start := time.Now()
	var spoken time.Duration
	for {
		data, length, err := v.speech.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("--live: %w", err)
		}
		if err := v.due(ctx, start.Add(spoken)); err != nil {
			return err
		}
		spoken += length
		if _, err := l.js.Publish(ctx, subject, data); err != nil {
			return l.publishLiveError(err, subject)
		}
	}
}

func (l *link) publishLiveError(err error, subject string) error {
	if errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrNoStreamResponse) {
		return fmt.Errorf("no stream takes live speech on %s", subject)
	}
	return fmt.Errorf("publishing speech on %s: %w", subject, err)
}

// due waits until a chunk's time has come.
func (v *liveSpeech) due(ctx context.Context, at time.Time) error {
	if !v.realtime {
		return ctx.Err()
	}
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serves reads a worker's presence, stored at that time, and reports whether it
// serves the queue.
func serves(presence []byte, queue string, stored, now time.Time) (p fleet.Presence, ok bool) {
	if json.Unmarshal(presence, &p) != nil {
		return p, false
	}
	_, has := p.Queues[queue]
	return p, has && !p.Draining && fleet.Fresh(stored, now)
}
