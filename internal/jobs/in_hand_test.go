package jobs_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"avatarworker/internal/jobs"
	"avatarworker/internal/natsserver/natstest"
)

// places observes busy and free places only.
type places struct {
	nopObserver
	reported chan [2]int
}

func (p places) SlotsBusy(busy, all int) {
	select {
	case p.reported <- [2]int{busy, all}:
	default: // only the first is looked at
	}
}

func TestAWorkerWithoutJobsReportsItsFreePlaces(t *testing.T) {
	h := newEnv(t)
	reported := make(chan [2]int, 1)
	h.start(runnerFunc(nil), func(o *options) { o.Observer, o.Concurrency = places{reported: reported}, 7 })
	select {
	case got := <-reported:
		if got != [2]int{0, 7} {
			t.Errorf("%d of %d places are busy", got[0], got[1])
		}
	case <-time.After(natstest.Patience):
		t.Error("nothing was observed")
	}
}

// unacknowledged is how many messages of the queue are in hand.
func (h *env) unacknowledged() int {
	h.t.Helper()
	c, err := h.handles.Jobs.Consumer(h.t.Context(), "default")
	if err != nil {
		h.t.Fatal(err)
	}
	return c.CachedInfo().NumAckPending
}

// While the outcome of a job can't be published it is not acknowledged, so jobs are in hand
// as long as the bound allows.
func TestAWorkerHasNoMoreJobsInHandThanAllowed(t *testing.T) {
	for _, c := range []struct{ inHand, want int }{{0, 4}, {2, 2}, {3, 3}} {
		t.Run(fmt.Sprint(c.inHand), func(t *testing.T) {
			h := newEnv(t)
			empty := h.full(h.names.EventsStream())
			h.fill("default", 20)
			h.start(runnerFunc(func(context.Context, *jobs.Attempt) error { return nil }), func(o *options) {
				o.Concurrency, o.InHand, o.AckWait = 2, c.inHand, 20*time.Second
			})
			h.eventually("as many as allowed", func() bool { return h.unacknowledged() == c.want })
			h.stays(300*time.Millisecond, "no more than that", func() bool { return h.unacknowledged() <= c.want })
			empty()
			h.settled()
		})
	}
}

func TestFewerJobsInHandThanSessionsAreRefused(t *testing.T) {
	h := newEnv(t)
	if _, err := jobs.New(t.Context(), jobs.Options{
		Stores: jobs.Stores{JS: h.js, State: h.handles.State}, Profile: jobs.Profile{Concurrency: 2, InHand: 1},
	}); err == nil || !strings.Contains(err.Error(), "InHand") {
		t.Error(err)
	}
}

// A delivery that finds its outcome written repeats what follows from it, also where
// there is no place beside the slots.
func TestWhatFollowsIsRepeatedInASlotWhereThereIsNoOtherPlace(t *testing.T) {
	h := newEnv(t)
	empty := h.full(h.names.EventsStream())
	one := func(o *options) { o.Concurrency, o.InHand, o.SettleTimeout = 1, 1, 300*time.Millisecond }
	h.fill("default", 1)
	h.start(runnerFunc(func(context.Context, *jobs.Attempt) error { return nil }), one)
	h.eventually("an outcome, and its job handed back", func() bool { return h.delivered() > 1 })
	empty()
	h.settled()
}
