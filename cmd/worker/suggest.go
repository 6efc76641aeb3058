package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"avatarworker/internal/errors"
)

// noArgs is cobra.NoArgs for commands with and without others under them: it
// names the command that was probably meant.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return usagef("%s takes no arguments, got %q", cmd.CommandPath(), args[0])
	}
	return usagef("unknown command %q for %q%s", args[0], cmd.CommandPath(), didYouMean("", suggestions(cmd, args[0])))
}

// explainFlag adds to the error about an unknown flag which one was probably
// meant.
func explainFlag(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	typed := unknown.GetSpecifiedName()
	if group := unknown.GetSpecifiedShortnames(); group != "" {
		typed = group // "-avatar", meant as "--avatar"
	}
	if len(typed) == 1 {
		return err
	}
	// Cobra compares a name with those of commands only.
	flags := &cobra.Command{}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			flags.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
		}
	})
	return fmt.Errorf("%w%s", err, didYouMean("--", suggestions(flags, typed)))
}

// suggestions are the commands under cmd that typed may have meant.
func suggestions(cmd *cobra.Command, typed string) []string {
	cmd.SuggestionsMinimumDistance = 2
	names := slices.DeleteFunc(cmd.SuggestionsFor(typed), func(name string) bool {
		// Of two or three letters, two may differ by chance.
		return len(typed) < 4 && !strings.EqualFold(typed[:1], name[:1])
	})
	for _, sub := range cmd.Commands() { // "--avatar_id", of the field of that name
		if name := sub.Name(); len(name) > 2 && sub.IsAvailableCommand() && strings.HasPrefix(typed, name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func didYouMean(prefix string, names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "; did you mean " + prefix + strings.Join(names, " or "+prefix) + "?"
}
