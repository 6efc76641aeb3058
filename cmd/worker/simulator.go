package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"avatarworker/internal/simulator"
)

func newSimulatorCommand(c *cli) *cobra.Command {
	var (
		o      simulator.Options
		replay string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use: "simulator", Short: "Run the simulated backend alone", Long: simulator.Help(), Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Speed < 0 {
				return usagef("--speed %v: want 0 (as fast as it can), 1 (real time) or more", o.Speed)
			}
			if o.ReplayPatch && replay == "" {
				return usagef("--replay-patch needs --replay FILE")
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
			return c.simulate(cmd, o, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Addr, "addr", simulator.DefaultAddr, "`HOST:PORT` to listen at; port 0 takes a free one")
	f.Float64Var(&o.Speed, "speed", 1, "how fast motion comes: 1 is real time, 0 as fast as it can")
	f.StringVar(&replay, "replay", "", "answer each utterance with the recorded exchange in `FILE`, byte for byte")
	f.BoolVar(&o.ReplayPatch, "replay-patch", false, "put the session's own ids into what is replayed")
	f.IntVar(&o.MaxSessions, "max-sessions", 0, "sessions of one app at a time (0: no limit)")
	f.BoolVar(&o.SingleUseTokens, "single-use-tokens", false, "a session token opens one session only")
	jsonFlag(cmd, &asJSON)
	return cmd
}

// simulate serves until the command is interrupted.
func (c *cli) simulate(cmd *cobra.Command, o simulator.Options, asJSON bool) error {
	outliveReaders()
	s := simulator.New(o)
	if err := s.Start(cmd.Context()); err != nil {
		return err
	}
	defer s.Stop()
	if err := c.printURLs(s, asJSON); err != nil {
		return err
	}
	<-cmd.Context().Done()
	return nil
}

func (c *cli) printURLs(s *simulator.Server, asJSON bool) error {
	if asJSON {
		return c.printLine(map[string]string{
			"console_url": s.ConsoleURL(), "ingress_url": s.IngressURL(), "url": s.URL(),
		})
	}
	_, err := fmt.Fprintf(c.stdout, "console  %s\ningress  %s\ncontrol  %s/control\n", s.ConsoleURL(), s.IngressURL(), s.URL())
	return err
}
