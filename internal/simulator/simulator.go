// Package simulator is a simulated avatar backend: the console that issues
// session tokens and the WebSocket ingress that turns speech into motion, as far
// as docs/protocol.md knows them, and every failure on request. It serves the
// demo, the command `avatarworker simulator` and the tests. It owns its tokens,
// sessions and session log, and must not know about the worker.
package simulator

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// ReplayHeader in the upgrade's reply asks the client to use this req_id: that of
// the recorded exchange which answers it.
const ReplayHeader = "Avatar-Replay-Req-Id"

// DefaultAddr is the default address of the simulator.
const DefaultAddr = "127.0.0.1:9090"

const (
	consolePath = "/v1/console"
	ingressPath = "/v2/driveningress"

	handshakeTimeout = 10 * time.Second // for the client's first message
	closeTimeout     = time.Second      // for the client's answer to a close
	maxMessage       = 64 << 20         // bytes; the real ceiling is not known
)

// Options configure a Server. The zero value listens at DefaultAddr, delivers as
// fast as possible and logs nothing.
type Options struct {
	Addr string // host:port; ":0" takes a free port
	// Speed is how fast motion is delivered: 1 for real time, 2 twice as fast, 0
	// as fast as possible. An utterance's first envelope is never delayed.
	Speed float64

	Replay *Exchange // answers each utterance; nil: motion of our own
	// ReplayPatch writes the client's req_id and the session's connection_id into
	// the replayed envelopes. Without it they are sent byte for byte, and the
	// session is confirmed under the recorded connection_id.
	ReplayPatch bool

	// TLS is used if it is not nil; NewCertificate makes a certificate.
	TLS *tls.Config

	MaxSessions     int           // at once, for each app; 0: no limit
	SingleUseTokens bool          // a token opens one session
	PingInterval    time.Duration // pings clients and drops those that do not answer; 0: never
	IgnorePings     bool          // does not answer the clients' pings
	SessionLogLimit int           // closed sessions kept in the session log; 0: 100,000

	Logger zerolog.Logger
	Now    func() time.Time // nil: time.Now
}

// Server is the simulated backend. It may be started again after a stop, at the
// same address and with the same session log, like a backend that was away.
type Server struct {
	opts       Options
	log        zerolog.Logger
	now        func() time.Time
	motion     motion
	replay     []replayFrame
	envelopes  envelopePool
	messages   bufferPool
	tokens     *tokens
	sessionLog *sessionLog

	mu       sync.Mutex
	addr     string // where it listens, once started
	http     *http.Server
	stopping bool
	sessions map[*session]struct{}
	account  accountFault
	failures map[string]int // sessions that a flaky avatar id failed
	wg       sync.WaitGroup
}

// New returns a Server; Start makes it listen.
func New(opts Options) *Server {
	if opts.Addr == "" {
		opts.Addr = DefaultAddr
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.SessionLogLimit == 0 {
		opts.SessionLogLimit = 100_000
	}
	return &Server{
		opts: opts, log: opts.Logger, now: opts.Now,
		motion: newMotion(), tokens: newTokens(opts.SingleUseTokens), sessionLog: newSessionLog(opts.SessionLogLimit),
		addr: opts.Addr, sessions: map[*session]struct{}{}, failures: map[string]int{},
	}
}

// connKey is the context key of a request's TCP connection.
type connKey struct{}

// Start starts listening and returns. ctx bounds only that.
func (s *Server) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http != nil {
		return fmt.Errorf("simulator: already started at %s", s.addr)
	}
	if s.opts.Speed < 0 {
		return fmt.Errorf("simulator: speed %g: give 1 for real time, 0 for as fast as it can", s.opts.Speed)
	}
	if s.opts.Replay != nil {
		frames, err := s.opts.Replay.frames()
		if err != nil {
			return fmt.Errorf("simulator: recorded exchange: %w", err)
		}
		s.replay = frames
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", s.addr)
	if err != nil {
		return fmt.Errorf("simulator: %w", err)
	}
	s.addr = ln.Addr().String()
	s.stopping = false
	srv := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if secure, ok := c.(*tls.Conn); ok {
				c = secure.NetConn()
			}
			return context.WithValue(ctx, connKey{}, c)
		},
		TLSConfig: s.opts.TLS.Clone(),
		ErrorLog:  log.New(&logLines{s.log}, "", 0),
	}
	s.http = srv
	s.wg.Go(func() { s.serve(srv, ln) })
	return nil
}

// logLines logs net/http's messages, such as failed handshakes.
type logLines struct{ log zerolog.Logger }

func (l *logLines) Write(line []byte) (int, error) {
	l.log.Debug().Msg("simulator: " + strings.TrimSpace(string(line)))
	return len(line), nil
}

func (s *Server) serve(srv *http.Server, ln net.Listener) {
	var err error
	if srv.TLSConfig != nil {
		err = srv.ServeTLS(ln, "", "")
	} else {
		err = srv.Serve(ln)
	}
	s.mu.Lock()
	stopping := s.stopping
	s.mu.Unlock()
	if !stopping {
		s.log.Error().Err(err).Msg("simulator: no longer listening")
	}
}

// Stop closes every session with 1001 and waits until all have ended, at most
// about a second. It may be called twice.
func (s *Server) Stop() {
	s.mu.Lock()
	srv := s.http
	s.http = nil
	s.stopping = true
	open := make([]*session, 0, len(s.sessions))
	for c := range s.sessions {
		open = append(open, c)
	}
	s.mu.Unlock()
	if srv != nil {
		if err := srv.Close(); err != nil {
			s.log.Warn().Err(err).Msg("simulator: close the listener")
		}
	}
	var closing sync.WaitGroup
	for _, c := range open {
		closing.Go(func() { c.closeWith(1001, "going away") })
	}
	closing.Wait()
	s.wg.Wait()
}

// URL returns the address of the simulator's page and /control.
func (s *Server) URL() string { return s.scheme("http") + s.hostPort() }

// ConsoleURL returns the console's base URL: session tokens are at
// /session-tokens under it.
func (s *Server) ConsoleURL() string { return s.URL() + consolePath }

// IngressURL returns the ingress's base URL: sessions are at /websocket under it.
func (s *Server) IngressURL() string { return s.scheme("ws") + s.hostPort() + ingressPath }

func (s *Server) scheme(plain string) string {
	if s.opts.TLS != nil {
		plain += "s"
	}
	return plain + "://"
}

// hostPort returns the address for a client on this machine.
func (s *Server) hostPort() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	host, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		return s.addr
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// register adds a session. It returns false while the server is stopping.
func (s *Server) register(c *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.sessions[c] = struct{}{}
	s.wg.Add(1)
	return true
}

func (s *Server) unregister(c *session) {
	s.mu.Lock()
	delete(s.sessions, c)
	s.mu.Unlock()
	s.wg.Done()
}

// newID returns an ID in the backend's format: the second in UTC and 12 random
// characters (docs/protocol.md, section 5).
func newID(now time.Time) string {
	const alphabet = "useandom-26T198340PX75pxJACKVERYMINDBUSHWOLF_GQZbfghjklqvwyzrict"
	var b [12]byte
	rand.Read(b[:]) // never fails: it ends the process instead
	for i := range b {
		b[i] = alphabet[b[i]&63]
	}
	return now.UTC().Format("20060102150405") + "_" + string(b[:])
}
