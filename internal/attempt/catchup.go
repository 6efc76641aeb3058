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

// catchUp moves the checkpoint past an utterance whose last frame is stored. A
// worker that dies after storing that frame and before moving the checkpoint has
// delivered it.
func (r *Runner) catchUp(ctx context.Context, a *jobs.Attempt) error {
	if a.PreviousSession == 0 || a.Job.OutputKind() != jobspec.OutputFrames || a.Job.RedeliveryPolicy() == jobspec.OnRedeliveryRestart {
		return nil
	}
	last, found, err := r.finished(ctx, a)
	if err != nil {
		if ctx.Err() == nil {
			err = &output.StorageError{Store: r.o.Names.FramesStream(), Err: err}
		}
		return errors.Wrap(errors.CodeInternal, errors.PhaseJob, err, "read the frames of the previous session")
	}
	if !found {
		return nil
	}
	delivered := event.Utterance{ReqID: last.ReqID}
	if a.Job.GetLive() != nil {
		if delivered.LiveSeq, err = audio.EndOfUtterance(ctx, r.o.JS, liveSpec(r.o.Names, a)); err != nil {
			return err
		}
		a.LiveSeq, a.LiveBegun = delivered.LiveSeq, 0
	}
	if err := a.Progress.Delivered(ctx, delivered); err != nil {
		return err
	}
	a.Checkpoint++
	return nil
}

// finished returns the last frame of the utterance after the checkpoint, if it is
// stored.
func (r *Runner) finished(ctx context.Context, a *jobs.Attempt) (output.LastFrame, bool, error) {
	subject := r.o.Names.Frames(a.Job.ID)
	last, found, err := output.Last(ctx, r.o.JS, r.o.Names.FramesStream(), subject)
	if err != nil || !found || last.Run != a.Job.Run || !last.End || last.Utterance != a.Checkpoint+1 {
		return last, false, err
	}
	if a.Job.GetLive() != nil && a.LiveBegun == 0 {
		return last, false, nil // the live messages of this utterance are unknown
	}
	if last.Session == a.PreviousSession {
		return last, true, nil
	}
	// Either the sessions in between stored nothing, or a later one superseded
	// this session and listeners dropped the frame.
	superseded, err := output.Superseded(ctx, r.o.JS, r.o.Names.FramesStream(), subject, last)
	return last, !superseded, err
}
