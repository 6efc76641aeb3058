// Package admin serves a worker's health over HTTP: /livez, /readyz, /metrics and
// profiles. It owns these paths and must not know what makes a worker ready or what
// the metrics count: both are given to it.
package admin

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/web"
)

// Options of a Server.
type Options struct {
	Addr     string              // host:port; "": 127.0.0.1:8080
	Gatherer prometheus.Gatherer // what /metrics shows
	Live     func() error        // nil: alive whenever it answers
	Ready    func() error        // the error says why not; nil: ready whenever it answers
	Note     func() string       // what to know though it is ready; nil or "": nothing
	Hosts    []string            // names that requests may use, besides addresses, localhost and this host's name
	PProf    bool                // serve /debug/pprof/
	Logger   zerolog.Logger
}

// Server is the admin listener. Start it once; Stop it as often as you like.
type Server struct {
	*web.Server

	options Options
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
	s := &Server{options: options}
	s.Server = web.NewServer("admin", &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      profileTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}, options.Logger)
	return s
}

// Start listens and serves until Stop. It returns the address that it listens
// at, with the port that was chosen for port 0.
func (s *Server) Start() (net.Addr, error) {
	addr, err := s.Server.Start(s.options.Addr, func(err error) {
		s.options.Logger.Error().Err(err).Msg("the admin listener ended: no health and no metrics until a restart")
	})
	if err != nil {
		return nil, fmt.Errorf("admin.addr: can't listen at %s: %w%s", s.options.Addr, err, adviceOnListening(err))
	}
	return addr, nil
}

// adviceOnListening says what to do where another process has the address.
func adviceOnListening(err error) string {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return ""
	}
	return ": is it another worker on this host? Give each its own address with --admin-addr HOST:PORT, AVATAR_ADMIN_ADDR or admin.addr (port 0 takes a free one; off: none)"
}

// Handler serves the same without a listener.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", s.index)
	mux.HandleFunc("/livez", answer("live", "not live", s.options.Live, nil))
	mux.HandleFunc("/readyz", answer("ready", "not ready", s.options.Ready, s.options.Note))
	if s.options.Gatherer != nil {
		mux.Handle("/metrics", promhttp.HandlerFor(s.options.Gatherer, promhttp.HandlerOpts{
			ErrorLog: web.ErrorLog("admin", s.options.Logger), EnableOpenMetrics: true,
		}))
	}
	if s.options.PProf {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", notFound) // may hold secrets given as flags
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return secured(web.HostCheck{Addr: s.options.Addr, Hosts: s.options.Hosts, Setting: "admin.hosts"}.Handler(mux))
}

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
