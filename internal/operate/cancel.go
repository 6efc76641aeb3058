package operate

import (
	"context"
	"fmt"

	"avatarworker/internal/jobs/control"
	"avatarworker/internal/jobs/lifecycle"
)

// Cancel ends a job, running or not. It records the request and asks the worker that
// runs the job. A job that has no record and waits in no queue has the status
// StatusUnknown and nothing is changed, unless ifUnknown asks to note the cancel for a
// job that is still to come.
func (o *Operator) Cancel(ctx context.Context, jobID string, ifUnknown bool) (control.Reply, error) {
	if !ifUnknown {
		unknown, err := o.unknown(ctx, jobID)
		if err != nil || unknown {
			return control.Reply{JobID: jobID, Status: StatusUnknown, Message: "no record and no waiting job has this id"}, err
		}
	}
	state, err := lifecycle.NoteCancel(ctx, o.records, jobID, o.now())
	if err != nil {
		return control.Reply{}, fmt.Errorf("cancelling job %s: %w", jobID, err)
	}
	if state == lifecycle.StateRunning {
		if reply, ok := control.AskCancel(ctx, o.nc, o.names.Control(jobID)); ok {
			return reply, nil
		}
	}
	reply := control.CancelReply(string(state), state.Final())
	reply.JobID = jobID
	return reply, nil
}

// unknown reports whether a job has no record and waits in no queue. It returns false if
// the queues can't be read, or not all of them in time: then the cancel is noted.
func (o *Operator) unknown(ctx context.Context, jobID string) (bool, error) {
	if recorded, err := o.recorded(ctx, jobID); err != nil || recorded {
		return false, err
	}
	found, looked, err := o.status.Waiting(ctx, jobID)
	if err != nil || found != nil || !looked.All {
		return false, nil //nolint:nilerr // to note it is the safe side
	}
	recorded, err := o.recorded(ctx, jobID) // a worker may have taken it meanwhile
	return !recorded && err == nil, err
}

func (o *Operator) recorded(ctx context.Context, jobID string) (bool, error) {
	revision, err := o.records.Get(ctx, jobID, new(lifecycle.Record))
	if err != nil {
		return false, fmt.Errorf("record of job %s: %w", jobID, err)
	}
	return revision != 0, nil
}
