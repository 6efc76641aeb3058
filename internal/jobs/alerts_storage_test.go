package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
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

// saysStore takes nothing, and says why.
type saysStore struct {
	fullStore
	why *atomic.Value
}

func (s saysStore) Reserve(context.Context, *jobspec.Job, int) error {
	return errors.New(s.why.Load().(string))
}

func TestAHoldForStorageSaysWhatIsWrongNow(t *testing.T) {
	h := newEnv(t)
	var why atomic.Value
	why.Store("the bucket has 17 bytes left")
	h.start(&script{}, func(o *options) { o.Storage = saysStore{why: &why} })
	h.submit("default", job("j"))
	first := h.state("j", lifecycle.StateHeld)
	why.Store("the bucket was deleted")
	now := h.until("j", func(r *lifecycle.Record) bool { return strings.Contains(r.HeldWhy, "deleted") })
	if now.Holds != 1 || !now.HeldSince.Equal(*first.HeldSince) {
		t.Errorf("hold %d since %s, want the first since %s", now.Holds, now.HeldSince, first.HeldSince)
	}
	h.wantTypes("j", "held")
}
