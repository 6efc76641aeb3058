package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/errors"
	"avatarworker/internal/terminal"
	"avatarworker/internal/topology"
)

func newSetupCommand(c *cli) *cobra.Command {
	var (
		o      topology.SetupOptions
		asJSON bool
	)
	cmd := &cobra.Command{
		Use: "setup", Short: "Create streams, buckets and consumers, and compare them with the configuration", Args: noArgs,
		Long: `Creates what is missing in NATS, as a worker does when it starts, and shows setting
by setting what differs from the configuration. --apply changes what can be changed
without loss; what can't is left, with the reason. Consumers are never changed. With
--dry-run nothing is made or changed.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.setUp(cmd.Context(), o, asJSON) },
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "say what would be done, make and change nothing")
	cmd.Flags().BoolVar(&o.Apply, "apply", false, "change what can be changed without loss")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) setUp(ctx context.Context, o topology.SetupOptions, asJSON bool) error {
	l, err := c.connect(ctx, "setup")
	if err != nil {
		return err
	}
	defer l.close()
	steps, err := topology.Setup(ctx, l.js, l.names, app.Settings(l.cfg), o)
	if err != nil && len(steps) == 0 {
		return err
	}
	return errors.Join(c.printSteps(steps, o, asJSON), err)
}

func (c *cli) printSteps(steps []topology.Step, o topology.SetupOptions, asJSON bool) error {
	if asJSON {
		for _, s := range steps {
			if err := c.printLine(s); err != nil {
				return err
			}
		}
		return nil
	}
	if len(steps) == 0 {
		c.note("everything is as the configuration says")
		return nil
	}
	t := terminal.NewTable(c.stdout, "OBJECT", "SETTING", "HAS", "WANTED", "ACTION", "WHY")
	differs := 0
	for _, s := range steps {
		if s.Action == topology.StepDiffers {
			differs++
		}
		t.Row(s.Object, terminal.OrDash(s.Setting), terminal.OrDash(s.Have), terminal.OrDash(s.Want), s.Action, terminal.OrDash(s.Why))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if differs > 0 && !o.Apply {
		c.note("%s", fmt.Sprintf("%s can be changed without loss: --apply does it", terminal.Count(differs, "setting")))
	}
	return nil
}
