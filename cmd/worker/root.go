package main

import (
	"github.com/spf13/cobra"
)

const about = `avatarworker runs avatar session jobs that it pulls from NATS JetStream, and is
the tool to publish jobs, follow them, and repair what failed.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed,
2 wrong command line, 78 bad configuration.`

func newRootCommand(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use: "avatarworker", Short: "Runs avatar session jobs from NATS JetStream", Long: about,
		SilenceErrors: true, SilenceUsage: true,
		Args: noArgs, RunE: showHelp, Version: thisBuild().String(),
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := noneEmpty(cmd); err != nil {
				return err
			}
			c.started = true
			return nil
		},
	}
	root.SetIn(c.stdin)
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	root.SetVersionTemplate("{{.Version}}\n")
	root.Flags().Bool("version", false, "print the version")
	root.SetFlagErrorFunc(explainFlag)
	flags := root.PersistentFlags()
	flags.StringVarP(&c.configFile, "config", "c", "", "configuration `FILE` (default config.yaml where there is one)")
	flags.Func("set", "set a `KEY=VALUE` of the configuration; may be repeated", c.set)
	for _, f := range []struct{ flag, key, usage string }{
		{"nats-url", "nats.url", "`URL` of NATS"},
		{"nats-context", "nats.context", "`NAME` of a context of the nats command"},
		{"prefix", "nats.prefix", "first `TOKEN` of all subjects"},
		{"log-level", "log.level", "`LEVEL`: trace, debug, info, warn, error"},
		{"log-format", "log.format", "`FORMAT`: auto, json, console"},
	} {
		flags.Func(f.flag, f.usage+" ("+f.key+")", c.override(f.flag, f.key))
	}
	root.AddCommand(commands(c)...)
	root.SetHelpCommand(newHelpCommand(root))
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			cmd.Args, cmd.RunE = noArgs, showHelp
		}
	}
	return root
}

// newHelpCommand is cobra's, except that an unknown command is an error.
func newHelpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Show the help of a command",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil {
				return usagef("%s", err)
			}
			if len(rest) > 0 && cmd.HasAvailableSubCommands() {
				return noArgs(cmd, rest)
			}
			return cmd.Help()
		},
	}
}

// commands lists the commands in the order of the help.
func commands(c *cli) []*cobra.Command {
	return []*cobra.Command{
		newRunCommand(c),
		newDemoCommand(c),
		newSubmitCommand(c),
		newStatusCommand(c),
		newJobsCommand(c),
		newRetryCommand(c),
		newCancelCommand(c),
		newDLQCommand(c),
		newQueueCommand(c),
		newCircuitCommand(c),
		newDrainCommand(c),
		newUICommand(c),
		newEventsCommand(c),
		newErrorsCommand(c),
		newSimulatorCommand(c),
		newRecordingCommand(c),
		newCostCommand(c),
		newSetupCommand(c),
		newCheckConfigCommand(c),
		newVersionCommand(c),
	}
}

// showHelp is what a command does that only has others under it. With noArgs, a
// mistyped subcommand is an error.
func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }
