package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/simulator"
)

func newSimulatorCommand(c *cli) *cobra.Command {
	var (
		o      simulator.Options
		replay string
		secure bool
		asJSON bool
	)
	cmd := &cobra.Command{
		Use: "simulator", Short: "Run the simulated backend alone", Long: simulator.Help(), Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Speed < 0 {
				return usagef("--speed %v: want 0 (as fast as possible) or a positive factor", o.Speed)
			}
			if o.ReplayPatch && replay == "" {
				return usagef("--replay-patch needs --replay FILE")
			}
			if err := validAddr(cmd.Context(), o.Addr); err != nil {
				return err
			}
			log, err := c.logger()
			if err != nil {
				return err
			}
			o.Logger = log
			if replay != "" {
				if o.Replay, err = simulator.LoadExchange(replay); err != nil {
					return err
				}
			}
			return c.simulate(cmd, o, secure, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Addr, "addr", simulator.DefaultAddr, "`HOST:PORT` to listen at; port 0 takes a free one")
	f.Float64Var(&o.Speed, "speed", 1, "`FACTOR` of real time at which motion comes; 0: as fast as possible")
	f.StringVar(&replay, "replay", "", "answer each utterance with the recorded exchange in `FILE`, byte for byte")
	f.BoolVar(&o.ReplayPatch, "replay-patch", false, "put the session's own ids into what is replayed")
	f.IntVar(&o.MaxSessions, "max-sessions", 0, "at most `N` sessions of one app at a time (0: no limit)")
	f.BoolVar(&o.SingleUseTokens, "single-use-tokens", false, "a session token opens one session only")
	f.BoolVar(&secure, "tls", false, "serve https and wss with its own certificate, and print the file that a worker has to trust (SSL_CERT_FILE)")
	jsonFlag(cmd, &asJSON)
	return cmd
}

// simulate serves until the command is interrupted.
func (c *cli) simulate(cmd *cobra.Command, o simulator.Options, secure, asJSON bool) error {
	outliveReaders()
	authority := ""
	if secure {
		file, err := ownCertificate(&o)
		if err != nil {
			return err
		}
		defer func() { _ = os.Remove(file) }() // it is in the directory of temporary files
		authority = file
	}
	s := simulator.New(o)
	var noHost *net.DNSError
	switch err := s.Start(cmd.Context()); {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("--addr %s: the port is in use, perhaps by another simulator: choose another one, or port 0 for a free one", o.Addr)
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.As(err, &noHost):
		return usagef("--addr %s: this machine has no such address: want HOST:PORT, such as %s", o.Addr, simulator.DefaultAddr)
	case err != nil:
		return err
	}
	defer s.Stop()
	if err := c.printURLs(s, authority, asJSON); err != nil {
		return err
	}
	<-cmd.Context().Done()
	return nil
}

// validAddr returns a usage error for an address that nothing can listen at.
func validAddr(ctx context.Context, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = net.DefaultResolver.LookupPort(ctx, "tcp", port)
	}
	if err != nil {
		return usagef("--addr %s: want HOST:PORT, such as %s", addr, simulator.DefaultAddr)
	}
	return nil
}

// ownCertificate gives the simulator a certificate, and returns the file of what
// a client has to trust.
func ownCertificate(o *simulator.Options) (file string, err error) {
	host, _, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return "", usagef("--addr %s: want HOST:PORT", o.Addr)
	}
	cert, authority, err := simulator.NewCertificate(host)
	if err != nil {
		return "", err
	}
	o.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	f, err := os.CreateTemp("", "avatar-simulator-ca-*.pem")
	if err != nil {
		return "", err
	}
	_, err = f.Write(authority)
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

func (c *cli) printURLs(s *simulator.Server, authority string, asJSON bool) error {
	if asJSON {
		urls := map[string]string{"console_url": s.ConsoleURL(), "ingress_url": s.IngressURL(), "url": s.URL()}
		if authority != "" {
			urls["ca_file"] = authority
		}
		return c.printLine(urls)
	}
	if authority != "" {
		authority = "trust    SSL_CERT_FILE=" + authority + "\n"
	}
	_, err := fmt.Fprintf(c.stdout, "console  %s\ningress  %s\ncontrol  %s/control\n%s", s.ConsoleURL(), s.IngressURL(), s.URL(), authority)
	return err
}
