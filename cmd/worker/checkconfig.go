package main

import (
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/natsconn"
)

func newCheckConfigCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "check-config", Short: "Load the configuration as run would, and print it whole",
		Long: `Loads the configuration as 'avatarworker run' would, from defaults, file, environment
and flags, and prints every key, secrets hidden. Exit code 78 where it is
wrong, and where a file of a secret or of the login to NATS can't be read. It
does not connect. One that only lacks what a deployment adds, the app and its
key, is right, with a warning.`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			c.secrets = true
			cfg, err := c.config()
			if err != nil {
				return err
			}
			if err := cfg.Print(c.stdout); err != nil {
				return err
			}
			options, err := natsOptions(cfg, "", zerolog.Nop())
			if err != nil {
				return &configError{err}
			}
			if err := natsconn.Check(options); err != nil {
				return err
			}
			if err := cfg.RequireApp(); err != nil {
				c.note("avatarworker: right so far, but a worker would not start with it: %s", err)
			}
			return nil
		},
	}
}
