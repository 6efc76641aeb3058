package app_test

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/jobs/lifecycle"
)

// gate is an HTTP proxy in front of one backend. While refuse is set, it answers
// itself.
type gate struct {
	backend string // host:port
	forward http.Handler

	mu      sync.Mutex
	refuse  http.HandlerFunc // nil: everything passes
	refused int
	many    chan struct{} // closed after several refusals
	tunnels sync.WaitGroup
}

// several is more than the attempts of any job in these tests.
const several = 8

func newGate(t *testing.T, backend string, refuse http.HandlerFunc) (g *gate, addr string) {
	t.Helper()
	g = &gate{backend: backend, refuse: refuse, many: make(chan struct{})}
	g.forward = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: backend})
	srv := httptest.NewServer(g)
	t.Cleanup(func() { srv.Close(); g.tunnels.Wait() })
	return g, srv.URL
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	refuse := g.refuse
	if refuse != nil {
		if g.refused++; g.refused == several {
			close(g.many)
		}
	}
	g.mu.Unlock()
	switch {
	case refuse != nil:
		refuse(w, r)
	case r.Method == http.MethodConnect:
		g.tunnel(w)
	default:
		g.forward.ServeHTTP(w, r)
	}
}

func (g *gate) tunnel(w http.ResponseWriter) {
	there, err := net.Dial("tcp", g.backend)
	if err != nil {
		http.Error(w, "cannot connect", http.StatusBadGateway)
		return
	}
	here, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = here.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n"))
	g.tunnels.Go(func() { _, _ = buffered.WriteTo(there); there.Close() })
	g.tunnels.Go(func() { _, _ = there.(*net.TCPConn).WriteTo(here); here.Close() })
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refuse = nil
}

func TestALoneJobWaitsForAProxyThatRefusesAndIsDoneWhenItLetsItThrough(t *testing.T) {
	status := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
	}
	for name, refuse := range map[string]http.HandlerFunc{
		"407": status(http.StatusProxyAuthRequired),
		"403": status(http.StatusForbidden),
		"502": status(http.StatusBadGateway),
		"closes": func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, nil)
			backend, err := url.Parse(f.backend.ConsoleURL())
			if err != nil {
				t.Fatal(err)
			}
			g, addr := newGate(t, backend.Host, refuse)
			t.Setenv("HTTP_PROXY", addr)
			f.worker(worker{config: func(c *config.Config) {
				c.Retry.MaxAttempts = 2
				for _, u := range []*string{&c.Backend.ConsoleURL, &c.Backend.IngressURL} {
					*u = strings.Replace(*u, backend.Host, "backend.example.com", 1)
				}
			}})
			f.publish("lone", "ok", nil)
			select {
			case <-g.many:
			case <-f.ctx.Done():
				t.Fatal("it is not tried again")
			}
			f.watch(f.names.EventsStream(), f.names.Alerts("circuit_opened", "connectionFailed"), func(jetstream.Msg) bool { return true })
			g.open()
			if done := f.completed("lone"); done.Attempts != 1 {
				t.Errorf("%d attempts were counted", done.Attempts)
			}
			if letters := f.deadLetters("lone"); len(letters) > 0 {
				t.Errorf("%d dead letters", len(letters))
			}
			if held := f.heldFor("lone"); held[0] != lifecycle.HeldProxy || held[len(held)-1] != lifecycle.HeldCircuit {
				t.Errorf("held for %q", held)
			}
			for _, e := range f.errorEvents("lone") {
				if e.Action != errors.ActionHold || !strings.Contains(e.Message, addr) {
					t.Errorf("%s: %s", e.Action, e.Message)
				}
			}
		})
	}
}

// heldFor is the reasons of a job's holds, in order.
func (f *fleet) heldFor(id string) (reasons []string) {
	f.t.Helper()
	for _, msg := range f.all(f.names.EventsStream(), f.names.Events(event.TypeHeld, id)) {
		var held event.Held
		if err := json.Unmarshal(msg.Data(), &held); err != nil {
			f.t.Fatal(err)
		}
		reasons = append(reasons, held.Reason)
	}
	return reasons
}
