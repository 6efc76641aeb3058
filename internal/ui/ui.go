// Package ui serves the page for operators: the state of jobs, queues, workers and
// dead letters, what failures mean, and the actions that help. The server renders it,
// and a script of a few lines keeps it current.
//
// It owns the pages, who may see them and the forms' protection. It must not know
// how what it shows is read, nor how a change is made: see Reader and Actor.
package ui

import (
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/web"
)

// Options of a Server. Reader and Actor are required.
type Options struct {
	Addr   string // host:port
	Hosts  []string
	Write  bool // serve the actions too
	Auth   Auth
	Reader Reader
	Actor  Actor
	// API serves /api/v1/; nil: it is not served. The server has checked who asks,
	// and refuses what would change something without Write.
	API     http.Handler
	Codes   []errors.Row // as the configuration's policy has them
	Version string
	Now     func() time.Time
	Logger  zerolog.Logger
}

// Auth is who may see the page. Its zero value lets everyone in, which New takes
// for a loopback address only.
type Auth struct {
	// Secrets returns the bearer token and the user's password; "": there is none.
	// It is called again after a while, so that a rotated secret is found. May be nil.
	Secrets func() (token, password string, err error)
	User    string
	// TrustedHeader names the user in requests from Proxies.
	TrustedHeader string
	Proxies       []netip.Prefix
}

func (a *Auth) none() bool { return a.Secrets == nil && a.TrustedHeader == "" }

// Server serves the page. Start it once; Stop it as often as you like.
type Server struct {
	*web.Server

	o        Options
	pages    *pages
	guard    *guard
	results  results
	watchers chan struct{} // one for each open stream of changes
	stopping chan struct{}
	stopOnce sync.Once
}

const (
	readTimeout  = 30 * time.Second
	writeTimeout = 90 * time.Second
	// requestTime bounds what one request reads or changes.
	requestTime = 60 * time.Second
	maxHeader   = 32 << 10
	// maxWatchers bounds the open streams of changes.
	maxWatchers = 256
)

// New returns a server that does not listen yet. The error says that it would show
// the page to everyone.
func New(o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Auth.none() && !loopback(o.Addr) {
		return nil, fmt.Errorf("ui.addr: %s can be reached from other machines, and nothing says who may see the page: set ui.auth or ui.trusted_header, or listen at 127.0.0.1", o.Addr)
	}
	if o.Auth.TrustedHeader != "" && len(o.Auth.Proxies) == 0 {
		return nil, errors.New("ui.trusted_header: it is trusted from no address: set ui.trusted_proxies")
	}
	pages, err := newPages()
	if err != nil {
		return nil, err
	}
	s := &Server{
		o: o, pages: pages, watchers: make(chan struct{}, maxWatchers),
		stopping: make(chan struct{}),
	}
	s.guard = &guard{auth: o.Auth, now: o.Now, log: o.Logger, cross: http.NewCrossOriginProtection()}
	if _, err := rand.Read(s.guard.key[:]); err != nil {
		return nil, err
	}
	server := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
	}
	server.RegisterOnShutdown(func() { s.stopOnce.Do(func() { close(s.stopping) }) })
	s.Server = web.NewServer("ui", server, o.Logger)
	return s, nil
}

// loopback reports whether only this machine can reach an address.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().IsLoopback()
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// Start listens and serves until Stop. It returns the address of the page.
func (s *Server) Start() (url string, err error) {
	addr, err := s.Server.Start(s.o.Addr, func(err error) {
		s.o.Logger.Error().Err(err).Msg("the page's listener ended: no page until a restart")
	})
	if err != nil {
		return "", fmt.Errorf("ui.addr: can't listen at %s: %w: set another address with --ui-addr HOST:PORT, AVATAR_UI_ADDR or ui.addr (port 0 takes a free one)", s.o.Addr, err)
	}
	return pageURL(s.o.Addr, addr), nil
}

// pageURL is where a browser finds the page.
func pageURL(configured string, listening net.Addr) string {
	host, _, _ := net.SplitHostPort(configured) // it was listened at
	_, port, _ := net.SplitHostPort(listening.String())
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port) + "/"
}

// Handler serves the same without a listener.
func (s *Server) Handler() http.Handler {
	open := http.NewServeMux() // what needs no login
	open.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("live\n")) // the caller may have left
	})
	open.Handle("/", s.guard.login(s.routes()))
	hosts := web.HostCheck{Addr: s.o.Addr, Hosts: s.o.Hosts, Setting: "ui.hosts", OwnAddresses: true}
	return secured(hosts.Handler(bounded(open)))
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /static/{file}", s.static)
	mux.HandleFunc("GET /events", s.events)
	for pattern, handle := range map[string]func(*request){
		"GET /{$}":             s.overview,
		"GET /jobs":            s.jobs,
		"GET /jobs/{id}":       s.job,
		"GET /find":            s.find,
		"GET /letters":         s.letters,
		"GET /letters/{seq}":   s.letter,
		"GET /alerts":          s.alerts,
		"GET /codes":           s.codes,
		"GET /codes/{code}":    s.code,
		"GET /recordings":      s.recordings,
		"POST /jobs/cancel":    s.action(s.changeJobs),
		"POST /jobs/retry":     s.action(s.changeJobs),
		"POST /letters/replay": s.action(s.replay),
		"POST /letters/remove": s.action(s.remove),
		"POST /queues/pause":   s.action(s.changeQueue),
		"POST /queues/resume":  s.action(s.changeQueue),
		"POST /circuits/probe": s.action(s.changeCircuit),
		"POST /circuits/close": s.action(s.changeCircuit),
		"POST /workers/drain":  s.action(s.drain),
	} {
		mux.HandleFunc(pattern, s.page(handle))
	}
	mux.HandleFunc("/", s.page(func(r *request) {
		r.fail(http.StatusNotFound, "There is no such page.", "The parts of it are listed above.")
	}))
	if s.o.API != nil {
		mux.Handle("/api/v1/", s.guard.api(s.o.Write, s.o.API))
	}
	return mux
}
