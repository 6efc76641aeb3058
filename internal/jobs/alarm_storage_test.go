package jobs_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
)

// The duplicate window of the stream is much shorter here than the time in which
// alerts about one thing are one.
func TestStorageThatIsFullIsOneAlertHoweverManyJobsWait(t *testing.T) {
	h := newEnv(t)
	config := h.handles.Events.CachedInfo().Config
	config.Duplicates = 100 * time.Millisecond
	if _, err := h.js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	full := func(o *options) {
		o.Storage = fullStore{}
	}
	workers := []*worker{h.start(&script{}, full), h.start(&script{}, full)}
	begin := time.Now()
	for n := 0; time.Since(begin) < 400*time.Millisecond; n++ {
		id := fmt.Sprint("j", n)
		h.submit("default", job(id))
		h.state(id, lifecycle.StateHeld)
	}
	for _, w := range workers {
		w.end()
	}
	alerts := len(h.events(h.names.Alerts(event.AlertStorage, jobspec.OutputFrames)))
	if alerts != 1 && alerts != 2 { // two where five minutes ended meanwhile
		t.Errorf("%d alerts", alerts)
	}
}

// fullStore takes nothing.
type fullStore struct{}

func (fullStore) Reserve(context.Context, *jobspec.Job, int) error {
	return errors.New("the bucket is full")
}
func (fullStore) Started(*jobspec.Job)      {}
func (fullStore) Ended(*jobspec.Job, error) {}
func (fullStore) Err() error                { return nil }
func (fullStore) DistrustLedger()           {}
