package app_test

import (
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"avatarworker/internal/config"
	"avatarworker/internal/jobs/lifecycle"
)

// valve is a way to NATS that can be stopped without telling either side.
type valve struct {
	t        testing.TB
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu    sync.Mutex
	open  *sync.Cond
	shut  bool
	over  bool
	conns []net.Conn
}

func newValve(t testing.TB, target string) *valve {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	v := &valve{t: t, listener: l, target: u.Host}
	v.open = sync.NewCond(&v.mu)
	v.wg.Go(v.accept)
	t.Cleanup(v.close)
	return v
}

func (v *valve) accept() {
	for {
		from, err := v.listener.Accept()
		if err != nil {
			return // closed
		}
		to, err := net.Dial("tcp", v.target)
		if err != nil {
			v.t.Error(err)
			return
		}
		v.mu.Lock()
		v.conns = append(v.conns, from, to)
		v.mu.Unlock()
		v.wg.Go(func() { v.pipe(to, from) })
		v.wg.Go(func() { v.pipe(from, to) })
	}
}

func (v *valve) pipe(to, from net.Conn) {
	defer func() { _, _ = to.Close(), from.Close() }() // twice, by both ways
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		v.mu.Lock()
		for v.shut && !v.over {
			v.open.Wait()
		}
		v.mu.Unlock()
		if _, werr := to.Write(buf[:n]); werr != nil || err != nil {
			return
		}
	}
}

func (v *valve) set(shut bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shut = shut
	v.open.Broadcast()
}

func (v *valve) close() {
	_ = v.listener.Close() // the point is that it ends
	v.mu.Lock()
	v.over = true
	v.open.Broadcast()
	for _, c := range v.conns {
		_ = c.Close() // some are closed already
	}
	v.mu.Unlock()
	v.wg.Wait()
}

func TestAWorkerThatCannotReachNATSClosesItsSessionsBeforeAnotherOpensThem(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	way := newValve(t, f.server.ClientURL())
	first := f.worker(worker{config: func(c *config.Config) {
		c.NATS.URL, c.Worker.Name, c.Worker.DrainTimeout = "nats://"+way.listener.Addr().String(), "first", time.Second
	}})
	f.publish("film", "ok", fields{"live": fields{"sample_rate": 16000, "max_silence": "60s"}, "output": fields{"object": fields{}}})
	f.publish("shown", "ok", live("60s"))
	for _, id := range []string{"film", "shown"} {
		f.say(id, silence(3*time.Second), end)
		f.state(id, func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	}
	way.set(true)
	f.worker(worker{config: func(c *config.Config) { c.Worker.Name = "second" }})
	for _, id := range []string{"film", "shown"} {
		f.say(id, silence(3*time.Second), end)
		f.state(id, func(r lifecycle.Record) bool { return r.Session == 2 && r.Checkpoint == 2 })
	}
	way.set(false)
	for _, id := range []string{"film", "shown"} {
		f.say(id, silence(3*time.Second), closing)
		done := f.completed(id)
		if done.Worker != "second" || done.UtterancesTotal != 3 || done.Session != 2 {
			t.Errorf("%s: %+v", id, done)
		}
		if r := f.record(id); r.Attempt > 2 {
			t.Errorf("%s: %+v", id, r)
		}
	}
	first.stop()
	if got := f.ends("shown"); !slices.Equal(got, []string{"1 in 1", "2 in 2", "3 in 2"}) {
		t.Errorf("delivered: %v", got)
	}
	if got := f.objects(); !slices.Equal(got, []string{"film"}) {
		t.Errorf("objects: %v", got)
	}
	book := f.backend.SessionLog()
	if len(book) != 4 {
		t.Fatalf("%d sessions", len(book))
	}
	for _, old := range book[:2] {
		for _, young := range book[2:] {
			if !old.Closed.Before(young.Opened) || old.CloseCode != 1000 {
				t.Errorf("a session was open until %s (%d), the next one from %s", old.Closed, old.CloseCode, young.Opened)
			}
		}
	}
}
