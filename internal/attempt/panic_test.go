package attempt

import (
	"context"
	"io"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wantPanicError checks that a panic became an error of the worker's own.
func wantPanicError(t *testing.T, err error) {
	t.Helper()
	var e *errors.Error
	if !errors.As(err, &e) || e.Code != errors.CodeInternal || e.Phase != errors.PhaseAudio || !strings.Contains(e.Message, "panic: oops") {
		t.Errorf("got %v", err)
	}
}

func TestAFaultInOpeningSpeechFailsItsJobAlone(t *testing.T) {
	opener := audio.New(audio.Options{
		DefaultBucket: "B",
		Objects:       func(context.Context, string, string) (io.ReadCloser, int64, error) { panic("oops") },
	})
	defer opener.Close()
	c := &clips{opener: opener, specs: []audio.Spec{{Object: "o", Field: "audio"}}}
	c.ctx, c.cancel = context.WithCancel(t.Context())
	defer c.close()
	_, err := c.config(t.Context())
	wantPanicError(t, err)
}

// panickingProgress is progress that can't be noted.
type panickingProgress struct{ jobs.Progress }

// Speaking implements jobs.Progress.
func (panickingProgress) Speaking(context.Context, int, uint64) error { panic("oops") }

func TestAFaultInNotingLiveSpeechFailsItsJobAlone(t *testing.T) {
	p := &run{ctx: t.Context(), a: &jobs.Attempt{Progress: panickingProgress{}}, utterance: &utterance{liveBegun: 1}}
	if err := p.begin(); err != nil {
		t.Fatal(err)
	}
	wantPanicError(t, p.begunStored())
}
