package app_test

import (
	"testing"

	"avatarworker/internal/config"
)

// Labels may be any text, so the limit has a name that no key of a bucket could
// have.
func TestTheFleetKeepsToTheConfiguredSessionLimits(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	for range 2 {
		f.worker(worker{config: func(c *config.Config) {
			c.Limits = []config.SessionLimit{{Key: "label.room no.", Max: 1}}
		}})
	}
	in := func(room string, more fields) fields {
		more["labels"] = fields{"room no.": room}
		return more
	}
	f.publish("first", "ok", in("blue room", live("20s")))
	f.event("first", "started")
	f.publish("second", "ok", in("blue room", fields{}))
	f.publish("elsewhere", "ok", in("red room", fields{}))
	f.publish("unlimited", "ok", fields{})
	f.outcome("elsewhere")
	f.outcome("unlimited")
	if got := f.all(f.names.EventsStream(), f.names.Events("started", "second")); len(got) > 0 {
		t.Error("two sessions of one room at once")
	}
	f.control("first", "cancel")
	f.outcome("second")
}
