package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"avatarworker/internal/errors"
	"avatarworker/internal/terminal"
)

// noArgs is cobra.NoArgs for commands with and without others under them: it
// names the command that was probably meant.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return tooMany(cmd, args[0])
	}
	return usagef("unknown command %q for %q%s", args[0], cmd.CommandPath(), didYouMean("", suggestions(cmd, args[0])))
}

// argCount accepts from least to most arguments (most -1: any number), none of them
// empty. The error names the argument, as the command's Use does.
func argCount(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		names := strings.Fields(cmd.Use)[1:]
		switch empty := slices.Index(args, ""); {
		case len(args) < least:
			return usagef("no %s given: write '%s'", strings.TrimSuffix(names[len(args)], "…"), synopsis(cmd))
		case most >= 0 && len(args) > most:
			return tooMany(cmd, args[most])
		case empty >= 0:
			return usagef("%s is empty: write '%s'", strings.Trim(names[min(empty, len(names)-1)], "[]…"), synopsis(cmd))
		}
		return nil
	}
}

func tooMany(cmd *cobra.Command, arg string) error {
	return usagef("unexpected argument %q: write '%s'", arg, synopsis(cmd))
}

// synopsis is the command with its arguments, "avatarworker cost check FILE".
func synopsis(cmd *cobra.Command) string {
	if cmd.HasParent() {
		return cmd.Parent().CommandPath() + " " + cmd.Use
	}
	return cmd.Use
}

// explainFlag rewrites the library's errors about flags: an unknown one gets the
// name that was probably meant, a value that can't be read what is wanted instead.
func explainFlag(cmd *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return explainValue(invalid)
	}
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
	var flags []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			flags = append(flags, f.Name)
		}
	})
	return fmt.Errorf("%w%s", err, didYouMean("--", similar(flags, typed)))
}

// similar are the names that typed may have meant.
func similar[T ~string](names []T, typed string) []string {
	// Cobra compares a name with those of commands only.
	all := &cobra.Command{}
	for _, name := range names {
		all.AddCommand(&cobra.Command{Use: string(name), Run: func(*cobra.Command, []string) {}})
	}
	return suggestions(all, typed)
}

// oneOf refuses a flag's value that is none of the words it takes.
func oneOf[T ~string](flag, value string, words []T) error {
	if slices.Contains(words, T(value)) {
		return nil
	}
	list := make([]string, len(words))
	for i, word := range words {
		list[i] = string(word)
	}
	return usagef("--%s %q: want one of %s%s", flag, value, strings.Join(list, ", "), didYouMean("", similar(words, value)))
}

// warnUnknown warns of codes that this version does not know: a typing error, or
// what a newer worker wrote.
func (c *cli) warnUnknown(codes ...errors.Code) {
	for _, code := range codes {
		if !code.Known() {
			c.note("warning: --code %s is not known here%s; 'avatarworker errors' lists the codes", terminal.Plain(string(code)), didYouMean("", similar(errors.Codes(), string(code))))
		}
	}
}

// explainValue says what a flag wants. The error of a flag that has a form of its
// own says it already.
func explainValue(err *pflag.InvalidValueError) error {
	want := err.Unwrap().Error()
	switch kind := err.GetFlag().Value.Type(); {
	case errors.Is(err, strconv.ErrRange):
		want = "the number is out of range"
	case kind == "duration":
		want = "want a duration such as 90s, 15m or 24h"
	case kind == "float64":
		want = "want a number"
	case kind == "bool":
		want = "want true or false"
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		want = "want a whole number"
	}
	return fmt.Errorf("--%s %q: %s", err.GetFlag().Name, err.GetValue(), want)
}

// suggestions are the commands under cmd that typed may have meant.
func suggestions(cmd *cobra.Command, typed string) []string {
	cmd.SuggestionsMinimumDistance = 2
	names := slices.DeleteFunc(cmd.SuggestionsFor(typed), func(name string) bool {
		// Of two or three letters, two may differ by chance.
		return typed == "" || len(typed) < 4 && !strings.EqualFold(typed[:1], name[:1])
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
