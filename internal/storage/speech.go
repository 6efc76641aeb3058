package storage

import (
	"context"
	"time"

	"avatarworker/internal/audio"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
)

// unknownSpeech stands for speech whose length is not known beforehand. A
// stream without space for as much is full.
const unknownSpeech = 30 * time.Second

// estimate is about how many bytes the job still stores, and how many it makes in
// all. Of speech whose length is not known, all counts nothing.
func (s *Storage) estimate(ctx context.Context, job *jobspec.Job, done int, ampleSpace bool) (left, all int64) {
	var leftTime, allTime time.Duration
	specs := job.AudioSpecs()
	if len(specs) == 0 { // live
		leftTime = unknownSpeech
	}
	for i, spec := range specs {
		length, known := s.length(ctx, spec, ampleSpace)
		if known {
			allTime += length
		}
		if i >= done {
			leftTime += length
		}
	}
	return output.EstimateBytes(leftTime), output.EstimateBytes(allTime)
}

// length is that of one utterance's speech, where that can be found out without
// fetching it.
func (s *Storage) length(ctx context.Context, spec jobspec.AudioSpec, ampleSpace bool) (length time.Duration, known bool) {
	if spec.URL != "" || ampleSpace && !spec.HasInline {
		return unknownSpeech, false
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	speech, err := s.speech.Open(ctx, audio.Spec{
		Inline: spec.Inline, HasInline: spec.HasInline, Object: spec.Object, Format: spec.Format, SampleRate: spec.SampleRate, Field: spec.Field,
	})
	if err != nil {
		return 0, false // the attempt says what is wrong with it
	}
	defer func() { _ = speech.Close() }() // read as far as it is needed
	if length, known = speech.Total(); !known {
		return unknownSpeech, false
	}
	return length, true
}
