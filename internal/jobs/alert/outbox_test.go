package alert

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
)

// A permission may be missing for one kind of alerts.
func TestAlertThatCannotBePublishedKeepsNoOtherWaiting(t *testing.T) {
	t.Parallel()
	published, tries := make(chan string, 10), make(chan struct{}, 100)
	b := NewOutbox(OutboxOptions{
		Stored: func(context.Context, event.Event, time.Time) (bool, error) { return false, nil },
		Publish: func(_ context.Context, ev event.Event) (bool, error) {
			alert, _ := ev.Body.(event.WorkerAlert)
			if alert.Kind == event.AlertBudget {
				tries <- struct{}{}
				return false, errors.New("not permitted")
			}
			published <- alert.Kind
			return true, nil
		},
		Raised: func(string, errors.Code) {}, WorkerID: func() string { return "w-1" }, Now: time.Now, Log: zerolog.Nop(),
	})
	b.Alert(event.WorkerAlert{Kind: event.AlertBudget}, "a")
	b.Alert(event.WorkerAlert{Kind: event.AlertStorage}, "b")
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { b.Run(ctx) })
	defer running.Wait()
	defer cancel()
	select {
	case kind := <-published:
		if kind != event.AlertStorage {
			t.Errorf("got %s", kind)
		}
	case <-time.After(waitTime):
		t.Error("never published")
	}
	for range 2 {
		select {
		case <-tries:
		case <-time.After(waitTime):
			t.Fatal("it is not tried again")
		}
	}
}
