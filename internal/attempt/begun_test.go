package attempt

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
	"avatarworker/internal/session"
)

// notes counts what is recorded.
type notes struct {
	jobs.Progress
	spoken atomic.Int32
	err    error
}

// Speaking implements jobs.Progress.
func (n *notes) Speaking(context.Context, int, uint64) error { n.spoken.Add(1); return n.err }

// FirstFrame implements jobs.Progress.
func (n *notes) FirstFrame() {}

// recorder looks whether the beginning is being recorded as a frame is stored.
type recorder struct {
	output.Sink
	written func()
}

// Write implements output.Sink.
func (r recorder) Write(context.Context, output.Envelope) error { r.written(); return nil }

func liveRun(t *testing.T, n *notes, redelivery string, written func()) *run {
	job := &jobspec.Job{Job: &jobpb.Job{OnRedelivery: redelivery}}
	return &run{ctx: t.Context(), a: &jobs.Attempt{Job: job, Progress: n}, utterance: &utterance{liveBegun: 7}, sink: recorder{written: written}}
}

// Once an utterance's last frame is stored, a later session must find where its
// speech began, or it would speak it again.
func TestTheBeginningOfLiveSpeechIsRecordedBesideTheFirstFrame(t *testing.T) {
	for name, c := range map[string]struct {
		frames []bool // whether each is the last
		before int32  // recorded when the last is stored
	}{
		"one frame":  {[]bool{true}, 1},
		"two frames": {[]bool{false, true}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, seen := &notes{}, []int32{}
				p := liveRun(t, n, "", func() {
					synctest.Wait()
					seen = append(seen, n.spoken.Load())
				})
				if err := p.begin(); err != nil {
					t.Fatal(err)
				}
				for _, end := range c.frames {
					if err := p.frame(1, p.begun, session.Frame{End: end}); err != nil {
						t.Fatal(err)
					}
				}
				if err := p.begun.wait(); err != nil || n.spoken.Load() != 1 {
					t.Errorf("recorded %d times: %v", n.spoken.Load(), err)
				}
				if got := seen[len(seen)-1]; got != c.before || len(seen) == 2 && seen[0] != 0 {
					t.Errorf("recorded before each frame: %v", seen)
				}
			})
		})
	}
}

func TestTheBeginningOfLiveSpeechWithoutFramesIsRecordedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &notes{err: errors.New("the record is gone")}
		p := liveRun(t, n, "", nil)
		if err := p.begin(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(begunAfter) //nolint:forbidigo // fake clock
		synctest.Wait()
		if n.spoken.Load() != 1 {
			t.Error("not recorded")
		}
		if err := p.begun.wait(); !errors.Is(err, n.err) {
			t.Error(err)
		}
	})
}

// Speech that ends before anything was recorded needs no record of its beginning:
// that of its end follows.
func TestSpeechThatIsOverIsNotRecordedAsBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &notes{}
		p := liveRun(t, n, "", nil)
		if err := p.begin(); err != nil {
			t.Fatal(err)
		}
		if err := p.begun.wait(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * begunAfter) //nolint:forbidigo // fake clock
		p.begun.start()
		synctest.Wait()
		if n.spoken.Load() != 0 {
			t.Error("recorded after its end")
		}
	})
}

func TestSpeechThatMayNotBeSpokenTwiceIsRecordedBeforeItIsSent(t *testing.T) {
	n := &notes{}
	p := liveRun(t, n, jobspec.OnRedeliveryGiveUp, nil)
	if err := p.begin(); err != nil || n.spoken.Load() != 1 {
		t.Errorf("recorded %d times: %v", n.spoken.Load(), err)
	}
}
