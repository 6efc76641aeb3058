package attempt

import (
	"context"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
)

// catchUp looks at the job's last stored frame: a worker that died between the
// last frame of an utterance and the checkpoint has spoken it all the same.
func (r *Runner) catchUp(ctx context.Context, a *jobs.Attempt) error {
	if a.PreviousSession == 0 || a.Job.OutputKind() != jobspec.OutputFrames || a.Job.Resume() == jobspec.OnRedeliveryRestart {
		return nil
	}
	last, found, err := r.finished(ctx, a)
	if err != nil {
		if ctx.Err() == nil {
			err = &output.StorageError{Store: r.o.Names.FramesStream(), Err: err}
		}
		return errors.Wrap(errors.CodeInternal, errors.PhaseJob, err, "look at the frames of the session before")
	}
	if !found {
		return nil
	}
	spoken := event.Utterance{ReqID: last.ReqID}
	if a.Job.GetLive() != nil {
		if spoken.LiveSeq, err = audio.EndOfUtterance(ctx, r.o.JS, liveSpec(r.o.Names, a)); err != nil {
			return err
		}
		a.LiveSeq, a.LiveBegun = spoken.LiveSeq, 0
	}
	if err := a.Progress.Delivered(ctx, spoken); err != nil {
		return err
	}
	a.Checkpoint++
	return nil
}

// finished finds the last frame of the utterance after the checkpoint.
func (r *Runner) finished(ctx context.Context, a *jobs.Attempt) (output.LastFrame, bool, error) {
	subject := r.o.Names.Frames(a.Job.ID)
	last, found, err := output.Last(ctx, r.o.JS, r.o.Names.FramesStream(), subject)
	if err != nil || !found || last.Run != a.Job.Run || !last.End || last.Utterance != a.Checkpoint+1 {
		return last, false, err
	}
	if a.Job.GetLive() != nil && a.LiveBegun == 0 {
		return last, false, nil // which speech it was is not known
	}
	if last.Session == a.PreviousSession {
		return last, true, nil
	}
	// The sessions in between have stored nothing; or this one was superseded,
	// and everybody who listens has dropped the frame.
	superseded, err := output.Superseded(ctx, r.o.JS, r.o.Names.FramesStream(), subject, last)
	return last, !superseded, err
}
