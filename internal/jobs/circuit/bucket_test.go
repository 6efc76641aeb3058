package circuit

import (
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/kv"
)

func TestRegionsOfOneBackendShareACircuit(t *testing.T) {
	t.Parallel()
	for name, perApp := range map[string]bool{"one backend": true, "a backend for each": false} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			c := e.worker("w1", func(o *Options) { o.PerApp = perApp })
			const regions = 60
			for i := range regions {
				p, r, err := c.Allow(t.Context(), app, fmt.Sprint("x-", i), "same")
				if err != nil || r != nil {
					t.Fatal(r, err)
				}
				e.fail(p, refused, false, 0)
			}
			want, region := regions, "x-7"
			if perApp {
				want, region = 1, ""
			}
			if n := e.keys(); n != want {
				t.Errorf("%d keys", n)
			}
			if ttl := e.ttl(app, region); ttl != "3600" && ttl != "1h0m0s" {
				t.Errorf("closed circuits are kept for %q", ttl)
			}
		})
	}
}

func TestCircuitThatExpiresIsForgotten(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.run(c)
	e.open(c)
	e.eventually("it is published", func() bool { return len(e.stored(app, region).Unpublished) == 0 })
	if ttl := e.ttl(app, region); ttl != "90000" && ttl != "25h0m0s" {
		t.Errorf("open circuits are kept for %q", ttl)
	}
	if list := c.NotClosed(); len(list) != 1 || list[0].App != app || list[0].State != Open {
		t.Errorf("%+v", list)
	}
	// The same entry with a short life, as if the day were over.
	got := e.stored(app, region)
	if _, err := kv.NewStore(e.js, e.bucket, time.Second).PutTTL(t.Context(), key(app, region), got, got.revision, time.Second); err != nil {
		t.Fatal(err)
	}
	e.eventually("it is forgotten", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.known) == 0
	})
	e.mu.Lock()
	if e.opened["w1 "+app] {
		t.Error("it is not known to have closed")
	}
	e.mu.Unlock()
	e.open(c)
}

func TestOpenCircuitsAreWrittenAgainInANewBucket(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	soon := func(o *Options) { o.Random = func() float64 { return 0 } }
	c, other := e.worker("w1", soon), e.worker("w2", soon)
	e.run(c)
	e.run(other)
	p, _ := e.allow(c, "opens")
	e.fail(p, unpaid, true, time.Second)
	p, _, err := c.Allow(t.Context(), "closed", region, "j")
	if err != nil {
		t.Fatal(err)
	}
	e.fail(p, refused, false, 0)
	e.knows(other, Open)
	e.eventually("it is published", func() bool { return len(e.stored(app, region).Unpublished) == 0 })
	e.remake()
	e.eventually("the open one is written again", func() bool { return e.stored(app, region).State == Open })
	// What happens in the new bucket is seen, although its revisions are lower.
	e.pass(10 * time.Second)
	e.eventually("one may probe", func() bool {
		p, _, err := other.Allow(t.Context(), app, region, "good")
		if err != nil {
			t.Fatal(err)
		}
		if p == nil {
			return false
		}
		if !p.Probe() {
			t.Fatal("let through, and not as the probe")
		}
		e.success(p)
		return true
	})
	e.knows(c, Closed)
	if got := e.stored("closed", region); got.revision != 0 {
		t.Errorf("%+v", got)
	}
	if n := len(e.alerts()); n > 2 {
		t.Errorf("%d alerts: %+v", n, e.alerts())
	}
}

// Before the watch finds out, jobs do not all go.
func TestOneProbeInABucketThatWasJustMadeAgain(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.open(c)
	e.remake()
	e.pass(10 * time.Second)
	p := e.probe(c, "j1")
	e.refused(c, "j2")
	e.success(p)
	if got := e.stored(app, region); got.State != Closed {
		t.Errorf("%+v", got)
	}
}

func (e *env) remake() {
	e.t.Helper()
	if err := e.js.DeleteKeyValue(e.t.Context(), "FLEET"); err != nil {
		e.t.Fatal(err)
	}
	e.makeBucket()
}

// refuseWrites makes the bucket take no message until the returned function is called.
func (e *env) refuseWrites() (accept func()) {
	e.t.Helper()
	update := func(size int32) {
		e.t.Helper()
		s, err := e.js.Stream(e.t.Context(), "KV_FLEET")
		if err != nil {
			e.t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		cfg.MaxMsgSize = size
		if _, err := e.js.UpdateStream(e.t.Context(), cfg); err != nil {
			e.t.Fatal(err)
		}
	}
	update(1)
	return func() { e.t.Helper(); update(-1) }
}

func TestAWorkerThatCannotWriteTheBucketOpensProbesAndClosesACircuitOfItsOwn(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1", func(o *Options) { o.Timeout = 300 * time.Millisecond })
	e.run(c)
	p, _ := e.allow(c, "j0")
	e.fail(p, refused, false, 0)
	e.refuseWrites()
	for i := range 4 {
		p, _ := e.allow(c, fmt.Sprint("j", i+1))
		if _, open, err := p.Fail(t.Context(), refused); open != (i == 3) || err == nil && i == 0 {
			t.Fatalf("failure %d: open %v, %v", i+1, open, err)
		}
	}
	e.refused(c, "held")
	e.eventually("the alert", func() bool { return len(e.alerts()) == 1 })
	e.pass(10 * time.Second)
	p = e.probe(c, "probe")
	e.refused(c, "second")
	e.fail(p, refused, true, 20*time.Second)
	e.pass(20 * time.Second)
	e.success(e.probe(c, "good"))
	if p, _ := e.allow(c, "next"); p == nil || p.Probe() {
		t.Errorf("after the probe: %+v", p)
	}
	if got := e.stored(app, region); len(got.Failures) != 1 {
		t.Errorf("the bucket has %+v", got)
	}
	e.eventually("the other alert", func() bool { return len(e.alerts()) == 2 })
}

func TestACircuitOpenedWithoutTheBucketIsTheFleetsOnceTheBucketIsWritten(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1", func(o *Options) { o.Timeout = 300 * time.Millisecond })
	p, _ := e.allow(c, "before")
	e.fail(p, refused, false, 0)
	e.breakEvents(errors.New("away")) // publishing an alert would write it
	accept := e.refuseWrites()
	p, _ = e.allow(c, "opens")
	if _, open, err := p.Fail(t.Context(), unpaid); !open || err == nil {
		t.Fatalf("open %v, %v", open, err)
	}
	accept()
	e.run(c) // lists what the bucket has
	e.eventually("it is listed", func() bool { return c.get(key(app, region)).revision != 0 })
	e.refused(c, "held")
	other := e.worker("w2")
	e.run(other)
	e.pass(10 * time.Second)
	p = e.probe(c, "probe")
	e.knows(other, Probing)
	e.refused(other, "held")
	e.success(p)
	e.knows(other, Closed)
}

func TestEntryThatCanNotBeReadHoldsNoJob(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	c := e.worker("w1")
	e.run(c)
	e.open(c)
	e.eventually("it is published", func() bool { return len(e.stored(app, region).Unpublished) == 0 })
	if _, err := e.bucket.Put(t.Context(), key(app, region), []byte("no JSON")); err != nil {
		t.Fatal(err)
	}
	other, err := e.js.KeyValue(t.Context(), "FLEET")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Create(t.Context(), key("app2", region), []byte(`{"app_id":"app2","region":"us-west","state":"open","retry_at":"2200-01-01T00:00:00Z"}`)); err != nil {
		t.Fatal(err)
	}
	e.eventually("the others are read", func() bool {
		list := c.NotClosed()
		return len(list) == 1 && list[0].App == "app2"
	})
	if p, r := e.allow(c, "j"); p == nil {
		t.Errorf("%+v", r)
	}
}
