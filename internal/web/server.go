// Package web has what our HTTP servers share: to listen and to stop, the check of the
// host that a request names, and the log of net/http. It owns no path and must not know
// what is served.
package web

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

// Server is an HTTP server with a listener of its own. Start it once; Stop it as often
// as you like.
type Server struct {
	name  string
	http  *http.Server
	ended chan struct{} // closed when serving has ended

	mu       sync.Mutex
	listener net.Listener
}

// NewServer returns a server that does not listen yet. name says in errors and log lines
// which one it is.
func NewServer(name string, server *http.Server, logger zerolog.Logger) *Server {
	server.ErrorLog = ErrorLog(name, logger)
	return &Server{name: name, http: server, ended: make(chan struct{})}
}

// Start listens at addr and serves until Stop. It returns the address, with the port
// that was chosen for port 0. It calls lost if serving ends before.
func (s *Server) Start(addr string, lost func(error)) (net.Addr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		return nil, errors.New("already started")
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s.listener = listener
	go func() {
		defer close(s.ended)
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			lost(err)
		}
	}()
	return listener.Addr(), nil
}

// Stop takes no new requests, waits for those that run until ctx ends, and then cuts
// them off; the error says that it had to.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	started := s.listener != nil
	s.mu.Unlock()
	if !started {
		return nil
	}
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("%s: requests were cut off: %w", s.name, err), s.http.Close())
	}
	<-s.ended
	return err
}

// ErrorLog takes net/http's complaints about single connections, which are the callers'
// doing.
func ErrorLog(component string, logger zerolog.Logger) *log.Logger {
	return log.New(errorLog{component, logger}, "", 0)
}

type errorLog struct {
	component string
	logger    zerolog.Logger
}

func (l errorLog) Write(text []byte) (int, error) {
	l.logger.Debug().Str("component", l.component).Msg(strings.TrimSpace(string(text)))
	return len(text), nil
}
