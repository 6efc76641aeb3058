package circuit

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/errors"
)

func TestEveryCircuitThatOpensIsPublished(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.run(c)
	e.run(e.worker("w2"))
	const apps = 400
	var wg sync.WaitGroup
	for i := range apps {
		wg.Go(func() {
			p, _, err := c.Allow(t.Context(), fmt.Sprint("app-", i), region, "j")
			if err != nil {
				t.Error(err)
				return
			}
			if _, open, err := p.Fail(t.Context(), unpaid); err != nil || !open {
				t.Error(open, err)
			}
		})
	}
	wg.Wait()
	e.eventually("all are published", func() bool { return len(e.alerts()) == apps })
	e.eventually("all are cleared", func() bool {
		for i := range apps {
			if len(e.stored(fmt.Sprint("app-", i), region).Unpublished) != 0 {
				return false
			}
		}
		return true
	})
	if got := e.alerts()[0]; got.Kind != AlertOpened || got.Code != errors.CodeCreditsExhausted || got.Failures != 1 || got.Cooldown != 10*time.Second || got.Region != region || got.At.IsZero() || !got.At.Equal(got.OpenedAt) {
		t.Errorf("%+v", got)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, n := range e.published {
		if n != 1 {
			t.Errorf("%s published %d times", id, n)
		}
	}
}

func TestAlertsWaitForTheEventsStream(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.breakEvents(errors.New("no stream"))
	c := e.worker("w1")
	e.run(c)
	e.open(c)
	if ttl := e.ttl(app, region); ttl != "" {
		t.Errorf("an entry with something to publish expires after %s", ttl)
	}
	e.pass(10 * time.Second)
	e.success(e.probe(c, "good"))
	if got := e.stored(app, region); got.State != Closed || len(got.Unpublished) != 2 {
		t.Fatalf("%+v", got)
	}
	e.pass(48 * time.Hour)
	e.breakEvents(nil)
	e.eventually("both are published", func() bool { return len(e.alerts()) == 2 })
	a := e.alerts()
	if a[0].Kind != AlertOpened || a[1].Kind != AlertClosed || !a[1].OpenedAt.Equal(a[0].OpenedAt) || !a[1].At.After(a[0].At) || a[1].Code != errors.CodeCreditsExhausted {
		t.Errorf("%+v", a)
	}
	e.eventually("they are cleared", func() bool { return len(e.stored(app, region).Unpublished) == 0 })
	if ttl := e.ttl(app, region); ttl != "3600" && ttl != "1h0m0s" {
		t.Errorf("kept for %q", ttl)
	}
}

func TestAlertOfAWorkerThatDiedIsPublishedByTheNext(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ before, closes bool }{
		"one that is there":      {before: true},
		"one that starts later":  {},
		"closed again meanwhile": {closes: true},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			dies, next := e.worker("w1"), e.worker("w2")
			if tc.before {
				e.run(next)
			}
			e.open(dies)
			want := 1
			if tc.closes {
				e.pass(10 * time.Second)
				e.success(e.probe(dies, "good"))
				want = 2
			}
			if !tc.before {
				e.run(next)
			}
			e.eventually("it is known", func() bool { return next.get(key(app, region)).revision != 0 })
			if n := len(e.alerts()); n != 0 {
				t.Fatalf("%d alerts are not left to the worker that changed the circuit", n)
			}
			e.pass(3*publishPause + time.Second)
			e.eventually("it is published", func() bool { return len(e.alerts()) == want })
			e.eventually("it is cleared", func() bool { return len(e.stored(app, region).Unpublished) == 0 })
		})
	}
}

func TestUnpublishedAlertsAreBounded(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	for range maxUnpublished {
		e.pass(time.Hour)
		p, _ := e.allow(c, "j")
		if _, _, err := p.Fail(t.Context(), unpaid); err != nil {
			t.Fatal(err)
		}
		e.pass(time.Hour)
		e.success(e.probe(c, "good"))
	}
	if n := len(e.stored(app, region).Unpublished); n != maxUnpublished {
		t.Errorf("%d kept", n)
	}
}
