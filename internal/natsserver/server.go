// Package natsserver runs NATS with JetStream in this process: for the demo, for
// `run --embedded` and for tests. It owns the server, its store directory and the
// directory's lock, and must not know what is stored.
package natsserver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

const (
	startTimeout    = 20 * time.Second
	shutdownTimeout = 15 * time.Second
	lockFile        = "avatar.lock"
)

// RandomPort asks for any free port.
const RandomPort = -1

// Options configure the server.
type Options struct {
	// StoreDir keeps JetStream's files; it is made if missing and belongs to
	// one process at a time. Empty: a temporary directory, removed at Shutdown.
	StoreDir string
	Host     string // empty: 127.0.0.1
	Port     int    // 0: 4222; RandomPort: any free one
	// MaxPayload is the largest message in bytes, headers included; 0: 1 MiB.
	MaxPayload int32
	// User and Password, or Token, are what clients must show; empty: nothing.
	User, Password, Token string
	Domain                string         // JetStream's; empty: none
	Name                  string         // server name; empty: the server chooses
	Logger                zerolog.Logger // the zero value logs nothing
}

// Server is a running NATS server. Its methods may be called from any
// goroutine.
type Server struct {
	nats     *server.Server
	lock     *dirLock
	tempDir  string
	logger   *logger
	once     sync.Once
	shutdown error
}

// ErrOpen is in the chain of an error about a server that anyone on the network
// could use.
var ErrOpen = errors.New("it would be open to other machines without a login")

// Start runs a server and returns when clients can connect. The error says what
// to change: the address is in use, another process uses the store directory, or
// the address is reachable from other hosts and no login is set (ErrOpen).
func Start(o Options) (*Server, error) {
	opts := serverOptions(o)
	if !isLoopback(opts.Host) && opts.Username == "" && opts.Authorization == "" {
		return nil, fmt.Errorf("embedded NATS at %s: %w: set nats.user and nats.password, or nats.token, or listen at 127.0.0.1", opts.Host, ErrOpen)
	}
	if err := checkAddress(opts.Host, opts.Port); err != nil {
		return nil, err
	}
	s := &Server{logger: newLogger(o.Logger)}
	if err := s.openStore(o.StoreDir, opts); err != nil {
		return nil, err
	}
	if err := s.run(opts); err != nil {
		return nil, errors.Join(err, s.Shutdown())
	}
	return s, nil
}

func serverOptions(o Options) *server.Options {
	opts := &server.Options{
		ServerName: o.Name,
		Host:       o.Host,
		Port:       o.Port,
		MaxPayload: o.MaxPayload,
		Username:   o.User, Password: o.Password, Authorization: o.Token,
		JetStream: true, JetStreamDomain: o.Domain,
		NoSigs: true, // signals are the program's
		NoLog:  true, // SetLoggerV2 below is what logs
	}
	if opts.Host == "" {
		opts.Host = "127.0.0.1"
	}
	if opts.Port == 0 {
		opts.Port = server.DEFAULT_PORT
	}
	if opts.MaxPayload == 0 {
		opts.MaxPayload = server.MAX_PAYLOAD_SIZE
	}
	return opts
}

// isLoopback reports whether a host is this machine by its name alone: what a
// name resolves to may change.
func isLoopback(host string) bool {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().IsLoopback()
	}
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost")
}

// checkAddress binds the address once, because the server itself would only log
// that it is in use.
func checkAddress(host string, port int) error {
	if port == RandomPort {
		port = 0
	}
	address := net.JoinHostPort(host, strconv.Itoa(port))
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("embedded NATS can't listen at %s: %w: stop what listens there, set nats.url (--nats-url, NATS_URL) to another port or, if a worker's NATS is there already, leave out --embedded", address, err)
	}
	return l.Close()
}

func (s *Server) openStore(dir string, opts *server.Options) error {
	if dir == "" {
		temp, err := os.MkdirTemp("", "avatar-nats-")
		if err != nil {
			return fmt.Errorf("embedded NATS: a directory for its files: %w", err)
		}
		s.tempDir, opts.StoreDir = temp, temp
		return nil
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("embedded NATS: nats.store_dir %s: %w", dir, err)
	}
	lock, err := lockDir(filepath.Join(dir, lockFile))
	if err != nil {
		return fmt.Errorf("embedded NATS: nats.store_dir %s: %w", dir, err)
	}
	s.lock, opts.StoreDir = lock, dir
	return nil
}

func (s *Server) run(opts *server.Options) error {
	ns, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("embedded NATS: %w", err)
	}
	s.nats = ns
	ns.SetLoggerV2(s.logger, s.logger.debug(), false, false)
	ns.Start()
	deadline := time.Now().Add(startTimeout)
	for !ns.ReadyForConnections(100 * time.Millisecond) {
		if text := s.logger.fatal(); text != "" {
			return fmt.Errorf("embedded NATS did not start: %s", text)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("embedded NATS was not ready within %s", startTimeout)
		}
	}
	if text := s.logger.fatal(); text != "" {
		return fmt.Errorf("embedded NATS did not start: %s", text)
	}
	return nil
}

// ClientURL returns the address for clients, without credentials.
func (s *Server) ClientURL() string { return s.nats.ClientURL() }

// InProcessConn connects a client of this process without a network: a Server
// is a nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) { return s.nats.InProcessConn() }

// Shutdown stops the server and unlocks its directory. It returns within 15 s;
// calling it again returns the same error.
func (s *Server) Shutdown() error {
	s.once.Do(func() { s.shutdown = s.stop() })
	return s.shutdown
}

func (s *Server) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := s.stopServer(ctx); err != nil {
		// The directory stays locked: the server may still write to it.
		return err
	}
	var err error
	if s.lock != nil {
		err = s.lock.release()
	}
	if s.tempDir != "" {
		err = errors.Join(err, os.RemoveAll(s.tempDir))
	}
	return err
}

func (s *Server) stopServer(ctx context.Context) error {
	if s.nats == nil {
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.nats.Shutdown()
		s.nats.WaitForShutdown()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("embedded NATS did not stop within %s", shutdownTimeout)
	}
}
