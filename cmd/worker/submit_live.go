package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"avatarworker/internal/audio"
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

// publish publishes the speech of a live job to its end.
func (v *liveSpeech) publish(ctx context.Context, l *link, jobID string) error {
	if v == nil {
		return nil
	}
	return l.client.Speak(ctx, jobID, v.speech, v.realtime)
}
