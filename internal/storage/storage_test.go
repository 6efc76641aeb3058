package storage

import (
	"io"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestEveryOutputIsKnownToStorage(t *testing.T) {
	s := New(Options{JS: natstest.JetStream(t), Names: topology.Names{}})
	fills := map[string]bool{ // a stream or bucket of ours
		jobspec.OutputFrames: true, jobspec.OutputObject: true,
		jobspec.OutputLiveKit: false, jobspec.OutputAgora: false, jobspec.OutputDiscard: false,
	}
	seen := make(map[string]string)
	for _, kind := range jobspec.Outputs() {
		store, err := s.writes(kind)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if ours, listed := fills[kind]; !listed || ours != (store != nil) {
			t.Errorf("%s is written to %v; fills says %v (there: %v)", kind, store, ours, listed)
		}
		if store != nil {
			if other := seen[store.Name()]; other != "" {
				t.Errorf("%s and %s are both written to %s", kind, other, store.Name())
			}
			seen[store.Name()] = kind
		}
	}
	for _, kind := range []string{"", "nowhere"} {
		if store, err := s.writes(kind); err == nil {
			t.Errorf("the output %q is written to %v", kind, store)
		}
	}
}

// wellAgain is a stream that has just failed the session of the job "failed", while that
// of the job "before" ran, and is well again.
func wellAgain(t *testing.T) *stream {
	t.Helper()
	s := newStream(nil, "FRAMES")
	for _, job := range []string{"before", "failed"} {
		begin(t, s, job)
	}
	time.Sleep(time.Second) //nolint:forbidigo // fake clock
	s.End("failed", jobs.ErrStorage)
	if s.Reserve("next", 1, 1) == nil {
		t.Fatal("a stream at fault takes a job")
	}
	time.Sleep(firstPause) //nolint:forbidigo // fake clock
	s.err = nil            // Retry has looked at it
	return s
}

func begin(t *testing.T, s *stream, job string) {
	t.Helper()
	if err := s.Reserve(job, 1, 1); err != nil {
		t.Fatalf("%s: %v", job, err)
	}
	time.Sleep(time.Millisecond) //nolint:forbidigo // fake clock
	s.Begin(job)
}

func TestOneJobTriesAStreamThatIsWellAgainWhateverRanBeforeTheFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := wellAgain(t)
		if err := s.Reserve("first", 1, 1); err != nil {
			t.Fatalf("a session from before the fault holds the next job: %v", err)
		}
		if s.Reserve("second", 1, 1) == nil {
			t.Error("two jobs try a stream that has just failed a session")
		}
		s.Begin("first")
		if s.Reserve("second", 1, 1) == nil {
			t.Error("two jobs run on a stream that has just failed a session")
		}
		s.End("first", nil)
		begin(t, s, "second")
		begin(t, s, "third")
	})
}

func TestALongSessionThatTriesAStreamHoldsNoJobForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := wellAgain(t)
		begin(t, s, "conversation")
		time.Sleep(trialLife) //nolint:forbidigo // fake clock
		begin(t, s, "next")
		begin(t, s, "another")
		s.End("conversation", io.ErrUnexpectedEOF)
		begin(t, s, "last")
	})
}
