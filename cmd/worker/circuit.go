package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/circuit"
	"avatarworker/internal/operate"
	"avatarworker/internal/terminal"
)

func newCircuitCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "circuit", Short: "List, probe and close circuits", Args: noArgs, RunE: showHelp}
	var asJSON bool
	ls := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the circuits that are not closed", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.listCircuits(cmd.Context(), asJSON) },
	}
	jsonFlag(ls, &asJSON)
	cmd.AddCommand(ls,
		c.circuitChange("probe APP [REGION]", "Let one job of an open circuit through now",
			`Lets one job of an open circuit through now, as its probe, and wakes one that it
holds. If the job succeeds the circuit closes; if not, it stays open for its next
cooldown. Without a REGION this applies to all circuits of the app.`, "Probe", c.probeCircuit),
		c.circuitChange("close APP [REGION]", "Close an open circuit",
			`Closes an open circuit: its jobs are started again, the held ones as their waits end:
within a minute if few wait, within half an hour if very many do ('retry' delivers
them at once). If sessions still fail it opens again. Without a REGION this applies
to all circuits of the app. If none is open it says so.`, verbClose, c.closeCircuit))
	return cmd
}

// verbClose is the verb of closing circuits, which may be repeated.
const verbClose = "Close"

func (c *cli) listCircuits(ctx context.Context, asJSON bool) error {
	l, o, err := c.operator(ctx, "circuit ls")
	if err != nil {
		return err
	}
	defer l.close()
	list, err := openCircuits(ctx, l, o, "", nil)
	if err != nil {
		return err
	}
	if asJSON {
		for _, cc := range list {
			if err := c.printLine(cc); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list) == 0 {
		c.note("no circuit is open")
		return nil
	}
	return c.printCircuitTable(c.now(), list)
}

func openCircuits(ctx context.Context, l *link, o *operate.Operator, app string, region *string) ([]circuit.Circuit, error) {
	list, err := o.OpenCircuits(ctx, app, region)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, l.names.Unavailable("bucket "+l.names.FleetBucket(), err)
	}
	return list, err
}

// changedCircuit is what became of a circuit.
type changedCircuit struct {
	App    string `json:"app_id"`
	Region string `json:"region"`
	Status string `json:"status"`
	JobID  string `json:"job_id,omitempty"` // that was woken
	Error  string `json:"error,omitempty"`
}

type circuitChange func(ctx context.Context, o *operate.Operator, cc circuit.Circuit) (changedCircuit, error)

func (c *cli) circuitChange(use, short, long, verb string, change circuitChange) *cobra.Command {
	var yes, asJSON bool
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: argCount(1, 2),
		ValidArgsFunction: c.completeCircuits,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.changeCircuits(cmd.Context(), verb, args, yes, asJSON, change)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before more than one is changed")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) completeCircuits(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	c.lookUp(cmd.Context(), func(ctx context.Context, l *link) {
		o, err := operate.Open(ctx, l.nc, l.js, l.names)
		if err != nil {
			return
		}
		list, err := openCircuits(ctx, l, o, "", nil)
		if err != nil {
			return
		}
		for _, cc := range list {
			switch {
			case len(args) == 0:
				names = append(names, cc.App)
			case len(args) == 1 && args[0] == cc.App && cc.Region != "":
				names = append(names, cc.Region)
			}
		}
	})
	return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) changeCircuits(ctx context.Context, verb string, args []string, yes, asJSON bool, change circuitChange) error {
	l, o, err := c.operator(ctx, "circuit")
	if err != nil {
		return err
	}
	defer l.close()
	var region *string
	if len(args) == 2 {
		region = &args[1]
	}
	list, err := openCircuits(ctx, l, o, args[0], region)
	if err != nil {
		return err
	}
	if len(list) == 0 && verb == verbClose { // by a probe, by another operator, or before
		c.note("no circuit of app %s is open: 'avatarworker circuit ls' lists the open ones", terminal.Plain(args[0]))
		done := changedCircuit{App: args[0], Status: statusNotOpen}
		if region != nil {
			done.Region = *region
		}
		return c.printCircuit(done, asJSON)
	}
	if len(list) == 0 {
		return fmt.Errorf("app %s: %w: 'avatarworker circuit ls' lists the open ones", args[0], circuit.ErrNone)
	}
	if len(list) > 1 && !yes && c.interactive() {
		if err := c.sure(ctx, fmt.Sprintf("%s %s of app %s?", verb, terminal.Count(len(list), "circuit"), args[0])); err != nil {
			return err
		}
	}
	failed := false
	for _, cc := range list {
		done, err := change(ctx, o, cc)
		done.App, done.Region = cc.App, cc.Region
		switch {
		case errors.Is(err, circuit.ErrNone):
			done.Status = statusClosed // by a probe, or another operator
		case err != nil:
			failed, done.Status, done.Error = true, statusFailed, err.Error()
		}
		if err := c.printCircuit(done, asJSON); err != nil {
			return err
		}
	}
	if failed {
		return errShown
	}
	return nil
}

func (c *cli) printCircuit(cc changedCircuit, asJSON bool) error {
	if asJSON {
		return c.printLine(cc)
	}
	text := fmt.Sprintf("app %s in %s  %s", cc.App, regionText(cc.Region), cc.Status)
	switch {
	case cc.Error != "":
		text += ": " + cc.Error
	case cc.Status == statusProbing && cc.JobID != "":
		text += " with job " + cc.JobID
	case cc.Status == statusProbing:
		text += " with its next job"
	}
	_, err := fmt.Fprintln(c.stdout, terminal.Plain(text))
	return err
}

func regionText(region string) string {
	if region == "" {
		return "all regions"
	}
	return region
}

func (c *cli) probeCircuit(ctx context.Context, o *operate.Operator, cc circuit.Circuit) (changedCircuit, error) {
	_, jobID, err := o.ProbeCircuit(ctx, cc)
	return changedCircuit{Status: statusProbing, JobID: jobID}, err
}

func (c *cli) closeCircuit(ctx context.Context, o *operate.Operator, cc circuit.Circuit) (changedCircuit, error) {
	_, err := o.CloseCircuit(ctx, cc.App, cc.Region)
	return changedCircuit{Status: statusClosed}, err
}
