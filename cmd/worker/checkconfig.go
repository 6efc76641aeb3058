package main

import (
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"avatarworker/internal/natsconn"
)

func newCheckConfigCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "check-config", Short: "Check the configuration as run would, and print all of it",
		Long: `Loads the configuration as 'avatarworker run' would, from defaults, file, environment
and flags, and prints every key with secrets hidden. It does not connect. The exit
code is 78 if the configuration is wrong, or if a file with a secret or with the
login to NATS can't be read. A missing app or API key, which a deployment may add
later, is only a warning.`,
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
				c.note("avatarworker: valid so far, but a worker would not start with it: %s", err)
			}
			return nil
		},
	}
}
