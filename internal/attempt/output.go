package attempt

import (
	"context"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/output"
)

// sink returns where the envelopes of a job with this kind of output go. A kind
// that is not known here is an error, before a session is opened: with any other
// answer the job would complete and its frames be lost.
func (r *Runner) sink(kind string, a *jobs.Attempt) (output.Sink, error) {
	switch kind {
	case jobspec.OutputFrames:
		id := output.SessionID{JobID: a.Job.ID, Run: a.Job.Run, Session: a.Session, Attempt: a.Number}
		return output.NewFrames(r.o.JS, r.o.Names.Frames(a.Job.ID), id), nil
	case jobspec.OutputObject:
		return r.recordings.Sink(recording(a.Job), a.Session, a.Checkpoint, (*output.Checkpoint)(a.Recorded)), nil
	case jobspec.OutputLiveKit, jobspec.OutputAgora, jobspec.OutputDiscard:
		return output.Discard{}, nil
	default:
		return nil, unknownOutput(kind)
	}
}

func unknownOutput(kind string) error {
	return errors.Newf(errors.CodeInternal, errors.PhaseJob, "internal/attempt does not know the output %q, so its frames have no place to go; this is a fault of the worker: report it", kind)
}

// egress reports whether the backend publishes into a room, so that no frames
// come back.
func egress(job *jobspec.Job) bool {
	kind := job.OutputKind()
	return kind == jobspec.OutputLiveKit || kind == jobspec.OutputAgora
}

// Finish implements jobs.Runner. It publishes the recording of a completed job,
// and removes that of any other job.
func (r *Runner) Finish(ctx context.Context, job *jobspec.Job, f jobs.Finished) error {
	return r.finish(ctx, job.OutputKind(), job, f)
}

func (r *Runner) finish(ctx context.Context, kind string, job *jobspec.Job, f jobs.Finished) error {
	switch kind {
	case jobspec.OutputObject:
		return r.finishRecording(ctx, job, f)
	case jobspec.OutputFrames, jobspec.OutputLiveKit, jobspec.OutputAgora, jobspec.OutputDiscard:
		return nil // nothing is left to do
	default:
		return unknownOutput(kind)
	}
}

func (r *Runner) finishRecording(ctx context.Context, job *jobspec.Job, f jobs.Finished) error {
	if f.Outcome != lifecycle.StateCompleted {
		return r.recordings.Sweep(ctx, recording(job))
	}
	var at output.Checkpoint
	if f.Recorded != nil {
		at = output.Checkpoint(*f.Recorded)
	}
	err := r.recordings.Publish(ctx, recording(job), f.Session, f.Utterances, at)
	var taken *output.TakenError
	if errors.Is(err, output.ErrChunksMissing) || errors.As(err, &taken) {
		// The chunks were removed or have aged out, or another object has the
		// name: waiting would not help.
		r.o.Logger.Error().Err(err).Str("job_id", job.ID).Int("run", job.Run).Msg("the job is done, but its recording can't be published any more; it is removed")
		return r.recordings.Sweep(ctx, recording(job))
	}
	return err
}

func recording(job *jobspec.Job) output.Recording {
	return output.Recording{
		Name: job.RecordingName(), JobID: job.ID, Run: job.Run, StreamSeq: job.StreamSeq, Published: job.Published,
	}
}
