// Package admin serves what a machine asks of a worker over HTTP: is it alive,
// is it ready, how is it doing.
package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// Options of a Server.
type Options struct {
	Addr     string              // host:port; "": 127.0.0.1:8080
	Gatherer prometheus.Gatherer // what /metrics shows
	Live     func() error        // nil: alive whenever it answers
	Ready    func() error        // the error says why not; nil: ready whenever it answers
	Note     func() string       // what to know though it is ready; nil or "": nothing
	Hosts    []string            // names that requests may use, beside addresses, localhost and this host's name
	PProf    bool                // serve /debug/pprof/
	Logger   zerolog.Logger
}

// Server is the admin listener. Start it once; Stop it as often as you like.
type Server struct {
	options Options
	http    *http.Server
	stopped chan struct{} // closed when serving has ended

	mu       sync.Mutex
	listener net.Listener
}

const (
	defaultAddr = "127.0.0.1:8080"
	// profileTime is the longest profile that can be requested, with some room;
	// nothing else takes nearly as long.
	profileTime = 2 * time.Minute
)

// New returns a server that does not listen yet.
func New(options Options) *Server {
	if options.Addr == "" {
		options.Addr = defaultAddr
	}
	s := &Server{options: options, stopped: make(chan struct{})}
	s.http = &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      profileTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(errorLog{options.Logger}, "", 0),
	}
	return s
}

// errorLog takes net/http's complaints about single connections, which are
// the callers' doing.
type errorLog struct{ logger zerolog.Logger }

func (l errorLog) Write(text []byte) (int, error) {
	l.logger.Debug().Str("component", "admin").Msg(strings.TrimSpace(string(text)))
	return len(text), nil
}

// Start listens and serves until Stop. It returns the address that it listens
// at, with the port that was chosen for port 0.
func (s *Server) Start() (net.Addr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		return nil, errors.New("admin: already started")
	}
	listener, err := net.Listen("tcp", s.options.Addr)
	if err != nil {
		return nil, fmt.Errorf("admin.addr: can't listen at %s: %w%s", s.options.Addr, err, adviceOnListening(err))
	}
	s.listener = listener
	go func() {
		defer close(s.stopped)
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			s.options.Logger.Error().Err(err).Msg("the admin listener ended: no health and no metrics until a restart")
		}
	}()
	return listener.Addr(), nil
}

// adviceOnListening says what to do where another process has the address.
func adviceOnListening(err error) string {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return ""
	}
	return ": is it another worker on this host? Give each an address of its own with --admin-addr HOST:PORT, AVATAR_ADMIN_ADDR or admin.addr (port 0 takes a free one; off: none)"
}

// Stop takes no new requests, waits for those that run until ctx ends, and
// then cuts them off; the error says that it had to.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	started := s.listener != nil
	s.mu.Unlock()
	if !started {
		return nil
	}
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("admin: requests were cut off: %w", err), s.http.Close())
	}
	<-s.stopped
	return err
}

// Handler serves the same without a listener of its own.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", s.index)
	mux.HandleFunc("/livez", answer("live", "not live", s.options.Live, nil))
	mux.HandleFunc("/readyz", answer("ready", "not ready", s.options.Ready, s.options.Note))
	if s.options.Gatherer != nil {
		mux.Handle("/metrics", promhttp.HandlerFor(s.options.Gatherer, promhttp.HandlerOpts{
			ErrorLog: log.New(errorLog{s.options.Logger}, "", 0), EnableOpenMetrics: true,
		}))
	}
	if s.options.PProf {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", notFound) // may hold secrets given as flags
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return secured(HostCheck{Addr: s.options.Addr, Hosts: s.options.Hosts, Setting: "admin.hosts"}.Handler(mux))
}

// HostCheck refuses requests for a name that is not one of ours. A web page whose
// name has come to lead here (DNS rebinding) would else be allowed to read the
// answers, and to ask for changes.
type HostCheck struct {
	Addr    string   // host:port at which the server listens: its host is known
	Hosts   []string // names and addresses that are known too, beside localhost and this host's name
	Setting string   // that has Hosts, for the answer to others
	// OwnAddresses leaves out addresses that are neither in Hosts nor the
	// connection's own. An address can't be made to lead here by others, so that
	// this only matters to who counts on the list.
	OwnAddresses bool
}

// Handler serves next to requests with a Host that is known, and the status 421 to
// others.
func (c HostCheck) Handler(next http.Handler) http.Handler {
	known := map[string]bool{"localhost": true}
	if host, _, err := net.SplitHostPort(c.Addr); err == nil {
		known[hostName(host)] = true
	}
	if host, err := os.Hostname(); err == nil {
		known[hostName(host)] = true
	}
	for _, host := range c.Hosts {
		known[hostName(host)] = true
	}
	delete(known, "") // of an address without a host
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = hostName(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
		if !known[host] && !strings.HasSuffix(host, ".localhost") && !c.takesAddress(r, host) {
			http.Error(w, "this name is not served here: use an address, or add the name to "+c.Setting, http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// takesAddress reports whether a host that is not known by name is an address that
// is served, or is missing, as in HTTP/1.0.
func (c HostCheck) takesAddress(r *http.Request, host string) bool {
	addr, err := netip.ParseAddr(host)
	switch {
	case !c.OwnAddresses:
		return err == nil || host == ""
	case err != nil:
		return false
	case addr.IsLoopback():
		return true
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return false
	}
	own, err := netip.ParseAddrPort(local.String())
	return err == nil && own.Addr().Unmap().WithZone("") == addr.Unmap().WithZone("")
}

// hostName is a name as names are compared.
func hostName(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }

func notFound(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }

// secured refuses what changes something, since nothing here does, and sets
// the standard headers.
func secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD are served here", http.StatusMethodNotAllowed)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) index(w http.ResponseWriter, _ *http.Request) {
	text := "/livez    the process works\n/readyz   it takes jobs; or why not\n"
	if s.options.Gatherer != nil {
		text += "/metrics  for Prometheus\n"
	}
	if s.options.PProf {
		text += "/debug/pprof/\n"
	}
	write(w, http.StatusOK, "text/plain; charset=utf-8", text)
}

// answer is 200 with yes and the note, or 503 with no and the reason; as JSON
// {"status","reason","note"} where the caller prefers that. note may be nil.
func answer(yes, no string, check func() error, note func() string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status, word, reason, remark := http.StatusOK, yes, "", ""
		if note != nil {
			remark = note()
		}
		if check != nil {
			if err := check(); err != nil {
				status, word, reason = http.StatusServiceUnavailable, no, strings.ReplaceAll(err.Error(), "\n", "; ")
			}
		}
		if wantsJSON(r) {
			body, err := json.Marshal(struct {
				Status string `json:"status"`
				Reason string `json:"reason,omitempty"`
				Note   string `json:"note,omitempty"`
			}{word, reason, remark})
			if err != nil {
				http.Error(w, "the answer can't be encoded", http.StatusInternalServerError)
				return
			}
			write(w, status, "application/json", string(body)+"\n")
			return
		}
		for _, text := range []string{reason, remark} {
			if text != "" {
				word += ": " + text
			}
		}
		write(w, status, "text/plain; charset=utf-8", word+"\n")
	}
}

func write(w http.ResponseWriter, status int, contentType, body string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Add("Vary", "Accept")
	w.WriteHeader(status)
	// Writing fails only where the caller has gone away.
	_, _ = w.Write([]byte(body))
}

// wantsJSON reports whether JSON is requested by name before plain text: probes
// and browsers send */* or nothing and get text.
func wantsJSON(r *http.Request) bool {
	for entry := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		kind, _, _ := strings.Cut(entry, ";")
		switch strings.ToLower(strings.TrimSpace(kind)) {
		case "application/json":
			return true
		case "text/plain", "text/html", "text/*":
			return false
		}
	}
	return false
}
