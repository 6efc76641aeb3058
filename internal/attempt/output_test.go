package attempt

import (
	"testing"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/output"
)

func TestEveryOutputHasASinkAndAnUnknownOneIsAnError(t *testing.T) {
	keeps := map[string]bool{ // whether a sink of ours keeps its frames
		jobspec.OutputFrames: true, jobspec.OutputObject: true,
		jobspec.OutputLiveKit: false, jobspec.OutputAgora: false, jobspec.OutputDiscard: false,
	}
	r := New(Options{JS: natstest.JetStream(t)})
	job := &jobspec.Job{Job: &jobpb.Job{}, ID: "j"}
	a := &jobs.Attempt{Job: job, Session: 1, Number: 1}
	for _, kind := range jobspec.Outputs() {
		sink, err := r.sink(kind, a)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		_, dropped := sink.(output.Discard)
		if kept, listed := keeps[kind]; !listed || kept == dropped {
			t.Errorf("%s: frames go to %T; keeps says %v (there: %v)", kind, sink, kept, listed)
		}
		if kind == jobspec.OutputObject {
			continue // app's tests finish what needs a store
		}
		if err := r.finish(t.Context(), kind, job, jobs.Finished{Outcome: lifecycle.StateCompleted}); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
	for _, kind := range []string{"", "nowhere"} {
		_, err := r.sink(kind, a)
		if e := errors.Of(err); err == nil || e.Code != errors.CodeInternal {
			t.Errorf("the output %q: %v", kind, err)
		}
		if err := r.finish(t.Context(), kind, job, jobs.Finished{Outcome: lifecycle.StateCompleted}); err == nil {
			t.Errorf("the output %q is finished", kind)
		}
	}
}
