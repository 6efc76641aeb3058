package ui

import (
	"fmt"
	"net/http"
	"time"
)

const (
	// leastBetween is the least time between two changes that a viewer is sent.
	leastBetween = time.Second
	// mostBetween is the time after which a page is read again without one: what
	// waits in a queue makes no event.
	mostBetween = 5 * time.Second
	// sendTime bounds the wait for a viewer that takes nothing.
	sendTime = 10 * time.Second
)

// events is a stream of server-sent events: each says that something may have
// changed. What has changed is on the page.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	select {
	case s.watchers <- struct{}{}:
		defer func() { <-s.watchers }()
	default:
		http.Error(w, "too many pages are open: this one is not kept current", http.StatusServiceUnavailable)
		return
	}
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // a proxy must not wait for more of it
	// The server's own limits are for answers that end.
	_ = control.SetReadDeadline(time.Time{})
	send := func(text string) bool {
		_ = control.SetWriteDeadline(time.Now().Add(sendTime))
		_, err := fmt.Fprint(w, text)
		return err == nil && control.Flush() == nil
	}
	if !send("retry: 2000\n\n") {
		return
	}
	pause := time.NewTimer(leastBetween)
	defer pause.Stop()
	for n := 1; ; n++ {
		changed := s.o.Reader.Changed()
		if !s.waitFor(r, pause.C) {
			return
		}
		longest := time.NewTimer(mostBetween - leastBetween)
		select {
		case <-changed:
		case <-longest.C:
		case <-r.Context().Done():
			return
		case <-s.stopping:
			return
		}
		longest.Stop()
		if !send(fmt.Sprintf("id: %d\ndata: changed\n\n", n)) {
			return
		}
		pause.Reset(leastBetween)
	}
}

// waitFor waits for a timer, and returns false if the viewer leaves or the server
// stops before.
func (s *Server) waitFor(r *http.Request, timer <-chan time.Time) bool {
	select {
	case <-timer:
		return true
	case <-r.Context().Done():
		return false
	case <-s.stopping:
		return false
	}
}
