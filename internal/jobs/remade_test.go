package jobs_test

import (
	"context"
	"testing"

	"avatarworker/internal/jobs"
)

// A worker whose places are all taken has no request under way that would fail
// when the stream goes.
func TestJobsWithoutAnIDRunInAStreamThatWasMadeAgain(t *testing.T) {
	t.Parallel()
	for name, concurrency := range map[string]int{"fetching": 16, "busy": 1} {
		t.Run(name, func(t *testing.T) {
			h := newEnv(t)
			began, leave := make(chan struct{}, 8), make(chan struct{})
			s := &script{run: func(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
				if a.Job.ID == "last" {
					began <- struct{}{}
					<-leave
				}
				return speakAll(ctx, a)
			}}
			h.start(s, impatient, func(o *options) { o.Concurrency = concurrency })
			h.submit("default", job(""))
			h.submit("default", job(""))
			h.settled()
			h.submit("default", job("last"))
			receive(t, began, "session")
			if err := h.js.DeleteStream(t.Context(), h.names.JobsStream()); err != nil {
				t.Fatal(err)
			}
			h.ensure()
			h.submit("default", job(""))
			h.submit("default", job(""))
			close(leave)
			h.settled()
			if got := s.ran(); len(got) != 5 {
				t.Errorf("of 5 jobs ran %v", got)
			}
		})
	}
}
